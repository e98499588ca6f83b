"""`elva embed`: the items of a data directory as embeddings on disk, shard by shard.

Each pool and query file becomes a directory (`elva.index.embeddings`) of its own name:
`mbeir_cirr_task7_cand_pool`, `mbeir_cirr_task7_test`. A shard appears whole or not at all, so a
killed run goes on where it was; several processes (`torchrun -m elva embed`) take the shards in
turns.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from elva.data import Item, Pool, Queries
from elva.data.instructions import first_instructions
from elva.data.mbeir import QuerySet, read_sets
from elva.data.schema import modalities
from elva.data.strict import Faults
from elva.errors import DataError, UserError
from elva.files import append_text, write_text
from elva.index import fields
from elva.index import segment as segment_file
from elva.index.embeddings import PLAN, Embeddings, columns
from elva.model.encoder import Encoder, unfamiliar
from elva.model.modalities import must_read
from elva.model.rollout import Encoded
from elva.progress import SILENT, Reporter
from elva.report import pictures

SHARD_ROWS = 8192
"""Ours: what a kill can cost, and few enough files at millions of items."""

SKIPPED = "skipped.txt"
"""What was left out, a line each."""

Sides = Literal["both", "queries", "pools"]


def embed(
    encoder: Encoder,
    data: Path,
    output: Path,
    *,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    sides: Sides = "both",
    pools: Literal["local", "global"] = "local",
    dtype: str = "float16",
    metadata: bool = False,
    shard_rows: int = SHARD_ROWS,
    resume: bool = False,
    skip_bad: int = 0,
    reporter: Reporter = SILENT,
) -> list[Embeddings]:
    """Embed queries and pools of a data directory.

    Args:
        tasks: as `elva.data.load` takes them.
        dtype: what is stored: float16, bfloat16 or float32.
        metadata: keep the fields of the candidates' `src_content`, to search by.
        resume: go on with what is in `output`, made by the same model of the same data.
        skip_bad: so many rows that break a rule, listed in `output`/skipped.txt, and items that
            cannot be read (a missing picture), listed beside their shards, are left out; one more
            ends the run.

    Returns:
        One for each pool and query file.

    Raises:
        UserError, DataError: an argument, the data, or what is in `output`.
    """
    faults = Faults(skip_bad)
    sets = read_sets(data, tasks=tasks, split=split, pools=pools, faults=faults)
    wanted = [*_wanted(data, sets, split, sides)]
    for name, items, _ in wanted:
        must_read(encoder.identity.name, encoder.modalities, _modalities(items), name)
    if faults.found and _world_rank() == 0:
        write_text(output / SKIPPED, "".join(f"{line}\n" for line in faults.found))
    for line in _notices(encoder, sets, wanted) if _world_rank() == 0 else ():
        reporter.finish(line)
    named = pictures.names(data)
    done = []
    for name, items, about in wanted:
        plan = Embeddings(
            output / name,
            len(items),
            shard_rows,
            encoder.identity,
            {
                **encoder.about,
                **about,
                "data": str(Path(data).absolute()),
                "dtype": dtype,
                "metadata": metadata,
            },
        )
        _begin(plan, resume)
        kinds = _kinds(items) if metadata and isinstance(items, Pool) else {}
        _embed_shards(plan, encoder, items, named, kinds, dtype, faults, reporter)
        done.append(plan)
    return done


def plan(
    data: Path,
    *,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    sides: Sides = "both",
    pools: Literal["local", "global"] = "local",
) -> dict[str, int]:
    """What `embed` would embed: name -> items."""
    sets = read_sets(data, tasks=tasks, split=split, pools=pools)
    return {name: len(items) for name, items, _ in _wanted(data, sets, split, sides)}


def _kinds(pool: Pool) -> dict[str, pa.DataType]:
    """field -> number or text, over the whole pool."""
    if pool.table["extra"].null_count == len(pool):
        return {}
    return fields.kinds(pool.extra(row) for row in range(len(pool)))


def _metadata(
    items: Pool | Queries, good: Sequence[Item], kinds: Mapping[str, pa.DataType]
) -> dict[str, pa.Array]:
    if not kinds or not isinstance(items, Pool):
        return {}
    return fields.arrays([items.extra(items.row(item.id)) for item in good], kinds)


def _names(
    items: Pool | Queries, good: Sequence[Item], named: Mapping[str, str]
) -> Mapping[str, str]:
    """id -> what to call it: of a person's own picture its path under their folder."""
    if not isinstance(items, Pool):
        return named
    files = {item.id: items.extra(items.row(item.id)).get("file") for item in good if item.image}
    return {**named, **{id: str(file) for id, file in files.items() if file}}


