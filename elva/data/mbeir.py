"""M-BEIR's layout: reader and writer (Wei et al., UniIR, arXiv:2311.17136).

Reads M-BEIR itself and whatever is written in its layout, the embedded emoji corpus first of
all. Two files of ours may stand beside M-BEIR's (`extras.py`).

Only sets with a task in their name are read (`mbeir_cirr_task7_test.jsonl`), not M-BEIR's
union files, which mix tasks.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from elva.data import pool as pool_file
from elva.data.extras import read_grains, read_minimal_pairs
from elva.data.pool import Dataset, Pool, concatenate, distinct
from elva.data.schema import TASKS, Query, hashed_id, normalise
from elva.data.strict import Faults, Record, dump, lines, modality_of, records, write_lines
from elva.errors import DataError

SPLITS = ("train", "val", "test")
LINKED = ("cand_pool", "instructions", "mbeir_images", "grains.jsonl", "minimal_pairs.jsonl")
"""What a directory made of another's queries links to, beside queries and qrels of its own."""

_TASK_NAMES = {number: task for task, number in TASKS.items()}
_MODALITIES = {"t": "text", "i": "image", "it": "image,text"}
_INSTRUCTIONS = Path("instructions") / "query_instructions.tsv"

Prompts = Mapping[tuple[int, str, str], tuple[str, ...]]


@dataclass(frozen=True)
class QuerySet:
    """One query file and the pool it is asked of: M-BEIR's unit of evaluation.

    Args:
        stem: `mscoco_task0`.
        task: `t2i`.
        pool_name: The pool file's name without its ending.
    """

    stem: str
    task: str
    queries: list[Query]
    pool: Pool
    pool_name: str


def load(root: Path, *, tasks: Sequence[str] | None = None, split: str = "train") -> Dataset:
    """Read the queries of a split with their candidate pools, by task.

    Args:
        root: A folder in M-BEIR's layout.
        tasks: What to read: tasks (`t2i`) or single sets (`mscoco_task0`); all by default.
        split: train, val or test. A pool written for this split alone is preferred to the
            common one: that is how held-out rows stay out of training.

    Returns:
        Queries with the first instruction of their kind, normalised texts, and pools.

    Raises:
        DataError: anything that is not as M-BEIR has it, as `file:line: rule`.
    """
    root = Path(root)
    queries: list[Query] = []
    pools: dict[str, list[Pool]] = defaultdict(list)
    for one in read_sets(root, tasks=tasks, split=split):
        queries += one.queries
        pools[one.task].append(one.pool)
    merged = {task: concatenate(found) for task, found in pools.items()}
    grains = read_grains(root / "grains.jsonl", queries, merged.values())
    queries = [replace(query, grains=grains["qid"].get(query.id)) for query in queries]
    pairs = read_minimal_pairs(root / "minimal_pairs.jsonl", queries, merged)
    return Dataset(root, split, queries, merged, grains["did"], pairs)


def read_sets(
    root: Path,
    *,
    tasks: Sequence[str] | None = None,
    split: str = "test",
    pools: Literal["local", "global"] = "local",
    faults: Faults | None = None,
) -> list[QuerySet]:
    """The query files of a split one by one, each with the pool it is asked of.

    Args:
        pools: `local`, every set against its own candidates (the paper's protocol), or `global`,
            all against `cand_pool/global`'s, or the union of the local ones where there is none.
        faults: Rows that may be left out, and where they are listed.

    Raises:
        DataError: anything that is not as M-BEIR has it, as `file:line: rule`.
    """
    root, faults = Path(root), faults or Faults()
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    prompts = read_instructions(root / _INSTRUCTIONS)
    found = _find(root, tasks, split)
    paths = dict.fromkeys(_pool_path(root, stem, split) for stem, _, _ in found)
    opened = {path: read_pool(path, root, faults) for path in paths}
    union = _global_pool(root, split, opened, faults) if pools == "global" else None
    sets = []
    for stem, task, path in found:
        source = _pool_path(root, stem, split)
        pool, name = (opened[source], source.stem) if union is None else union
        queries = read_queries(path, root, task, pool, prompts, faults)
        qrels = root / "qrels" / split / f"mbeir_{stem}_{split}_qrels.txt"
        if qrels.exists():
            _check_qrels(read_qrels(qrels), queries, pool, faults)
        sets.append(QuerySet(stem, task, queries, pool, name))
    return sets


