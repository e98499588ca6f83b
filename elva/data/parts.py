"""A source's queries with the content of their answers, in parts: for whoever streams it.

Nothing is converted first, and every row comes of the reader of its format. What is opened stays
out of a pickle: a worker that is handed a source opens the files itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from elva.data.formats import folder, mmeb, nli
from elva.data.formats.source import Entry, Example, Request, Source
from elva.data.mbeir import load
from elva.data.pool import Dataset, Pool
from elva.data.schema import Item, Query, modalities, normalise, task_between
from elva.errors import DataError, UserError

FORMATS = ("mbeir", "mmeb", "mmeb-test", "nli", "folder")

_PART_ROWS = 1000
"""Ours: so few rows that parts in a drawn order mix a file of several sets, and rows that were seen
are passed over in a moment."""

Part = tuple[int, int] | str
"""Rows [start, stop), or a file."""


class Row(NamedTuple):
    """A query with the content of its answers."""

    query: Query
    positives: Sequence[Item]
    negatives: Sequence[Item]


class Parts(Protocol):
    """A source in parts."""

    def parts(self, count: int | None) -> Sequence[Part]:
        """`count` parts in the order of reading; of about 1,000 rows, or a file, for None."""

    def rows(self, part: Any) -> Iterator[Any]:
        """The rows of one part, in order."""


class _Lazy:
    """What is opened where it is read: a worker that is handed it opens the files itself."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Directory(_Lazy):
    """The queries of a data directory."""

    root: Path
    split: str
    tasks: tuple[str, ...] | None

    @cached_property
    def data(self) -> Dataset:
        return load(self.root, tasks=self.tasks, split=self.split)

    def task(self) -> str:
        """The task of all queries."""
        found = [*self.data.queries.tasks()]
        if len(found) > 1:
            raise UserError(
                f"datasets: pairs must be of one task, got {', '.join(found)}; pass one as tasks, "
                "or take examples"
            )
        return found[0]

    def parts(self, count: int | None) -> Sequence[Part]:
        return _spans(len(self.data.queries), count)

    def rows(self, part: tuple[int, int]) -> Iterator[Row]:
        for query in self.data.queries[slice(*part)]:
            pool = self.data.pool(query.task)
            positives, negatives = (
                [pool[pool.row(id)] for id in ids] for ids in (query.positives, query.negatives)
            )
            yield Row(query, positives, negatives)


@dataclass(frozen=True)
class Candidates(_Lazy):
    """The candidates of the task of a data directory."""

    of: Directory

    @property
    def pool(self) -> Pool:
        return self.of.data.pool(self.of.task())

    def parts(self, count: int | None) -> Sequence[Part]:
        return _spans(len(self.pool), count)

    def rows(self, part: tuple[int, int]) -> Iterator[Item]:
        pool = self.pool
        return (pool[row] for row in range(*part))


@dataclass(frozen=True)
class Files(_Lazy):
    """The examples of files, each of which is a part."""

    read: Callable[[Request], Source]
    files: tuple[str, ...]
    split: str
    images: Path | None

    def task(self) -> str:
        """The task of the first query."""
        return next(self.rows(self.files[0])).query.task

    def parts(self, count: int | None) -> Sequence[Part]:
        if count is not None:
            raise UserError(
                f"datasets: num_shards must be left out of files, which are shards, got {count}"
            )
        return self.files

    def rows(self, part: str) -> Iterator[Row]:
        found = self.read(Request(Path(part), self.split, self.images))
        return (_row(found, example) for example in found.examples)


@dataclass(frozen=True)
class Folder(_Lazy):
    """A folder of pictures, whose names and captions are held, and no picture."""

    root: Path

    @cached_property
    def found(self) -> tuple[Source, list[Example]]:
        source = folder.headers(Request(self.root))
        return source, [*source.examples]

    def task(self) -> str:
        """The task of all queries."""
        return next(self.rows((0, 1))).query.task

    def parts(self, count: int | None) -> Sequence[Part]:
        return _spans(len(self.found[1]), count)

    def rows(self, part: tuple[int, int]) -> Iterator[Row]:
        source, found = self.found
        return (_row(source, example) for example in found[slice(*part)])


def open_source(
    source: str | Path,
    format: str,
    split: str,
    tasks: Sequence[str] | None,
    images: str | Path | None,
) -> Directory | Files | Folder:
    """A source, of which nothing is opened yet but what tells its parts.

    Args:
        format: one of `FORMATS`.
        tasks: of a data directory, as `load` takes them.
        images: where MMEB's paths of pictures start; the reader's rule for None.

    Raises:
        UserError: an argument that does not fit the others.
        DataError: no file of the format there.
    """
    path = Path(source).absolute()  # a worker may stand elsewhere
    if format not in FORMATS:
        raise UserError(
            f"datasets: format must be one of {', '.join(FORMATS)}, got {format!r}; elva data "
            "convert makes mbeir of others"
        )
    if not path.exists():
        raise UserError(f"datasets: source must be a file or folder, got {source}; pass another")
    for name, given, takes in (
        ("tasks", tasks, ("mbeir",)), ("images", images, ("mmeb", "mmeb-test"))
    ):  # fmt: skip
        if given is not None and format not in takes:
            raise UserError(f"datasets: {name} must be left out of format {format!r}, got {given}")
    if isinstance(tasks, str):
        raise UserError(f"datasets: tasks must be a list of tasks, got {tasks!r}; pass [{tasks!r}]")
    if format == "mbeir":
        return Directory(path, split, None if tasks is None else tuple(tasks))
    if format == "folder":
        return Folder(path)
    where = None if images is None else Path(images).absolute()
    if format == "nli":
        return Files(nli.read, (str(path),), split, where)
    test = format == "mmeb-test"
    found = mmeb.files(path, "test" if test else "original")
    return Files(mmeb.read_test if test else mmeb.read, tuple(map(str, found)), split, where)


def _row(source: Source, example: Example) -> Row:
    """An example as a data directory made of it would give it back, but for its ids. The other
    candidates of a test row are its negatives."""
    answers = [_answer(one) for one in example.positives]  # type: ignore[arg-type]
    right = {id(one) for one in example.positives}
    others = example.negatives or [one for one in example.candidates if id(one) not in right]
    negatives = [_answer(one) for one in others]  # type: ignore[arg-type]
    asked = _answer(example.query)
    task = task_between(asked.modality, answers[0].modality)
    query = Query(
        asked.id or example.query.where, asked.text, asked.image, asked.modality,
        instruction=source.prompts.get(modalities(task), source.instruction), task=task,
        positives=tuple(one.id for one in answers), raw_text=example.query.text,
        where=example.query.where,
    )  # fmt: skip
    return Row(query, answers, negatives)


def _answer(entry: Entry) -> Item:
    text = normalise(entry.text or "") or None
    kinds = (("image", entry.image), ("text", text))
    modality = ",".join(kind for kind, there in kinds if there is not None)
    if not modality:
        raise DataError(f"{entry.where}: has neither text nor picture")
    return Item(entry.name or entry.id or "", text, entry.image, modality, where=entry.where)


def _spans(total: int, count: int | None) -> list[Part]:
    """[start, stop) of parts that differ by one row at most."""
    if count is not None and count < 1:
        raise UserError(f"datasets: num_shards must be at least 1, got {count}; pass 1 or more")
    wanted = max(1, min(total, ceil(total / _PART_ROWS) if count is None else count))
    edges = np.linspace(0, total, wanted + 1).astype(int).tolist()
    return [*pairwise(edges)]
