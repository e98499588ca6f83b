"""Any source as a data directory in M-BEIR's layout: one schema, one loader, one writer.

A reader (`nli`, `mmeb`, `tevatron`, `mteb`, `folder`) gives queries with their answers as it finds
them; `convert` gives them numbers, finds their task, and writes. What a source called an item
stays in `src_content`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elva.checkpoint import write_directory
from elva.data import extras, mbeir
from elva.data.schema import TASKS, DataError, Item, normalise
from elva.data.strict import Faults

MAX_QUERIES, MAX_CANDIDATES = 500_000, 10_000_000
"""M-BEIR's ids a dataset."""

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


@dataclass(frozen=True)
class Entry:
    """A query or candidate as its source has it.

    Args:
        id: The source's own, or None where it has none: then equal content is one candidate.
        image: A file or encoded bytes.
        extra: Further fields, kept in `src_content`.
        where: `file:line`.
    """

    text: str | None
    image: Path | bytes | None
    where: str
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """A hash of text and picture."""
        item = Item("", normalise(self.text or ""), self.image, "", where=self.where)
        return item.content_hash().hex()

    @property
    def modality(self) -> str:
        """`text`, `image` or `image,text`; DataError for nothing at all."""
        has_text = bool(normalise(self.text or ""))
        if self.image is None and not has_text:
            raise DataError(f"{self.where}: has neither text nor picture")
        return ",".join(m for m, there in (("image", self.image), ("text", has_text)) if there)


@dataclass(frozen=True)
class Example:
    """A query with its answers.

    Args:
        candidates: What it is to be ranked against, where that is not the whole pool.
    """

    query: Entry
    positives: Sequence[Entry]
    negatives: Sequence[Entry] = ()
    candidates: Sequence[Entry] = ()


@dataclass(frozen=True)
class Source:
    """What a reader gives.

    Args:
        name: Of the dataset, for file names.
        number: M-BEIR's number of it; ours are above 10.
        instruction: What to look for; empty where the queries say it themselves.
        candidates: Of the pool, beyond the answers.
    """

    name: str
    number: int
    instruction: str
    examples: Iterable[Example]
    candidates: Iterable[Entry] = ()


def convert(
    source: Source, output: Path, *, split: str = "train", faults: Faults | None = None
) -> dict[str, Any]:
    """Write a source as a data directory that `elva.data.load` reads.

    Args:
        output: An absent or empty directory; it appears whole or not at all.
        faults: Rows that may be left out, and in which they are listed.

    Returns:
        Counts: queries by task, candidates, pictures, and the bad rows.

    Raises:
        DataError: a row that is not as its format has it, as `file:line: rule`.
    """
    if split not in mbeir.SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(mbeir.SPLITS)}")
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output}: must be empty; choose another directory")
    faults = faults or Faults()
    counts: dict[str, Any] = {}

    def fill(partial: Path) -> None:
        writer = _Writer(source, partial, split)
        for example in source.examples:
            with faults.row():
                writer.add(example)
        for candidate in source.candidates:
            with faults.row():
                writer.candidate(candidate)
        counts.update(writer.finish())

    if output.exists():
        output.rmdir()
    write_directory(output, fill)
    return {**counts, "bad": list(faults.found)}