def _global_pool(
    root: Path, split: str, local: Mapping[Path, Pool], faults: Faults
) -> tuple[Pool, str]:
    name = f"mbeir_union_{split}_cand_pool"
    path = root / "cand_pool" / "global" / f"{name}.jsonl"
    if path.exists():
        return read_pool(path, root, faults), name
    return distinct(concatenate([local[p] for p in sorted(local)])), name


def read_queries(
    path: Path, root: Path, task: str, pool: Pool, prompts: Prompts, faults: Faults
) -> list[Query]:
    """One query file; every positive and negative must be in the pool."""
    modality, candidate = modalities(task)
    queries: list[Query] = []
    seen: dict[str, str] = {}
    for record in records(path, faults):
        with faults.row():
            id = record.id("qid")
            if id in seen:
                record.fail(f"qid {id} again, first in {seen[id]}")
            seen[id] = record.where
            if record.get("task_id") not in (None, TASKS[task]):
                record.fail(f"task_id {record.get('task_id')!r} is not the file's {TASKS[task]}")
            raw, text, image = _content(
                record, "query_txt", "query_img_path", "query_modality", modality
            )
            key = (int(id.partition(":")[0]), modality, candidate)
            if key not in prompts:
                record.fail(f"no instruction for dataset {key[0]}, {modality} to {candidate}")
            positives, negatives = record.ids("pos_cand_list"), record.ids("neg_cand_list")
            if not positives:
                record.fail("pos_cand_list is empty")
            for listed in positives + negatives:
                if listed not in pool:
                    record.fail(f"candidate {listed} is not in the pool")
            queries.append(
                Query(
                    id,
                    text,
                    None if image is None else root / image,
                    modality,
                    instruction=prompts[key][0],
                    task=task,
                    positives=positives,
                    negatives=negatives,
                    raw_text=raw,
                    where=record.where,
                )
            )
    return queries


def read_pool(path: Path, root: Path, faults: Faults | None = None) -> Pool:
    """One candidate file; a large one is mapped from a table that is made on first use."""
    known = faults or Faults()
    return pool_file.of_file(path, root, lambda: _candidates(path, known), known)


def _candidates(path: Path, faults: Faults) -> Iterator[pool_file.Row]:
    for record in records(path, faults):
        with faults.row():
            modality = record.modality("modality")
            _, text, image = _content(record, "txt", "img_path", "modality", modality)
            line, extra = int(record.where.rpartition(":")[2]), record.get("src_content")
            known = extra if isinstance(extra, str) else None
            yield record.id("did"), text, image, modality, line, known


def read_qrels(path: Path) -> dict[tuple[str, str], str]:
    """(query, candidate) -> `file:line`, of the lines with a relevance above zero."""
    relevant: dict[tuple[str, str], str] = {}
    for where, line in lines(path):
        fields = line.split()
        if len(fields) not in (4, 5):
            raise DataError(f"{where}: {len(fields)} columns, not qid 0 did relevance task_id")
        try:
            for id in (fields[0], fields[2]):
                hashed_id(id)
            relevance = int(fields[3])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if relevance > 0:
            relevant[fields[0], fields[2]] = where
    return relevant


def read_instructions(path: Path) -> dict[tuple[int, str, str], tuple[str, ...]]:
    """(dataset, query modality, candidate modality) -> normalised prompts."""
    prompts: dict[tuple[int, str, str], tuple[str, ...]] = {}
    for number, (where, line) in enumerate(lines(path)):
        fields = line.rstrip("\r\n").split("\t")
        if number == 0:
            continue  # The header.
        found = tuple(normalise(field) for field in fields[4:] if field.strip())
        modalities = [modality_of(field) for field in fields[:2]]
        if not found or None in modalities or not re.fullmatch("[0-9]{1,8}", fields[3]):
            raise DataError(
                f"{where}: not query_modality, cand_modality, dataset, dataset_id, prompts"
            )
        prompts[int(fields[3]), str(modalities[0]), str(modalities[1])] = found
    return prompts


def first_instructions(root: Path, dataset: int, candidate: str) -> dict[str, str]:
    """Query modality -> the instruction by which a dataset asks for such candidates."""
    prompts = read_instructions(root / _INSTRUCTIONS)
    return {q: p[0] for (number, q, c), p in prompts.items() if (number, c) == (dataset, candidate)}


