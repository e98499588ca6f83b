"""One segment in the place of many, without what is deleted."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from elva.errors import IndexFault
from elva.index import change, manifest
from elva.index.index import Index
from elva.progress import SILENT, Reporter

BLOCK_MB, BLOCK_ROWS = 16, 65_536
"""Ours: embeddings and ids that are in memory at a time."""


def compact(directory: str | Path, reporter: Reporter = SILENT) -> Index:
    """The index as one segment, without the bytes of deleted items, or as it is where it is that
    already. Rows keep their order, so searches give the same scores and ids.

    The change is the replacement of the manifest: until then the index is what it was, and a
    killed call is made good by another.

    Raises:
        IndexFault: no index, a damaged one, one whose fields have several types, or less free space
            than the new segment takes.
    """
    place = Path(directory)
    with manifest.writing(place):
        now = Index(place, verify=False)
        before = now.manifest
        if not _wasted(now):
            return now
        for name, kinds in now.conflicts.items():
            raise IndexFault(
                f"{place}: field {name} must have one type to be compacted, got {kinds}; delete "
                "the items of one of them"
            )
        _check_space(now)
        now.verify(reporter)
        entries: tuple[manifest.Entry, ...] = ()
        if len(now):
            reporter.start(f"{place}: compact", len(now), "rows")
            table = now.table.unify_dictionaries()
            ids = pa.RecordBatchReader.from_batches(table.schema, _kept(table, now.alive))
            entries = (
                change.written(place, _rows(now, reporter), ids, before, now.is_coded, reporter),
            )
        later = replace(before, generation=before.generation + 1, segments=entries)
        manifest.write(place, later)
        reporter.finish("")
        return Index(place, verify=False)


def _wasted(index: Index) -> int:
    """Bytes that compacting saves, or, of many segments, 1 where it saves none."""
    gone = int((~index.alive).sum())
    size = sum(one.size for one in index.files)
    many = len(index.segments) > 1
    return max(int(many), gone * size // max(1, len(index.alive)))


def _check_space(index: Index) -> None:
    size = sum(one.size for one in index.files)
    needed = size * len(index) // max(1, len(index.alive))
    free = shutil.disk_usage(index.directory).free
    if free < needed:
        raise IndexFault(
            f"{index.directory}: must have {needed:,} bytes free beside it to be compacted, got "
            f"{free:,}; free space"
        )


def _rows(index: Index, reporter: Reporter) -> Iterator[Tensor]:
    """The embeddings that are left, as they are stored, block by block."""
    done = start = 0
    for one in index.segments:
        row_bytes = one.dim * one.embeddings.element_size()
        alive = torch.from_numpy(index.alive[start : start + one.rows])
        for block, kept in zip(
            one.embeddings.split(max(1, (BLOCK_MB << 20) // row_bytes)),
            alive.split(max(1, (BLOCK_MB << 20) // row_bytes)),
            strict=True,
        ):
            rows = block[kept]
            done += len(rows)
            yield rows
            reporter.advance(done)
        start += one.rows


def _kept(table: pa.Table, alive: np.ndarray) -> Iterator[pa.RecordBatch]:
    """The ids and fields that are left, batch by batch."""
    for start in range(0, table.num_rows, BLOCK_ROWS):
        some = table.slice(start, BLOCK_ROWS)
        yield from some.filter(pa.array(alive[start : start + BLOCK_ROWS])).to_batches()