def _wanted(
    data: Path, sets: Sequence[QuerySet], split: str, sides: Sides
) -> Iterator[tuple[str, Pool | Queries, dict[str, Any]]]:
    """(name, items, what to note) of each pool once and of each query file."""
    if sides in ("both", "pools"):
        for name in dict.fromkeys(s.pool_name for s in sets):
            of = [s for s in sets if s.pool_name == name]
            known = _instructions(data, of[0].pool)
            known |= {s.queries[0].modality: s.queries[0].instruction for s in of if s.queries}
            yield name, of[0].pool, {"side": "pool", "instructions": known}
    if sides in ("both", "queries"):
        for one in sets:
            asked = one.queries.distinct()
            yield f"mbeir_{one.stem}_{split}", asked, {"side": "queries", "task": one.task}


def _modalities(items: Pool | Queries) -> dict[str, int]:
    """modality -> items."""
    if isinstance(items, Queries):
        found: Counter[str] = Counter()
        for task, count in items.tasks().items():
            found[modalities(task)[0]] += count
        return found
    return {one["values"]: one["counts"]
            for one in items.table["modality"].value_counts().to_pylist()}  # fmt: skip


def _notices(
    encoder: Encoder,
    sets: Sequence[QuerySet],
    wanted: Sequence[tuple[str, Pool | Queries, Mapping[str, Any]]],
) -> Iterator[str]:
    """What is to be known before work starts, a line each."""
    for one in sets:
        yield from one.notices
    if encoder.instructions == "unread" and any(
        about["side"] == "queries" for _, _, about in wanted
    ):
        yield f"note: {encoder.identity.name} reads no instruction; the queries' are left out"
    datasets = {int(number) for _, items, _ in wanted for number in items.datasets}
    if line := unfamiliar(encoder, datasets):
        yield line


def _instructions(data: Path, pool: Pool) -> dict[str, str]:
    """Every way in which the data asks for such items as the pool's first."""
    if not len(pool):
        return {}
    return first_instructions(data, int(pool[0].id.partition(":")[0]), pool[0].modality)


def _begin(wanted: Embeddings, resume: bool) -> None:
    directory = wanted.directory
    if (directory / PLAN).exists():
        found = Embeddings.open(directory)
        if not resume and _world_rank() == 0:
            raise UserError(
                f"{directory}: must not hold embeddings yet; pass --resume to go on with them or "
                "choose another --output"
            )
        same = (found.items, found.shard_rows, dict(found.about)) == (
            wanted.items, wanted.shard_rows, dict(wanted.about),
        )  # fmt: skip
        if not same or not found.model.matches(wanted.model):
            raise UserError(
                f"{directory}: must be resumed with its own model, data and options, got others; "
                "choose another --output"
            )
    elif _world_rank() == 0:
        wanted.save()


def _embed_shards(
    plan: Embeddings,
    encoder: Encoder,
    items: Pool | Queries,
    named: Mapping[str, str],
    kinds: Mapping[str, pa.DataType],
    dtype: str,
    faults: Faults,
    reporter: Reporter,
) -> None:
    mine = [i for i in plan.missing if i % _world_size() == _world_rank()]
    rows = plan.shard_rows
    total = sum(min(rows, plan.items - i * rows) for i in mine)
    reporter.start(f"embed {plan.directory.name}", total, "items")
    done, read = 0, len(faults.found)
    for shard in mine:
        chosen = [items[i] for i in range(shard * rows, min(plan.items, (shard + 1) * rows))]
        before = len(faults.found)
        good, out = _embedded(encoder, chosen, faults, _offset(reporter, done))
        done += len(chosen)
        kept = columns(good, _names(items, good, named))
        table = pa.table(
            {
                "id": pa.array([i.id for i in good], pa.string()),
                **{k: pa.array(v, pa.string()) for k, v in kept.items()},
                "summary": pa.array(out.summaries, pa.string()),
                **_metadata(items, good, kinds),
            }
        )
        if len(faults.found) > before:
            left_out = "".join(f"{line}\n" for line in faults.found[before:])
            append_text(plan.directory / SKIPPED, left_out)
        segment_file.write(
            plan.shards[shard], [out.embeddings], table,
            dim=encoder.embedding_size, dtype=dtype, model=plan.model,
        )  # fmt: skip
    bad = len(faults.found) - read
    skipped = f", {bad} bad ones left out, see {SKIPPED}" if bad else ""
    reporter.finish(f"{plan.directory}: {plan.items:,} items{skipped}")


def _embedded(
    encoder: Encoder, items: list[Item], faults: Faults, progress: Callable[[int], None]
) -> tuple[list[Item], Encoded]:
    """Those that can be read, embedded.

    Raises:
        DataError: more cannot be read than are allowed.
    """
    if not faults.allowed:
        with suppress(DataError):  # below it is said of the first row of which it is true
            return items, encoder(items, progress)
    good = list(_readable(encoder, items, faults))
    return good, encoder(good, progress)


def _readable(encoder: Encoder, items: Sequence[Item], faults: Faults) -> Iterator[Item]:
    for item in items:
        fine = False
        with faults.row():
            encoder.check(item)
            fine = True
        if fine:
            yield item


def _offset(reporter: Reporter, done: int) -> Callable[[int], None]:
    return lambda more: reporter.advance(done + more)


def _world_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
