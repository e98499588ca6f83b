"""A small index of pictures and texts, and a process that reaches no other machine."""

import socket
from pathlib import Path
from typing import Any

import pytest

from elva.data import Item
from elva.index import Index
from elva.search import Searcher
from tests.elva import sentence_models
from tests.elva.sentence_models import noise

TEXTS = ("A cat.", "A dog on a beach.", "Ice cream.", "A flag.")
PICTURES = 5


def offline(patch: pytest.MonkeyPatch) -> None:
    """Any connection that is begun, and any name that is looked up, fails the test."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("another machine was asked")

    patch.setattr(socket.socket, "connect", refused)
    patch.setattr(socket, "getaddrinfo", refused)


def picture(root: Path, number: int) -> Path:
    return root / f"{number}.png"


def build(root: Path) -> tuple[Searcher, Index]:
    """Four texts, then five pictures, each with a year, a score of its own and, of the pictures, a
    name; by a CLIP of random weights."""
    items = [Item(f"1:{i}", text, None, "text") for i, text in enumerate(TEXTS)]
    for number in range(PICTURES):
        noise(number).save(picture(root, number))
        items.append(Item(f"2:{number}", None, picture(root, number), "image"))
    searcher = Searcher(sentence_models.clip(root))
    index = searcher.index(
        root / "shelf.index",
        items,
        names={f"2:{i}": f"Picture {i}" for i in range(PICTURES)},
        metadata={"year": [*range(1990, 1999)], "score": ["high"] * len(items)},
    )
    return searcher, index
