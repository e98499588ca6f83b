"""The index as a whole: open, add, delete, search, verify."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from elva.errors import IndexFault
from elva.index import change, exact, manifest, segment
from elva.index.exact import Found
from elva.index.manifest import SEGMENTS, Entry, Manifest
from elva.index.segment import DTYPES, Segment
from elva.model.identity import Identity

Where = Sequence[tuple[str, str, Any]]
"""Conditions that must all hold: (field, one of = != < <= > >= in, value)."""


class Index:
    """Embeddings with ids and metadata, as they were when it was opened.

    Args:
        directory: where it lies.
        verify: read every byte and compare it with its checksum; False checks all but the
            embeddings' blocks, for indexes that take long to read.

    Raises:
        IndexFault: no index there, or a damaged one.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.manifest, self.segments = _opened(self.directory)
        if verify:
            self.verify()

    # -- writing -----------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        directory: str | Path,
        ids: Sequence[str],
        embeddings: Tensor | Iterable[Tensor],
        *,
        model: Identity,
        dtype: str = "float16",
        columns: Mapping[str, Sequence[Any]] | None = None,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Index:
        """Make an index.

        Args:
            ids: unique, one an embedding.
            embeddings: [n, D], or several such after each other.
            model: what made the embeddings.
            dtype: what they are stored in: float16, bfloat16 or float32.
            columns: metadata, a value for each id.
            about: what its maker wants to find again, as JSON.
            overwrite: replace an index that is there, in one step, instead of refusing.

        Raises:
            IndexFault: an index is there, an id comes twice, an embedding is not finite.
            OSError: the disk is full or not writable; an index that was there is as it was.
        """
        if dtype not in DTYPES:
            raise IndexFault(f"index: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        chunks = [embeddings] if isinstance(embeddings, Tensor) else iter(embeddings)
        first, chunks = change.peek(chunks)
        empty = Manifest(0, first.shape[-1], dtype, model, about=about or {})
        with change.building(Path(directory), empty, overwrite) as base:
            table = change.table_of(ids, columns)
            entry = change.written(Path(directory), chunks, table, base)
            manifest.write(Path(directory), replace(base, segments=(entry,)))
        return cls(directory, verify=False)

    @classmethod
    def assemble(
        cls,
        directory: str | Path,
        segments: Sequence[Path],
        *,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Index:
        """Make an index of segments that are there, as `elva embed` writes them: linked where the
        file system can, else copied; their checksums are compared either way."""
        opened = [Segment(path) for path in segments]
        if not opened:
            raise IndexFault("index: embeddings must hold a segment, got none; run elva embed")
        first = opened[0]
        empty = Manifest(0, first.dim, first.dtype, first.model, about=about or {})
        with change.building(Path(directory), empty, overwrite) as base:
            for one in opened:
                change.check_fits(one, base)
                one.verify()
            change.check_unique(pa.chunked_array([c for s in opened for c in s.table["id"].chunks]))
            entries = tuple(change.linked(Path(directory), one) for one in opened)
            manifest.write(Path(directory), replace(base, segments=entries))
        return cls(directory, verify=False)

    def add(
        self,
        ids: Sequence[str],
        embeddings: Tensor | Iterable[Tensor],
        *,
        model: Identity,
        columns: Mapping[str, Sequence[Any]] | None = None,
        overwrite: bool = False,
    ) -> Index:
        """The index with more items; nothing that is there is written again.

        Args:
            overwrite: an id that is there already is replaced instead of refused.
        """
        with manifest.writing(self.directory):
            now = Index(self.directory, verify=False)
            now.check_model(model)
            table = change.table_of(ids, columns)
            entries = now._making_room(table["id"], overwrite)
            chunks = [embeddings] if isinstance(embeddings, Tensor) else embeddings
            entry = change.written(self.directory, chunks, table, now.manifest)
            now._replace((*entries, entry))
        return Index(self.directory, verify=False)

    def add_segments(self, segments: Sequence[Path], *, overwrite: bool = False) -> Index:
        """The index with segments of `elva embed` added."""
        with manifest.writing(self.directory):
            now = Index(self.directory, verify=False)
            opened = [Segment(path) for path in segments]
            for one in opened:
                change.check_fits(one, now.manifest)
                one.verify()
            ids = pa.chunked_array(
                [c for s in opened for c in s.table["id"].chunks], type=pa.string()
            )
            change.check_unique(ids)
            entries = now._making_room(ids, overwrite)
            now._replace((*entries, *(change.linked(self.directory, one) for one in opened)))
        return Index(self.directory, verify=False)

    def delete(self, ids: Sequence[str]) -> Index:
        """The index without these items; their bytes stay until it is built again.

        Raises:
            IndexFault: an id is not there.
        """
        with manifest.writing(self.directory):
            now = Index(self.directory, verify=False)
            rows = now.rows(ids)
            now._replace(now._without(rows))
        return Index(self.directory, verify=False)

    def _making_room(self, ids: pa.ChunkedArray, overwrite: bool) -> tuple[Entry, ...]:
        there = self._rows_of(ids)
        if len(there) and not overwrite:
            raise IndexFault(
                f"index: ids must be new, got {self.ids(there[:1])[0]!r} and {len(there) - 1:,} "
                "more that are there; pass --overwrite to replace them"
            )
        return self._without(there)

    def _without(self, rows: np.ndarray) -> tuple[Entry, ...]:
        entries = []
        for entry, start in zip(self.manifest.segments, self._starts, strict=True):
            here = rows[(rows >= start) & (rows < start + entry.rows)] - start
            entries.append(entry.without(here) if len(here) else entry)
        return tuple(entries)

    def _replace(self, entries: tuple[Entry, ...]) -> None:
        later = replace(self.manifest, generation=self.manifest.generation + 1, segments=entries)
        manifest.write(self.directory, later)

    # -- reading -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Items that can be found."""
        return int(self.alive.sum())

    @property
    def dim(self) -> int:
        return self.manifest.dim

    @property
    def model(self) -> Identity:
        return self.manifest.model

    @property
    def about(self) -> Mapping[str, Any]:
        """What its maker noted."""
        return self.manifest.about

    @cached_property
    def table(self) -> pa.Table:
        """`id` and metadata of every row, deleted ones included, mapped; a column that a segment
        lacks is null there."""
        tables = [s.table for s in self.segments]
        if not tables:
            return pa.table({"id": pa.array([], pa.string())})
        return pa.concat_tables(tables, promote_options="permissive")

    @cached_property
    def alive(self) -> np.ndarray:
        """[rows] bool: not deleted."""
        parts = [e.alive() for e in self.manifest.segments]
        return np.concatenate(
            [np.ones(e.rows, bool) if part is None else part
             for e, part in zip(self.manifest.segments, parts, strict=True)] or [np.ones(0, bool)]
        )  # fmt: skip

    @cached_property
    def _starts(self) -> list[int]:
        sizes = [0, *(e.rows for e in self.manifest.segments)]
        return np.cumsum(sizes).tolist()[:-1]

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of some rows."""
        found: list[str] = self.table["id"].take(pa.array(np.asarray(rows, np.int64))).to_pylist()
        return found

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The rows of some ids, in their order; IndexFault for one that is not there."""
        column = pa.array(list(ids), pa.string())
        there = self._rows_of(column)
        known = dict(zip(self.ids(there), there.tolist(), strict=True))
        try:
            return np.array([known[id] for id in column.to_pylist()], np.int64)
        except KeyError as error:
            raise IndexFault(
                f"index: ids must be in the index, got {error.args[0]!r}; see elva index info"
            ) from None

    def embeddings(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """[n, D] in fp32, of rows in any order."""
        wanted = torch.from_numpy(np.asarray(rows, np.int64))
        if not len(wanted):
            return torch.empty(0, self.dim)
        return exact.Stack([s.embeddings for s in self.segments]).take(wanted).float()

    def _rows_of(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Rows, ascending, of those of the ids that are there; only the asked are hashed."""
        values = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
        found = pc.is_in(self.table["id"], value_set=values)
        mask = np.concatenate([np.asarray(c) for c in found.chunks] or [np.zeros(0, bool)])
        return np.flatnonzero(mask & self.alive)

    def search(
        self, query: Tensor, k: int, *, model: Identity | None = None, where: Where | None = None
    ) -> Found:
        """The k most similar items of each query, exactly.

        Args:
            query: [Q, D], any floating dtype; cosines are computed in fp32 with the rows as stored.
            k: at least 1; fewer are found where fewer are there.
            model: what made the query; refused if it is not what made the index.
            where: conditions on the metadata, all of which must hold.

        Returns:
            Found: scores [Q, K] fp32 descending and rows [Q, K] int64; ties by row.

        Raises:
            IndexFault: another model's query, a wrong shape, an unknown field.
        """
        self.check_query(query, k, model)
        parts = [s.embeddings for s in self.segments]
        return exact.search(query.detach().cpu().float(), parts, k, self.allowed(where))

    def check_query(self, query: Tensor, k: int, model: Identity | None) -> None:
        """Refuse what `search` refuses."""
        if model is not None:
            self.check_model(model)
        if query.ndim != 2 or query.shape[1] != self.dim or not query.is_floating_point():
            raise IndexFault(
                f"search: query must be [Q, {self.dim}] of floats, got {tuple(query.shape)} of "
                f"{query.dtype}; embed it with the index's model"
            )
        if k < 1:
            raise IndexFault(f"search: k must be at least 1, got {k}; ask for 10")

    def allowed(self, where: Where | None) -> np.ndarray | None:
        """[rows] bool of what may be found, or None for every row."""
        if not where:
            return None if self.alive.all() else self.alive
        conditions = self.conditions(where)
        numbered = self.table.append_column("#row", pa.array(np.arange(self.table.num_rows)))
        kept = numbered.filter(pq.filters_to_expression(conditions))["#row"].to_numpy()
        mask = np.zeros(self.table.num_rows, bool)
        mask[kept] = True
        return mask & self.alive

    def conditions(self, where: Where | None) -> list[tuple[str, str, Any]]:
        """The conditions with values of their fields' types; IndexFault for one that cannot be."""
        return [self._condition(*condition) for condition in where or ()]

    def _condition(self, name: str, comparison: str, value: Any) -> tuple[str, str, Any]:
        fields = self.table.schema.names
        if name not in fields:
            raise IndexFault(
                f"search: where must name a field, got {name!r}; there are {', '.join(fields)}"
            )
        kind = self.table.schema.field(name).type
        known = ("=", "==", "!=", "<", "<=", ">", ">=", "in")
        if comparison not in known:
            raise IndexFault(
                f"search: where must compare by one of {' '.join(known)}, got {comparison!r}"
            )
        try:
            if comparison == "in":
                return name, comparison, [pa.scalar(v).cast(kind).as_py() for v in value]
            return name, comparison, pa.scalar(value).cast(kind).as_py()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError):
            raise IndexFault(
                f"search: where must give {name} a value of type {kind}, got {value!r}"
            ) from None

    def check_model(self, model: Identity) -> None:
        """Refuse embeddings of another model."""
        if not self.model.matches(model):
            raise IndexFault(
                f"index: model must be the one that made {self.directory}, {self.model.name} "
                f"({self.model.revision[:12]}, {self.model.preprocessing[:12]}), got {model.name} "
                f"({model.revision[:12]}, {model.preprocessing[:12]}); use that or build anew"
            )

    def verify(self) -> None:
        """Read every byte and compare it with its checksum.

        Raises:
            IndexFault: the file and the place that differ.
        """
        for one in self.segments:
            one.verify()

    def info(self) -> dict[str, Any]:
        """What there is to know, as plain data."""
        return {
            "directory": str(self.directory),
            "items": len(self),
            "deleted": int((~self.alive).sum()),
            "dim": self.dim,
            "dtype": self.manifest.dtype,
            "metric": "cosine",
            "model": asdict(self.model),
            "generation": self.manifest.generation,
            "segments": len(self.segments),
            "bytes": sum(s.size for s in self.segments),
            "fields": {f.name: str(f.type) for f in self.table.schema},
        }


# -- pieces ----------------------------------------------------------------------------------------


def _opened(directory: Path) -> tuple[Manifest, list[Segment]]:
    while True:
        found = manifest.read(directory)
        segments = []
        try:
            for entry in found.segments:
                one = Segment(directory / SEGMENTS / entry.file)
                if (one.rows, one.header_sum) != (entry.rows, entry.header):
                    raise segment.damaged(one.path, f"the header that {directory} knows")
                segments.append(one)
        except IndexFault:
            if manifest.read(directory) != found:
                continue  # replaced while it was being opened
            raise
        return found, segments
