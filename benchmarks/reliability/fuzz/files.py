"""The row of files that others wrote, of every kind, changed by chance."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.reliability.fuzz.bounds import came_of, report
from benchmarks.reliability.fuzz.mutate import mutated
from benchmarks.reliability.fuzz.readers import READERS, Reader
from benchmarks.reliability.row import Outcome, Row, Trials
from elva.data.pictures import LIMIT

OFTEN = ("rows", "trec", "recipes", "pictures", "data")
TURNS = (*OFTEN, *OFTEN, *OFTEN, *(name for name in READERS if name not in OFTEN))
"""A number's reader: those that read one file of their own oftener than those that convert."""

PIXELS = "4000000"
"""Of a picture: a header may say any size, and decoding the largest takes a second."""


class Folder:
    """A reader's files as they were written, each of which it reads."""

    def __init__(self, reader: Reader, root: Path) -> None:
        self.reader, self.root = reader, root
        root.mkdir()
        reader.make(root)
        found = {path for pattern in reader.changed for path in root.glob(pattern)}
        self.files = {path: path.read_bytes() for path in sorted(found)}
        for path in self.files:  # and what it imports to do so is there from here on
            reader.read(root, path)

    def change(self, random: Random) -> tuple[Path, bytes]:
        """One of the files, and what is to stand in it."""
        path = random.choice(list(self.files))
        kin = [content for file, content in self.files.items() if file.suffix == path.suffix]
        return path, mutated(self.files[path], kin, random)

    def read(self, path: Path, content: bytes) -> str:
        """What becomes of reading it; see `came_of`. The file is as it was afterwards."""
        path.write_bytes(content)
        try:
            return came_of(lambda: self.reader.read(self.root, path))
        finally:
            path.write_bytes(self.files[path])


@contextmanager
def small_pictures() -> Iterator[None]:
    before = os.environ.get(LIMIT)
    os.environ[LIMIT] = PIXELS
    try:
        yield
    finally:
        os.environ.pop(LIMIT)
        if before is not None:
            os.environ[LIMIT] = before


def trials(wanted: Trials) -> Outcome:
    """Files of every reader, changed."""
    outcome, folders = Outcome(), dict[str, Folder]()
    with tempfile.TemporaryDirectory(prefix="elva-fuzz-") as scratch, small_pictures():
        for number in wanted.numbers:
            name, random = TURNS[number % len(TURNS)], Random(f"{wanted.seed} {number}")
            if name not in folders:
                folders[name] = Folder(READERS[name], Path(scratch) / name)
            path, content = folders[name].change(random)
            outcome.tried += 1
            try:
                outcome.counts[folders[name].read(path, content)] += 1
            except BaseException as error:  # noqa: BLE001  whatever a reader should not raise
                where = f"{name} seed {wanted.seed} number {number} ({path.name})"
                outcome.wrong.append(report(where, error))
    return outcome


def said(kept: Mapping[str, Any]) -> str:
    counts = kept["counts"]
    return f"{counts.get('refused', 0):,} refused in a line, {counts.get('read', 0):,} read"


ROWS = {
    "fuzz-readers": Row(
        title="files of every kind that is read, changed by chance: rows, TREC's, recipes, "
        "pictures, data directories, published sets",
        goal="100,000, each a value or one plain line in 5 s and 1 GiB",
        unit="files",
        amount=100_000,
        smoke=60,
        chunk=250,
        run=trials,
        said=said,
    ),
}