def write_queries(root: Path, stem: str, split: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `mbeir_<stem>_<split>.jsonl` and its qrels from M-BEIR's own rows."""
    write_lines(query_file(root, stem, split), map(dump, rows))
    judged = (
        f"{row['qid']} 0 {did} 1 {row['task_id']}"
        for row in rows
        for did in row["pos_cand_list"]  # type: ignore[attr-defined]
    )
    write_lines(root / "qrels" / split / f"mbeir_{stem}_{split}_qrels.txt", judged)


def write_pool(root: Path, stem: str, rows: Iterable[Mapping[str, object]]) -> None:
    """Write `mbeir_<stem>_cand_pool.jsonl` from M-BEIR's own rows."""
    path = root / "cand_pool" / "local" / f"mbeir_{stem}_cand_pool.jsonl"
    write_lines(path, map(dump, rows))


def write_instructions(
    root: Path, dataset: str, number: int, prompts: Mapping[tuple[str, str], Sequence[str]]
) -> None:
    """Write the instructions of one dataset."""
    header = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    header += [f"prompt_{i}" for i in range(1, 5)]
    # Queries that say themselves what to look for: an empty prompt is written as it is quoted.
    rows = [
        [query, cand, dataset, str(number), *(prompt or '""' for prompt in some)]
        for (query, cand), some in prompts.items()
    ]
    write_lines(root / _INSTRUCTIONS, ("\t".join(row) for row in [header, *rows]))


def modalities(task: str) -> tuple[str, str]:
    """Modality of a task's queries and of its candidates."""
    query, candidate = task.split("2")
    return _MODALITIES[query], _MODALITIES[candidate]


def query_file(root: Path, stem: str, split: str) -> Path:
    """Where a query file lies."""
    return root / "query" / split / f"mbeir_{stem}_{split}.jsonl"


def file_stem(dataset: str, task: str) -> str:
    """M-BEIR's name for one dataset's task, `emoji_task0`."""
    return f"{dataset}_task{TASKS[task]}"


def _find(root: Path, tasks: Sequence[str] | None, split: str) -> list[tuple[str, str, Path]]:
    """The query files asked for, as (stem, task, path)."""
    folder = root / "query" / split
    found: list[tuple[str, str, Path]] = []
    for path in sorted(folder.glob(f"mbeir_*_{split}.jsonl")):
        match = re.fullmatch(rf"mbeir_(\w+_task(\d))_{split}\.jsonl", path.name)
        if match is None or int(match[2]) not in _TASK_NAMES:
            raise DataError(f"{path}: not named mbeir_<dataset>_task<number>_{split}.jsonl")
        found.append((match[1], _TASK_NAMES[int(match[2])], path))
    if not found:
        raise DataError(f"{folder}: no query file mbeir_<dataset>_task<number>_{split}.jsonl")
    if tasks is None:
        return found
    for task in tasks:
        if not any(task in (stem, name) for stem, name, _ in found):
            raise DataError(f"{folder}: no queries for {task}")
    return [entry for entry in found if entry[0] in tasks or entry[1] in tasks]


def _pool_path(root: Path, stem: str, split: str) -> Path:
    folder = root / "cand_pool" / "local"
    # MSCOCO's common pools end in _test in M-BEIR.
    for name in dict.fromkeys((f"{stem}_{split}", stem, f"{stem}_test")):
        path = folder / f"mbeir_{name}_cand_pool.jsonl"
        if path.exists():
            return path
    raise DataError(f"{folder}: no candidate pool mbeir_{stem}_cand_pool.jsonl")


def _content(
    record: Record, text_key: str, image_key: str, modality_key: str, expected: str
) -> tuple[str | None, str | None, str | None]:
    """(raw text, normalised text, picture's path) of a row of the expected modality."""
    modality = record.modality(modality_key)
    if modality != expected:
        record.fail(f"{modality_key} is {modality}, not {expected}")
    raw, image = record.text(text_key), record.path(image_key)
    text = normalise(raw or "") or None
    for name, key, present in (("text", text_key, text), ("image", image_key, image)):
        if (name in modality) != (present is not None):
            rule = "is empty" if present is None else "is there"
            record.fail(f"{key} {rule}, but {modality_key} is {modality}")
    return raw, text, image


def _check_qrels(
    relevant: Mapping[tuple[str, str], str], queries: Sequence[Query], pool: Pool, faults: Faults
) -> None:
    known = {query.id: query for query in queries}
    for (qid, did), where in relevant.items():
        with faults.row():
            if qid not in known:
                if faults.found:  # it may be one of those that were left out
                    continue
                raise DataError(f"{where}: query {qid} is not in the query file")
            if did not in pool:
                raise DataError(f"{where}: candidate {did} is not in the pool")
            if did not in known[qid].positives:
                raise DataError(f"{where}: {did} is not a positive of query {qid}")
