"""`index.json`: the one file whose replacement is the change of an index."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from elva.errors import IndexFault
from elva.files import PARTIAL, lock, make_directory, read_bounded, write_bytes
from elva.index import about, codes
from elva.index.blocks import damaged, read_fields
from elva.index.segment import Dtype, Rows, Width
from elva.model.identity import Identity
from elva.settings import JSON_BYTES, Rule, Sha256, Whole

FILE, SEGMENTS, LOCK = "index.json", "segments", ".lock"
FORMAT: Literal["elva-index"] = "elva-index"
VERSION: Literal[2] = 2
_READABLE = (1, 2)

_SegmentName = Annotated[
    str,
    Rule("be a segment's own name", re.compile(r"[\w-][\w.-]{0,100}\.elva", re.A).fullmatch),
]


@dataclass(frozen=True)
class Entry:
    """One segment of an index.

    Args:
        file: its name under `segments/`.
        header: the SHA-256 of its header, so that no other file passes for it.
        deleted: which rows are, as packed bits, compressed; empty for none.
        codes: the SHA-256 of the header of its codes, in `codes_file`; None where it has none, as
            in version 1.
    """

    file: _SegmentName
    rows: Rows
    header: Sha256
    deleted: str = ""
    codes: Sha256 | None = None

    def alive(self) -> np.ndarray | None:
        """[rows] bool, or None where nothing is deleted.

        Raises:
            ValueError: `deleted` is not one bit a row; nothing larger than that is unpacked.
        """
        if not self.deleted:
            return None
        wanted = -(-self.rows // 8)
        reader = zlib.decompressobj()
        try:
            bits = reader.decompress(base64.b64decode(self.deleted, validate=True), wanted + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if len(bits) != wanted or not reader.eof or reader.unused_data:
            raise ValueError("another number of bits")
        gone = np.unpackbits(np.frombuffer(bits, np.uint8)).astype(bool)
        if gone[self.rows :].any():
            raise ValueError("bits of no row")
        return ~gone[: self.rows]

    def without(self, rows: np.ndarray) -> Entry:
        """The entry with these rows deleted too."""
        alive = self.alive()
        gone = np.zeros(self.rows, bool) if alive is None else ~alive
        gone[rows] = True
        bits = base64.b64encode(zlib.compress(np.packbits(gone).tobytes())).decode()
        return replace(self, deleted=bits)

    @property
    def files(self) -> set[str]:
        """Names of what it keeps under `segments/`."""
        return {self.file, self.codes_file} if self.codes else {self.file}

    @property
    def codes_file(self) -> str:
        """The name of its codes, where it has any: codes that are made again never lie where
        others are known by another header."""
        assert self.codes is not None
        return f"{Path(self.file).stem}.{self.codes[:16]}{codes.SUFFIX}"


@dataclass(frozen=True)
class Manifest:
    """What an index is at one moment.

    Args:
        about: what its maker wants to find again: how to ask the model, where the data lies.
    """

    generation: Whole
    dim: Width
    dtype: Dtype
    model: Identity
    segments: tuple[Entry, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    format: Literal["elva-index"] = FORMAT
    version: Literal[1, 2] = VERSION

    def faults(self) -> Iterator[tuple[str, str]]:
        names = {name for entry in self.segments for name in entry.files}
        if len(names) < sum(len(entry.files) for entry in self.segments):
            yield "segments", "name each file once"
        yield from about.faults(self.about)


def read(directory: Path) -> Manifest:
    """The index's manifest.

    Raises:
        IndexFault: there is none, or any byte of it has changed.
    """
    path = directory / FILE
    try:
        content = read_bounded(path, JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise IndexFault(
            f"{directory}: must be an index, got no {FILE}; make one with elva index build"
        ) from None
    except OSError as error:
        raise IndexFault(
            f"{path}: must be a readable file, got {error.strerror}; build the index again"
        ) from None
    body, _, digest = content.partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise damaged(path, "the checksum in its last line")
    return replace(read_fields(Manifest, body, path, _READABLE), version=VERSION)


def write(directory: Path, manifest: Manifest) -> None:
    """Make this the index, in one step.

    Raises:
        IndexFault: what `read` would refuse; the index is as it was.
    """
    try:
        body = json.dumps(asdict(manifest), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IndexFault(f"index: about must be plain JSON; {reason}") from None
    try:
        read_fields(Manifest, body, directory / FILE, _READABLE)
    except IndexFault as error:
        reason = str(error).partition(": ")[2].removesuffix("; the file is damaged, make it again")
        raise IndexFault(f"index: {reason}; mend what is to be kept") from None
    digest = hashlib.sha256(body).hexdigest().encode()
    write_bytes(directory / FILE, body + b"\n" + digest + b"\n")


@contextmanager
def writing(directory: Path, *, make: bool = False) -> Iterator[None]:
    """Be the only writer; what a killed one left behind is removed first and what is no longer
    part of the index last, and all of it by the one that holds the lock.

    Args:
        make: there may be no directory yet; one that holds no index in the end is removed again.

    Raises:
        IndexFault: another writes, or nothing is there to write into.
    """
    made = make and not directory.exists()
    descriptor = _locked(directory, make)
    try:
        (directory / SEGMENTS).mkdir(exist_ok=True)
        _sweep(directory)
        try:
            yield
        finally:
            _sweep(directory)
            if not exists(directory):
                _clear(directory, made)
    finally:
        os.close(descriptor)


def _locked(directory: Path, make: bool) -> int:
    """A descriptor of the directory's lock file, locked."""
    while True:
        if make:
            make_directory(directory)
        elif not exists(directory):
            read(directory)  # which says what is missing
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(directory / LOCK, flags, 0o666)
        except FileNotFoundError:
            continue  # another's directory, made for nothing, has just gone
        held = False
        try:
            held = lock(directory / LOCK, descriptor, wait=False)
        except BlockingIOError:
            raise IndexFault(
                f"{directory}: must have one writer at a time, got a second; wait for the other"
            ) from None
        finally:
            if not held:
                os.close(descriptor)
        if held:
            return descriptor


def _sweep(directory: Path) -> None:
    """Remove what is no part of the index; nothing where it cannot be read what is."""
    known: set[str] = set()
    if exists(directory):
        try:
            found = read(directory)
        except IndexFault:
            return
        known = {name for entry in found.segments for name in entry.files}
    for path in (directory / SEGMENTS).iterdir():
        if path.name not in known and (path.is_symlink() or not path.is_dir()):
            path.unlink()


def _clear(directory: Path, made: bool) -> None:
    """Remove what a writer makes before there is an index, and nothing else."""
    (directory / (FILE + PARTIAL)).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: somebody else's
        (directory / SEGMENTS).rmdir()
        (directory / LOCK).unlink()
        if made:
            directory.rmdir()


def exists(directory: Path) -> bool:
    """Whether an index is there at all."""
    return (directory / FILE).is_file()
