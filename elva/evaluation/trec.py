"""TREC's files: a run (what was found, with scores) and qrels (what is right).

run      qid Q0 did rank score tag      (UniIR's have a seventh column, the task)
qrels    qid 0 did relevance            (M-BEIR's have a fifth column, the task)
         query-id corpus-id score       (BEIR's, under this header)
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from elva.data import qrels
from elva.data.strict import Faults, columns, lines
from elva.errors import DataError
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
    for where, fields in _rows(path, faults):
        with faults.row():
            if len(fields) < 6:
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
    """Read qrels of four or five columns, or BEIR's of three under their header.

    Raises:
        DataError: a line that is no judgement, two that differ, as `file:line: rule`; none right.
    """
    judged = qrels.read(path, faults)
    return {qid: {did: one.relevance for did, one in some.items()} for qid, some in judged.items()}


def write_qrels(path: Path, judged: Qrels) -> None:
    """Write qrels of four columns, which every reader of TREC's takes."""
    with replacing(path) as sink:
        sink.write("".join(_judgements(judged)).encode())


def _judgements(judged: Qrels) -> Iterator[str]:
    for qid, some in judged.items():
        for did, relevance in some.items():
            yield f"{qid} 0 {did} {relevance}\n"


def _rows(path: Path, faults: Faults) -> Iterator[tuple[str, list[str]]]:
    """(`file:line`, fields) of the lines that hold any."""
    for where, line in lines(path, faults):
        if fields := columns(line):
            yield where, fields


def _number(where: str, text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        raise DataError(f"{where}: score {text!r} is no number") from None
    if math.isnan(score):
        raise DataError(f"{where}: score is NaN")
    return score
