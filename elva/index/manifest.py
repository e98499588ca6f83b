"""`index.json`: the one file whose replacement is the change of an index."""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elva.errors import IndexFault
from elva.files import write_text
from elva.index.segment import DTYPES, damaged
from elva.model.identity import Identity

FILE, SEGMENTS, LOCK = "index.json", "segments", ".lock"
FORMAT, VERSION = "elva-index", 1


@dataclass(frozen=True)
class Entry:
    """One segment of an index.

    Args:
        file: its name under `segments/`.
        header: the SHA-256 of its header, so that no other file passes for it.
        deleted: which rows are, as packed bits, compressed; empty for none.
    """

    file: str
    rows: int
    header: str
    deleted: str = ""

    def alive(self) -> np.ndarray | None:
        """[rows] bool, or None where nothing is deleted."""
        if not self.deleted:
            return None
        bits = zlib.decompress(base64.b64decode(self.deleted, validate=True))
        return ~np.unpackbits(np.frombuffer(bits, np.uint8), count=self.rows).astype(bool)

    def without(self, rows: np.ndarray) -> Entry:
        """The entry with these rows deleted too."""
        alive = self.alive()
        gone = np.zeros(self.rows, bool) if alive is None else ~alive
        gone[rows] = True
        bits = base64.b64encode(zlib.compress(np.packbits(gone).tobytes())).decode()
        return Entry(self.file, self.rows, self.header, bits)


@dataclass(frozen=True)
class Manifest:
    """What an index is at one moment.

    Args:
        about: what its maker wants to find again: how to ask the model, where the data lies.
    """

    generation: int
    dim: int
    dtype: str
    model: Identity
    segments: tuple[Entry, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def read(directory: Path) -> Manifest:
    """The index's manifest.

    Raises:
        IndexFault: there is none, or any byte of it has changed.
    """
    path = directory / FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise IndexFault(
            f"{directory}: must be an index, got no {FILE}; make one with elva index build"
        ) from None
    body, _, digest = content.partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise damaged(path, "the checksum in its last line")
    data = json.loads(body)
    if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise IndexFault(
            f"{path}: must be of version {VERSION}, got {data.get('version')!r}; "
            "use the elva that wrote it or build the index again"
        )
    try:
        entries = tuple(Entry(**entry) for entry in data["segments"])
        for entry in entries:
            if Path(entry.file).name != entry.file or entry.rows < 0:
                raise ValueError(entry.file)
            entry.alive()
        if data["dtype"] not in DTYPES:
            raise ValueError(data["dtype"])
        model = Identity(**data["model"])
        about = data["about"]
        return Manifest(data["generation"], data["dim"], data["dtype"], model, entries, about)
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error):
        raise damaged(path, "the fields of an index") from None


def write(directory: Path, manifest: Manifest) -> None:
    """Make this the index, in one step."""
    body = json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)})
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_text(directory / FILE, f"{body}\n{digest}\n")


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Be the only writer; what a killed one left behind is removed first and what is no longer
    part of the index last."""
    (directory / SEGMENTS).mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IndexFault(
                f"{directory}: must have one writer at a time, got a second; wait for the other"
            ) from None
        _sweep(directory)
        yield
        _sweep(directory)


def _sweep(directory: Path) -> None:
    known = {entry.file for entry in read(directory).segments} if exists(directory) else set()
    for path in (directory / SEGMENTS).iterdir():
        if path.name not in known:
            path.unlink()


def exists(directory: Path) -> bool:
    """Whether an index is there at all."""
    return (directory / FILE).is_file()