class _Writer:
    """Numbers what it is given, copies pictures, and groups queries by task."""

    def __init__(self, source: Source, root: Path, split: str) -> None:
        self.source, self.root, self.split = source, root, split
        self.queries: dict[str, list[dict[str, Any]]] = {}
        self.pools: dict[str, list[dict[str, Any]]] = {}
        self.dids: dict[tuple[str, str], str] = {}
        self.restricted: dict[str, list[str]] = {}
        self.pictures: dict[bytes, str] = {}
        self.asked: set[str] = set()
        self.count = 0

    def add(self, example: Example) -> None:
        """One query; nothing of it is kept if any part of it is bad."""
        query = example.query
        if not example.positives:
            raise DataError(f"{query.where}: has no right answer")
        if query.id is not None and query.id in self.asked:
            raise DataError(f"{query.where}: query {query.id} again")
        modality = query.modality
        found = {entry.modality for entry in example.positives}
        if len(found) > 1:
            raise DataError(f"{query.where}: answers of several kinds, {' and '.join(found)}")
        task = _task(query.where, modality, found.pop())
        if self.count >= MAX_QUERIES:
            raise DataError(f"{query.where}: more than {MAX_QUERIES:,} queries; split the source")
        image = self._picture(query)
        lists = [example.positives, example.negatives, example.candidates]
        positives, negatives, candidates = ([self.candidate(e) for e in some] for some in lists)
        self.count += 1
        qid = f"{self.source.number}:{self.count}"
        if query.id is not None:
            self.asked.add(query.id)
        if candidates:
            self.restricted[qid] = list(dict.fromkeys(candidates))
        self.queries.setdefault(task, []).append(
            {
                "qid": qid,
                "query_txt": query.text if "text" in modality else None,
                "query_img_path": image,
                "query_modality": modality,
                "query_src_content": _extra(query),
                "pos_cand_list": list(dict.fromkeys(positives)),
                "neg_cand_list": [n for n in dict.fromkeys(negatives) if n not in positives],
                "task_id": TASKS[task],
            }
        )

    def candidate(self, entry: Entry) -> str:
        """The did of a candidate; equal ones of a source without ids are one."""
        modality = entry.modality
        key = (modality, f"id {entry.id}" if entry.id is not None else entry.content)
        if key in self.dids:
            return self.dids[key]
        if len(self.dids) >= MAX_CANDIDATES:
            raise DataError(f"{entry.where}: more than {MAX_CANDIDATES:,} candidates")
        image = self._picture(entry)
        did = self.dids[key] = f"{self.source.number}:{len(self.dids) + 1}"
        self.pools.setdefault(modality, []).append(
            {
                "txt": entry.text if "text" in modality else None,
                "img_path": image,
                "modality": modality,
                "did": did,
                "src_content": _extra(entry),
            }
        )
        return did

    def finish(self) -> dict[str, Any]:
        """Write all that was given."""
        if not self.queries:
            raise DataError(f"{self.source.name}: no query that can be read")
        prompts = {}
        for task, rows in self.queries.items():
            stem = mbeir.file_stem(self.source.name, task)
            asked, shown = mbeir.modalities(task)
            prompts[asked, shown] = [self.source.instruction]
            mbeir.write_pool(self.root, stem, self.pools[shown])
            mbeir.write_queries(self.root, stem, self.split, rows)
        mbeir.write_instructions(self.root, self.source.name, self.source.number, prompts)
        if self.restricted:
            extras.write_extras(self.root, {}, {}, self.restricted)
        return {
            "queries": {task: len(rows) for task, rows in self.queries.items()},
            "candidates": len(self.dids),
            "pictures": len(self.pictures),
        }

    def _picture(self, entry: Entry) -> str | None:
        """Check a picture by its header and put it into the directory once."""
        if entry.image is None:
            return None
        kind = Item("", None, entry.image, "image", where=entry.where).image_format()
        content = entry.image if isinstance(entry.image, bytes) else entry.image.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self.pictures:
            number = len(self.pictures)
            folder = Path("mbeir_images") / f"{self.source.name}_images" / f"{number // 1000:04d}"
            place = folder / f"{number:07d}{SUFFIXES[kind]}"
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            _put(entry.image, content, self.root / place)
            self.pictures[digest] = str(place)
        return self.pictures[digest]


def _put(image: Path | bytes, content: bytes, place: Path) -> None:
    if isinstance(image, Path):
        try:
            os.link(image.resolve(), place)
            return
        except OSError:  # another file system, or one without links
            shutil.copyfile(image, place)
            return
    place.write_bytes(content)


def _task(where: str, query: str, candidate: str) -> str:
    for task in TASKS:
        if mbeir.modalities(task) == (query, candidate):
            return task
    raise DataError(f"{where}: {query} to {candidate} is no task of M-BEIR")


def _extra(entry: Entry) -> str | None:
    fields = {**({"id": entry.id} if entry.id is not None else {}), **entry.extra}
    return json.dumps(fields, ensure_ascii=False) if fields else None
