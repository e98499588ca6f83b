"""Which candidates are one answer under several ids: a number for each row's content.

A number is kept once it is known: beside a mapped table in a file that several processes fill, else
in memory. It stays until the pool's file changes, even where a picture is replaced under its name.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from elva.data.schema import Item

DECODERS = min(8, os.cpu_count() or 1)
"""Ours: threads that decode pictures; Pillow does so without Python's lock."""


class Identities:
    """Numbers of a pool's rows, 0 where one is not known yet.

    Args:
        rows: How many there are.
        place: A file to keep them in; None for memory.
    """

    def __init__(self, rows: int, place: Path | None) -> None:
        self._numbers = np.zeros(rows, np.int64) if place is None or not rows else _mapped(
            place, rows
        )  # fmt: skip

    def of(self, rows: np.ndarray, items: Callable[[Sequence[int]], list[Item]]) -> np.ndarray:
        """[n] int64 of some rows.

        Args:
            items: The items of rows whose number is not known yet.

        Raises:
            DataError: a picture among them that cannot be read.
        """
        numbers = np.asarray(self._numbers[rows])
        unknown = np.unique(rows[numbers == 0])
        if not len(unknown):
            return numbers
        for start in range(0, len(unknown), 1024):
            some = unknown[start : start + 1024]
            # Eight bytes are stored at once: another process sees 0 or the number.
            self._numbers[some] = _numbers(items(some.tolist()))
        return np.asarray(self._numbers[rows])


def _numbers(items: Sequence[Item]) -> np.ndarray:
    if all(item.image is None for item in items):
        hashes = [item.content_hash() for item in items]
    else:
        with ThreadPoolExecutor(DECODERS) as pool:
            hashes = list(pool.map(Item.content_hash, items))
    numbers = np.frombuffer(b"".join(digest[:8] for digest in hashes), np.int64)
    return np.where(numbers == 0, 1, numbers)


def _mapped(place: Path, rows: int) -> np.ndarray:
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, 8 * rows)  # grows with zeros, or leaves it as it is
    finally:
        os.close(descriptor)
    return np.memmap(place, np.int64, "r+", shape=(rows,))
