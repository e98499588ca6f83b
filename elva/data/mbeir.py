"""M-BEIR's layout: reader and writer (Wei et al., UniIR, arXiv:2311.17136).

Reads M-BEIR itself and whatever is written in its layout, the embedded emoji corpus first of
all. Two files of ours may stand beside M-BEIR's (`extras.py`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from elva.data import pool as pool_file
from elva.data import qrels
from elva.data import queries as query_table
from elva.data import table as tables
from elva.data.extras import read_grains, read_minimal_pairs
from elva.data.instructions import datasets, read_instructions
from elva.data.layout import (
    INSTRUCTIONS,
    QueryFile,
    Which,
    find,
    pool_files,
    qrels_file,
    query_file,
    sets_with_pools,
    union_pool_file,
)
from elva.data.pool import Dataset, Pool, concatenate
from elva.data.queries import Queries, Row
from elva.data.schema import (
    TASK_NAMES,
    TASKS,
    hashed_id,
    id_of,
    modalities,
    normalise,
    task_between,
)
from elva.data.strict import Faults, Record, dump, records, write_lines
from elva.errors import DataError

Prompts = Mapping[tuple[int, str, str], tuple[str, ...]]


@dataclass(frozen=True)
class QuerySet:
    """The queries of one task in a file and the pool they are asked of: M-BEIR's unit of
    evaluation.

    Args:
        stem: `mscoco_task0`.
        task: `t2i`.
        pool_name: The pool file's name without its ending.
        path: The query file; of a file that mixes tasks there are several sets.
        notices: What a person should know of it, a line each.
    """

    stem: str
    task: str
    queries: Queries
    pool: Pool
    pool_name: str
    path: Path
    notices: tuple[str, ...] = ()


class _Searched(NamedTuple):
    """A pool, its name, and the files that it is made of."""

    pool: Pool
    name: str
    files: tuple[Path, ...]


def load(
    root: Path,
    *,
    tasks: Sequence[str] | None = None,
    split: str = "train",
    queries: Which = "sets",
) -> Dataset:
    """Read the queries of a split with their candidate pools, by task.

    Args:
        root: A folder in M-BEIR's layout.
        tasks: What to read: tasks (`t2i`) or single sets (`mscoco_task0`); all by default.
        split: train, val or test. A pool written for this split alone is preferred to the
            common one: that is how held-out rows stay out of training.
        queries: The files of the sets, or M-BEIR's file of all sets; what is there where only one
            of them is.

    Returns:
        Queries with the first instruction of their kind, and pools. A task's pool is that of all
        its sets, so an answer is `outside` only where none of them holds it.

    Raises:
        DataError: anything that is not as M-BEIR has it, as `file:line: rule`.
    """
    root = Path(root)
    sets = _read(root, find(root, split, queries), tasks, split, "task", Faults())
    pools = {one.task: one.pool for one in sets}
    asked = query_table.concatenate([one.queries for one in sets])
    grains = read_grains(root / "grains.jsonl", asked, pools.values())
    pairs = read_minimal_pairs(root / "minimal_pairs.jsonl", asked, pools)
    notices = tuple(line for one in sets for line in one.notices)
    asked = asked.with_grains(grains["qid"])
    return Dataset(root, split, asked, pools, grains["did"], pairs, notices)


def read_sets(
    root: Path,
    *,
    tasks: Sequence[str] | None = None,
    split: str = "test",
    pools: Literal["local", "global"] = "local",
    queries: Which = "sets",
    files: Sequence[QueryFile] | None = None,
    faults: Faults | None = None,
) -> list[QuerySet]:
    """The query files of a split one by one, each with the pool it is asked of.

    Args:
        pools: `local`, every set against its own candidates (the paper's protocol), or `global`,
            all against `cand_pool/global`'s, or the union of the local ones where there is none.
        queries: as `load` takes it.
        files: some of `layout.find`'s; all of the split's by default.
        faults: Rows that may be left out, and where they are listed.

    Raises:
        DataError: anything that is not as M-BEIR has it, as `file:line: rule`.
    """
    found = find(Path(root), split, queries) if files is None else (files, ())
    return _read(Path(root), found, tasks, split, pools, faults or Faults())


def _read(
    root: Path,
    there: tuple[Sequence[QueryFile], tuple[str, ...]],
    tasks: Sequence[str] | None,
    split: str,
    pools: Literal["local", "global", "task"],
    faults: Faults,
) -> list[QuerySet]:
    prompts = read_instructions(root / INSTRUCTIONS)
    found, notices = there
    files = [file for file in found if _wanted(file, tasks)]
    searched = _searched(root, files, split, pools, faults) if files else []
    sets: list[QuerySet] = []
    for file, asked in zip(files, searched, strict=True):
        queries = _read_queries(root, file, split, asked, prompts, faults)
        for task in [file.task] if file.task else queries.tasks():
            stem = file.stem(task)
            if tasks is None or stem in tasks or task in tasks:
                some = queries.select(queries.rows_of(task))
                lines = (*notices, *_outside(stem, some, asked[task].name))
                pool, name, _ = asked[task]
                sets.append(QuerySet(stem, task, some, pool, name, file.path, lines))
                notices = ()  # once, with the first
    for task in tasks or ():
        if not any(task in (one.stem, one.task) for one in sets):
            raise DataError(f"{found[0].path.parent}: no queries for {task}")
    return sets


def _wanted(file: QueryFile, tasks: Sequence[str] | None) -> bool:
    possible = TASKS if file.task is None else (file.task,)
    return tasks is None or any(t in tasks or file.stem(t) in tasks for t in possible)


def _searched(
    root: Path,
    files: Sequence[QueryFile],
    split: str,
    pools: Literal["local", "global", "task"],
    faults: Faults,
) -> list[dict[str, _Searched]]:
    """Task -> what is searched, of each file."""
    union = union_pool_file(root, split)
    if pools == "global" and union.exists():
        whole = _Searched(read_pool(union, root, faults), union.stem, (union,))
        return [dict.fromkeys([file.task] if file.task else TASKS, whole) for file in files]
    paths = [pool_files(root, file, split) for file in files]
    every = dict.fromkeys(chain.from_iterable(found.values() for found in paths))
    opened = {path: read_pool(path, root, faults) for path in every}

    def joined(some: Iterable[Path]) -> _Searched:
        distinct = tuple(dict.fromkeys(some))
        name = distinct[0].stem if len(distinct) == 1 else union.stem
        return _Searched(concatenate([opened[path] for path in distinct]), name, distinct)

    if pools == "global":
        whole = joined(sorted(every))._replace(name=union.stem)
        return [dict.fromkeys(found, whole) for found in paths]
    if pools == "local":
        each = {path: joined([path]) for path in every}
        return [{task: each[path] for task, path in found.items()} for found in paths]
    known = dict.fromkeys(chain.from_iterable(paths))
    of = {task: joined(found[task] for found in paths if task in found) for task in known}
    return [{task: of[task] for task in found} for found in paths]


def _outside(stem: str, queries: Queries, pool: str) -> tuple[str, ...]:
    """A line on the answers that the searched pool does not hold, where there are any."""
    answers, negatives = int(queries.listed("outside").sum()), int(queries.column("dropped").sum())
    if not answers + negatives:
        return ()
    none = int((queries.listed("positives") == 0).sum())
    dropped = f", {negatives:,} negatives outside are left out" if negatives else ""
    return (
        f"{stem}: {none:,} of {len(queries):,} queries have no right answer in {pool}; "
        f"{answers:,} right answers lie outside it, in another set's pool{dropped}",
    )


def _read_queries(
    root: Path,
    file: QueryFile,
    split: str,
    asked: Mapping[str, _Searched],
    prompts: Prompts,
    faults: Faults,
) -> Queries:
    """One query file; every positive and negative must be in its pool, or could be another's."""
    known = sets_with_pools(root, datasets(root / INSTRUCTIONS))
    judged = [(task, qrels_file(root, file.stem(task), split)) for task in asked]
    judged = [(task, path) for task, path in judged if path.exists()]
    against = [f"{task} {tables.stamp(path)}" for task in asked for path in asked[task].files]
    against += [f"{task} {tables.stamp(path)}" for task, path in judged]
    against += [tables.stamp(root / INSTRUCTIONS), str(known), str(file.union)]

    def batches() -> Iterable[pa.RecordBatch]:
        instructions = [found[0] for found in prompts.values()]
        rows = _query_rows(file, split, asked, prompts, faults)
        pool_of = {task: one.pool for task, one in asked.items()}.__getitem__
        return query_table.batches(rows, file.path, instructions, pool_of, known, faults)

    def check(kept: tables.Kept) -> None:
        for task, path in judged:
            qrels.check(path, kept, asked[task].pool, faults)

    kept = tables.of_file(
        query_table.KIND, file.path, against, batches, faults, repeats=file.union, check=check
    )
    return Queries(kept.table, root)


def _query_rows(
    file: QueryFile, split: str, asked: Mapping[str, _Searched], prompts: Prompts, faults: Faults
) -> Iterator[Row]:
    places = {key: place for place, key in enumerate(prompts)}
    for record in records(file.path, faults):
        with faults.row():
            id = record.id("qid")
            # A benchmark may keep its test answers to itself: null there, and none else.
            hidden = split == "test" and record.value("pos_cand_list") is None
            positives = [] if hidden else _hashed(record, "pos_cand_list")
            negatives = _hashed(record, "neg_cand_list")
            if not positives and not hidden:
                record.fail("pos_cand_list is empty")
            task = _task(record, file, positives, asked)
            modality, candidate = modalities(task)
            raw, _, image = _content(
                record, "query_txt", "query_img_path", "query_modality", modality
            )
            key = (int(id.partition(":")[0]), modality, candidate)
            if key not in places:
                record.fail(f"no instruction for dataset {key[0]}, {modality} to {candidate}")
            line = int(record.where.rpartition(":")[2])
            yield Row(
                hashed_id(id), raw, image, places[key], TASKS[task], positives, negatives, line
            )


def _hashed(record: Record, key: str) -> list[int]:
    return list(dict.fromkeys(map(hashed_id, record.ids(key))))


def _task(
    record: Record, file: QueryFile, positives: Sequence[int], asked: Mapping[str, _Searched]
) -> str:
    """The task of a row: the file's, the row's own `task_id`, or, as older files have it, that of
    its modality and of its first known answer's."""
    number = record.get("task_id")
    if file.task is not None:
        if number not in (None, TASKS[file.task]):
            record.fail(f"task_id {number!r} is not the file's {TASKS[file.task]}")
        return file.task
    if number is None:
        task = _deduced(record, positives, asked)
    elif isinstance(number, int) and number in TASK_NAMES:
        task = TASK_NAMES[number]
    else:
        record.fail(f"task_id {number!r} is not the number of a task")
    if task not in asked:
        record.fail(f"no candidate pool mbeir_{file.stem(task)}_cand_pool.jsonl")
    return task


def _deduced(record: Record, positives: Sequence[int], asked: Mapping[str, _Searched]) -> str:
    if not positives:
        record.fail("task_id is missing, and there are no answers to tell it by")
    for pool in {id(one.pool): one.pool for one in asked.values()}.values():
        rows = pool.find(np.array(positives))
        if (rows >= 0).any():
            answer = pool[int(rows[rows >= 0][0])]
            break
    else:
        record.fail(f"task_id is missing and candidate {id_of(positives[0])} is not in the pool")
    return task_between(record.modality("query_modality"), answer.modality)


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


def write_queries(root: Path, stem: str, split: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `mbeir_<stem>_<split>.jsonl` and its qrels from M-BEIR's own rows; no qrels where no
    row has answers."""
    write_lines(query_file(root, stem, split), map(dump, rows))
    judged = (
        f"{row['qid']} 0 {did} 1 {row['task_id']}"
        for row in rows
        for did in row["pos_cand_list"] or ()  # type: ignore[attr-defined]
    )
    if any(row["pos_cand_list"] is not None for row in rows):
        write_lines(qrels_file(root, stem, split), judged)


def write_pool(root: Path, stem: str, rows: Iterable[Mapping[str, object]]) -> None:
    """Write `mbeir_<stem>_cand_pool.jsonl` from M-BEIR's own rows."""
    path = root / "cand_pool" / "local" / f"mbeir_{stem}_cand_pool.jsonl"
    write_lines(path, map(dump, rows))


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
