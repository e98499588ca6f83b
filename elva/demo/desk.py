"""What the page asks for, without the page: a query's answers, the ranks that move when a grain is
off, and a visitor's own pictures."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elva.collection import Collection
from elva.data import Item, pictures
from elva.data.schema import normalise
from elva.demo.switches import Known, Switches, switches
from elva.errors import PictureFault, UserError, printable
from elva.evaluation.grains import distance
from elva.index import Index
from elva.search import Answer, Hit, Searcher

DEPTH = 1000
"""Ours: ranks are known down to here; what lies deeper is said to."""

MOST_PICTURES, MOST_MB = 200, 20
"""Ours: pictures of one visitor, and megabytes of one of them; its pixels are bounded as everywhere
(`elva.data.pictures`)."""


@dataclass(frozen=True)
class Asked:
    """A query that was answered: all its grains on."""

    image: Path | None
    own: bool  # asked of the visitor's own pictures
    switches: Switches
    answer: Answer


@dataclass(frozen=True)
class Move:
    """One of the first answers, before and after grains were switched off."""

    hit: Hit
    now: Hit | None  # None: deeper than `DEPTH`


@dataclass(frozen=True)
class Moved:
    """The same query with some grains off."""

    text: str  # what is left of it
    answer: Answer
    moves: list[Move]  # of the first answers with all grains on, in their order
    distance: float  # cosine distance of the two embeddings, in [0, 2]


@dataclass
class Scratch:
    """A visitor's own pictures, and the index of them once there are any; they go with it."""

    directory: Path
    index: Index | None = None
    count: int = 0
    lines: list[str] = field(default_factory=list)  # what was left out, and why

    def __post_init__(self) -> None:
        self._removed = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)

    def remove(self) -> None:
        self._removed()


class Desk:
    """A model and what it searches, asked by one visitor at a time.

    Args:
        known: grains that the data names, of `known_grains`.
        place: a directory for visitors' pictures, which the caller removes.
        k: answers that are shown.
    """

    def __init__(self, collection: Collection, known: Known, place: Path, *, k: int = 12) -> None:
        self.searcher: Searcher = collection.searcher
        self.index: Index = collection.index
        self.known, self.place, self.k = known, place, k
        self._busy = threading.Lock()  # a model answers one at a time

    @property
    def modalities(self) -> frozenset[str]:
        return self.searcher.encoder.modalities

    def ask(self, words: str, image: Path | None, scratch: Scratch | None = None) -> Asked:
        """The answers to words, a picture or both.

        Args:
            scratch: search these pictures; what the page was started with for None.

        Raises:
            UserError: a query that cannot be answered, in one line.
        """
        if image is not None:
            _check_upload(image)
        answer = self._answer(" ".join(words.split()), image, scratch)  # refuses a long text
        found = switches(words, self.known) if normalise(words) else Switches("", (), "words")
        return Asked(image, scratch is not None, found, answer)

    def without(self, asked: Asked, off: Sequence[int], scratch: Scratch | None = None) -> Moved:
        """The same query with the grains at these places off.

        Raises:
            UserError: nothing is left to ask.
        """
        text = asked.switches.without(off)
        if not text and asked.image is None:
            raise UserError("demo: a grain must be left on, got none; switch one on again")
        answer = self._answer(text, asked.image, scratch)
        now = {hit.id: hit for hit in answer.hits}
        first = asked.answer.hits[: self.k]
        apart = distance(asked.answer.embedding, answer.embedding).item()
        moves = [Move(hit, now.get(hit.id)) for hit in first]
        return Moved(text, answer, moves, max(0.0, apart))

    def scratch(self) -> Scratch:
        """A place for a visitor's pictures."""
        return Scratch(Path(tempfile.mkdtemp(prefix="own-", dir=self.place)))

    def add(self, scratch: Scratch, files: Sequence[Path]) -> None:
        """Put pictures into a visitor's own index; `scratch.lines` says which were left out.

        Raises:
            UserError: more than a visitor may have, or a model that reads no pictures.
        """
        if scratch.count + len(files) > MOST_PICTURES:
            raise UserError(
                f"demo: pictures must be at most {MOST_PICTURES} together, got "
                f"{scratch.count + len(files)}; drop fewer"
            )
        items: list[Item] = []
        names: dict[str, str] = {}
        scratch.lines = []
        for file in files:
            try:
                _check_upload(file)
            except UserError as error:
                scratch.lines.append(str(error).removeprefix("demo: "))
                continue
            number = f"{scratch.count + len(items):04d}"
            kept = scratch.directory / f"{number}{file.suffix[:8]}"
            kept.hardlink_to(file)  # no copy: a disk would be full of one upload, dropped again
            items.append(Item(number, None, kept, "image", where=printable(file.name)))
            names[number] = file.name
        if items:
            with self._busy:
                self._grow(scratch, items, names)

    def _grow(self, scratch: Scratch, items: list[Item], names: dict[str, str]) -> None:
        place = scratch.directory / f"{items[0].id}.index"
        made = self.searcher.index(
            place, items, dtype="float32", names=names,
            about={"instructions": dict(self.index.about.get("instructions", {}))},
        )  # fmt: skip
        if scratch.index is None:
            scratch.index = made
        else:
            (segment,) = made.segments
            scratch.index = scratch.index.add_segments([segment.path])
            shutil.rmtree(place)
        scratch.count += len(items)

    def _answer(self, text: str, image: Path | None, scratch: Scratch | None) -> Answer:
        index = self.index if scratch is None else scratch.index
        if index is None:
            raise UserError("demo: pictures must be dropped first, got none; drop some")
        with self._busy:
            return self.searcher.answer(index, text, image=image, k=max(DEPTH, self.k))


def _check_upload(file: Path) -> None:
    """Refuse what no visitor may send.

    Raises:
        UserError: it is too large, or no picture.
    """
    name = printable(file.name)
    try:
        size = file.stat().st_size
        if size > MOST_MB * 2**20:
            raise UserError(
                f"demo: {name} must have at most {MOST_MB} MB, got {size / 2**20:.0f}; shrink it"
            )
        pictures.load(file)
    except FileNotFoundError:
        raise UserError(f"demo: {name} must still be there, got none; drop it again") from None
    except PictureFault as fault:
        raise UserError(f"demo: {name} must be a picture that is read, got: {fault}") from None
