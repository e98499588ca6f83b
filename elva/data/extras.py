"""Two files of ours beside M-BEIR's: what a query is made of, and what it is to be told from.

`grains.jsonl` holds the grains of a query's or a candidate's normalised text (qid or did);
`minimal_pairs.jsonl` every candidate of a query's own entity (qid).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from elva.data.pool import Pool
from elva.data.queries import Queries
from elva.data.schema import TASK_NAMES, Grain
from elva.data.strict import Record, dump, records, write_lines


def write_extras(
    root: Path,
    query_grains: Mapping[str, Sequence[Grain]],
    candidate_grains: Mapping[str, Sequence[Grain]],
    minimal_pairs: Mapping[str, Sequence[str]],
) -> None:
    """Write grains.jsonl and minimal_pairs.jsonl."""
    write_lines(
        root / "grains.jsonl",
        (
            dump({key: id, "grains": [vars(grain) for grain in found]})
            for key, grains in (("qid", query_grains), ("did", candidate_grains))
            for id, found in grains.items()
        ),
    )
    write_lines(
        root / "minimal_pairs.jsonl",
        (dump({"qid": id, "candidates": list(found)}) for id, found in minimal_pairs.items()),
    )


def read_grains(
    path: Path, queries: Queries, pools: Iterable[Pool]
) -> dict[str, dict[str, tuple[Grain, ...]]]:
    """Grains of the texts at hand, by `qid` and by `did`; each must be where it says it is."""
    grains: dict[str, dict[str, tuple[Grain, ...]]] = {"qid": {}, "did": {}}
    if not path.exists():
        return grains
    texts = {"qid": dict(zip(queries.ids, queries.texts, strict=True)), "did": {}}
    for pool in pools:
        texts["did"].update(zip(pool.ids, pool.table["text"].to_pylist(), strict=True))
    for record in records(path):
        key = "did" if record.get("did") is not None else "qid"
        id, found = record.id(key), record.value("grains")
        if not isinstance(found, list):
            record.fail("grains is not a list")
        text = texts[key].get(id)
        if text is not None:  # Otherwise a row of another split or task.
            grains[key][id] = tuple(_grain(record, text, fields) for fields in found)
    return grains


def _grain(record: Record, text: str, fields: object) -> Grain:
    shape = 'a grain is not {"text": string, "type": string, "span": [start, end]}'
    if not isinstance(fields, dict):
        record.fail(shape)
    words, kind, span = fields.get("text"), fields.get("type"), fields.get("span")
    if not (isinstance(words, str) and isinstance(kind, str) and isinstance(span, list)):
        record.fail(shape)
    if [type(end) for end in span] != [int, int]:
        record.fail(shape)
    start, end = span
    # Normalising may have capitalised the first letter.
    if not 0 <= start < end or text[start:end].casefold() != words.casefold():
        record.fail(f"grain {words!r} is not at {start}:{end} of {text!r}")
    return Grain(words, kind, (start, end))


def read_minimal_pairs(
    path: Path, queries: Queries, pools: Mapping[str, Pool]
) -> dict[str, list[str]]:
    """Query id -> the candidates it is to be told from, of the queries at hand."""
    if not path.exists():
        return {}
    tasks = dict(zip(queries.ids, queries.column("task").tolist(), strict=True))
    pairs: dict[str, list[str]] = {}
    for record in records(path):
        id, found = record.id("qid"), record.ids("candidates")
        if id not in tasks:
            continue  # A query of another split or task.
        for did in found:
            if did not in pools[TASK_NAMES[tasks[id]]]:
                record.fail(f"candidate {did} is not in the pool")
        pairs[id] = list(found)
    return pairs
