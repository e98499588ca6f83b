"""A mutant: one change of a source's text, and the sample of all of them that trials are of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` at characters `start` to `end` of `file` becomes `new`."""

    file: str
    start: int
    end: int
    old: str
    new: str
    line: int
    of: str  # the line's text

    @property
    def change(self) -> str:
        return f"{_short(self.old)} -> {_short(self.new)}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it though lines move: file, line's text, change."""
        return self.file, self.of, self.change

    def applied(self, text: str) -> str:
        assert text[self.start : self.end] == self.old
        return text[: self.start] + self.new + text[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.change} in `{self.of}`"


def at(file: str, text: str, start: int, end: int, new: str) -> Mutant:
    """The mutant that has `new` in the place of a piece of the text."""
    line = text.count("\n", 0, start)
    return Mutant(
        file, start, end, text[start:end], new, line + 1, text.split("\n", line + 1)[line].strip()
    )


def shuffled(mutants: Iterable[Mutant], seed: int) -> list[Mutant]:
    """All in the order in which trials are of them: by a hash of what names each, so that a change
    of the sources moves few of the others."""

    def drawn(mutant: Mutant) -> bytes:
        return hashlib.sha256(repr((seed, mutant.key)).encode()).digest()

    return sorted(sorted(set(mutants)), key=drawn)


def read(root: Path, file: str) -> str:
    return (root / file).read_text(encoding="utf-8")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
