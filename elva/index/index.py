"""The index as a whole: open, add, delete, search, verify."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from elva.errors import IndexFault
from elva.index import change, exact, manifest
from elva.index import query as asked
from elva.index.about import facts
from elva.index.codes import SegmentCodes
from elva.index.exact import Found
from elva.index.manifest import Entry, Manifest
from elva.index.opening import has_codes, opened, part
from elva.index.segment import DTYPES, Dtype, Segment
from elva.index.where import Condition, Where, checked, held
from elva.model.identity import Identity
from elva.progress import SILENT, Reporter


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
        self.manifest, self.segments, self.codes = opened(self.directory)
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
        codes: bool = True,
        reporter: Reporter = SILENT,
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
            codes: keep 8-bit codes of the rows beside them, by which they are searched.

        Raises:
            IndexFault: an index is there, an id comes twice, an embedding is not finite.
            OSError: the disk is full or not writable; an index that was there is as it was.
        """
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise IndexFault(f"index: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        chunks = [embeddings] if isinstance(embeddings, Tensor) else iter(embeddings)
        first, chunks = change.peek(chunks)
        kept = cast(Dtype, dtype)
        empty = Manifest(0, first.shape[-1], kept, model, about=dict(about or {}))
        table = change.table_of(ids, columns)
        with change.building(Path(directory), empty, overwrite) as base:
            entry = change.written(Path(directory), chunks, table, base, codes, reporter)
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
        codes: bool = True,
        reporter: Reporter = SILENT,
    ) -> Index:
        """Make an index of segments that are there, as `elva embed` writes them: linked where the
        file system can, else copied; their checksums are compared either way."""
        opened = [Segment(path) for path in segments]
        if not opened:
            raise IndexFault("index: embeddings must hold a segment, got none; run elva embed")
        first = opened[0]
        empty = Manifest(0, first.dim, first.dtype, first.model, about=dict(about or {}))
        change.check_place(Path(directory), overwrite)  # before all of it is read
        change.check_parts(opened, empty, Path(directory), reporter)
        with change.building(Path(directory), empty, overwrite) as base:
            entries = change.linked(Path(directory), opened, codes, reporter)
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
        table = change.table_of(ids, columns)
        with self._changing() as now:
            now.check_model(model)
            entries = now._making_room(table["id"], overwrite)
            now._check_fields(entries, [table])
            chunks = [embeddings] if isinstance(embeddings, Tensor) else embeddings
            entry = change.written(self.directory, chunks, table, now.manifest, now.is_coded)
            return now._replaced((*entries, entry))

    def add_segments(
        self, segments: Sequence[Path], *, overwrite: bool = False, reporter: Reporter = SILENT
    ) -> Index:
        """The index with segments of `elva embed` added."""
        opened = [Segment(path) for path in segments]
        ids = change.check_parts(opened, self.manifest, self.directory, reporter)
        with self._changing() as now:
            for one in opened:
                change.check_fits(one, now.manifest)  # another index may lie there by now
            entries = now._making_room(ids, overwrite)
            now._check_fields(entries, [one.table for one in opened])
            more = change.linked(self.directory, opened, now.is_coded, reporter)
            return now._replaced((*entries, *more))

    def delete(self, ids: Sequence[str]) -> Index:
        """The index without these items; their bytes stay until it is compacted.

        Raises:
            IndexFault: an id is not there.
        """
        with self._changing() as now:
            return now._replaced(now._without(now.rows(ids)))

    @classmethod
    def with_codes(cls, directory: str | Path, reporter: Reporter = SILENT) -> Index:
        """The index with 8-bit codes beside all rows; those that are there and whole stay."""
        with manifest.writing(Path(directory)):
            before = manifest.read(Path(directory))
            if before.dim > change.MOST_CODED:
                raise IndexFault(
                    f"{directory}: must have at most {change.MOST_CODED:,} columns for codes, got "
                    f"{before.dim:,}; it is searched without them"
                )
            parts = [part(Path(directory), before, entry) for entry in before.segments]
            reporter.start(f"{directory}: code rows", sum(one.rows for one in parts), "rows")
            entries, done = [], 0
            for entry, one in zip(before.segments, parts, strict=True):
                if not has_codes(Path(directory), entry, one):
                    one.verify()  # the codes of damaged rows would prove wrong answers
                    made = change.entry_of(one, True, reporter, done)
                    entry = replace(entry, codes=made.codes)
                entries.append(entry)
                done += one.rows
                reporter.advance(done)
            if tuple(entries) != before.segments:
                later = replace(before, generation=before.generation + 1, segments=tuple(entries))
                manifest.write(Path(directory), later)
            reporter.finish("")
            return cls(directory, verify=False)

    @contextmanager
    def _changing(self) -> Iterator[Index]:
        """The index as it is now, while nobody else changes it."""
        with manifest.writing(self.directory):
            yield Index(self.directory, verify=False)

    def _making_room(self, ids: pa.ChunkedArray, overwrite: bool) -> tuple[Entry, ...]:
        there = self._rows_of(ids)
        if len(there) and not overwrite:
            raise IndexFault(
                f"index: ids must be new, got {self.ids(there[:1])[0]!r} and {len(there) - 1:,} "
                "more that are there; pass --overwrite to replace them"
            )
        return self._without(there)

    def _without(self, rows: np.ndarray) -> tuple[Entry, ...]:
        """The entries with these rows deleted; one without any other row is none any more."""
        entries = []
        for entry, start in zip(self.manifest.segments, self._starts, strict=True):
            here = rows[(rows >= start) & (rows < start + entry.rows)] - start
            left = entry.without(here) if len(here) else entry
            alive = left.alive()
            if alive is None or alive.any():
                entries.append(left)
        return tuple(entries)

    def _check_fields(self, entries: Sequence[Entry], more: Sequence[pa.Table]) -> None:
        """Refuse further items whose fields have other types than those of the rest."""
        kept = {entry.file for entry in entries}
        here = [s.table for s in self.segments if s.path.name in kept]
        change.check_fields([*change.in_use(here, entries), *more])

    def _replaced(self, entries: tuple[Entry, ...]) -> Index:
        later = replace(self.manifest, generation=self.manifest.generation + 1, segments=entries)
        manifest.write(self.directory, later)
        return Index(self.directory, verify=False)

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
        lacks is null there, and one whose types differ (`conflicts`) is left out."""
        if not self.segments:
            return pa.table({"id": pa.array([], pa.string())})
        return change.merged(self._tables)

    @cached_property
    def conflicts(self) -> dict[str, str]:
        """field -> its types, of fields that differ from segment to segment. No change makes such
        an index, older versions did; it is mended by deleting the items of all types but one."""
        return change.conflicts(self._tables)

    @cached_property
    def _tables(self) -> list[pa.Table]:
        return change.in_use([s.table for s in self.segments], self.manifest.segments)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what can be found: which segments, byte for byte, and which of their rows."""
        parts = [(entry.header, entry.deleted) for entry in self.manifest.segments]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def files(self) -> list[Segment | SegmentCodes]:
        """All that is mapped: segments, then codes."""
        return [*self.segments, *(one for one in self.codes if one is not None)]

    @property
    def is_coded(self) -> bool:
        """Whether all rows have codes beside them."""
        return all(one is not None for one in self.codes)

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
        try:
            column = pa.array(list(ids), pa.string())
            there = self._rows_of(column)
            known = dict(zip(self.ids(there), there.tolist(), strict=True))
            return np.array([known[id] for id in column.to_pylist()], np.int64)
        except (KeyError, UnicodeEncodeError) as error:  # no id has bytes that are no text
            asked = error.object if isinstance(error, UnicodeEncodeError) else error.args[0]
            raise IndexFault(
                f"index: ids must be in the index, got {asked!r}; see elva index info"
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
        query, k = self.check_query(query, k, model)
        parts = [s.embeddings for s in self.segments]
        codes = [one.codes for one in self.codes if one is not None] if self.is_coded else None
        return exact.search(query, parts, k, self.allowed(where), codes=codes)

    def check_query(self, query: Tensor, k: int, model: Identity | None) -> tuple[Tensor, int]:
        """The query as [Q, D] fp32 on the CPU, and k; IndexFault for what `search` refuses."""
        if model is not None:
            self.check_model(model)
        return asked.checked(query, k, self.dim)

    def allowed(self, where: Where | None) -> np.ndarray | None:
        """[rows] bool of what may be found, or None for every row."""
        if not where:
            return None if self.alive.all() else self.alive
        return self.alive & held(self.table, self.conditions(where))

    def conditions(self, where: Where | None) -> list[Condition]:
        """The conditions with values of their fields' types; IndexFault for one that cannot be."""
        return checked(where, self.table.schema, self.conflicts)

    def check_model(self, model: Identity) -> None:
        """Refuse embeddings of another model."""
        if not self.model.matches(model):
            raise IndexFault(
                f"index: model must be the one that made {self.directory}, {self.model.name} "
                f"({self.model.revision[:12]}, {self.model.preprocessing[:12]}), got {model.name} "
                f"({model.revision[:12]}, {model.preprocessing[:12]}); use that or build anew"
            )

    def verify(self, reporter: Reporter = SILENT) -> None:
        """Read every byte and compare it with its checksum.

        Raises:
            IndexFault: the file and the place that differ.
        """
        change.verify(self.directory, self.files, reporter)

    def info(self) -> dict[str, Any]:
        """What there is to know, as plain data."""
        return facts(self)
