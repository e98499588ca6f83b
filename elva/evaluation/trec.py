"""TREC's files: a run (what was found, with scores) and qrels (what is right).

run      qid Q0 did rank score tag
qrels    qid 0 did relevance            (M-BEIR's have a fifth column, the task)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from elva.data import DataError
from elva.data.strict import Faults, lines
from elva.files import replacing

Answers = Mapping[str, Sequence[tuple[str, float]]]
"""qid -> (did, score) of what was found, in any order."""

Qrels = Mapping[str, Mapping[str, int]]
"""qid -> did -> relevance; 0 and less is wrong."""


def read_run(path: Path, faults: Faults | None = None) -> dict[str, list[tuple[str, float]]]:
    """Read a run; order and rank column are not believed, scores are.

    Raises:
        DataError: a line that is no run's, a candidate twice, as `file:line: rule`.
    """
    found: dict[str, dict[str, float]] = {}
    faults = faults or Faults()
    for where, line in lines(path):
        with faults.row():
            fields = line.split()
            if len(fields) != 6:
                raise DataError(f"{where}: {len(fields)} columns, not qid Q0 did rank score tag")
            score = _number(where, fields[4])
            if fields[2] in found.setdefault(fields[0], {}):
                raise DataError(f"{where}: candidate {fields[2]} again for query {fields[0]}")
            found[fields[0]][fields[2]] = score
    if not found:
        raise DataError(f"{path}: holds no answers")
    return {qid: list(answers.items()) for qid, answers in found.items()}


def write_run(path: Path, run: Iterable[tuple[str, Sequence[tuple[str, float]]]], tag: str) -> None:
    """Write a run, each query's answers best first; scores keep every bit of an fp32."""
    with replacing(path) as sink:
        for qid, answers in run:
            rows = (
                f"{qid} Q0 {did} {rank} {score:.9g} {tag}\n"
                for rank, (did, score) in enumerate(answers, start=1)
            )
            sink.write("".join(rows).encode())


def read_qrels(path: Path, faults: Faults | None = None) -> dict[str, dict[str, int]]:
    """Read qrels of four or five columns.

    Raises:
        DataError: a line that is no judgement, two that differ, as `file:line: rule`.
    """
    found: dict[str, dict[str, int]] = {}
    faults = faults or Faults()
    for where, line in lines(path):
        with faults.row():
            fields = line.split()
            if len(fields) not in (4, 5):
                raise DataError(f"{where}: {len(fields)} columns, not qid 0 did relevance")
            try:
                relevance = int(fields[3])
            except ValueError:
                raise DataError(f"{where}: relevance {fields[3]!r} is no whole number") from None
            judged = found.setdefault(fields[0], {})
            if judged.setdefault(fields[2], relevance) != relevance:
                raise DataError(f"{where}: candidate {fields[2]} was judged otherwise before")
    if not found:
        raise DataError(f"{path}: holds no judgements")
    return found


def write_qrels(path: Path, qrels: Qrels) -> None:
    """Write qrels of four columns, which every reader of TREC's takes."""
    with replacing(path) as sink:
        sink.write("".join(_judgements(qrels)).encode())


def _judgements(qrels: Qrels) -> Iterator[str]:
    for qid, judged in qrels.items():
        for did, relevance in judged.items():
            yield f"{qid} 0 {did} {relevance}\n"


def _number(where: str, text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        raise DataError(f"{where}: score {text!r} is no number") from None
    if math.isnan(score):
        raise DataError(f"{where}: score is NaN")
    return score
