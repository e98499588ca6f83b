"""Files that appear whole and synced under their name, or leave what was there as it was.

Everything here goes through `os.open`, `os.write`, `os.pwrite`, `os.fsync` and `os.replace`, so a
test that makes the n-th of them fail has covered every place where a disk can.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Sink:
    """A file being written."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor, self.size = path, descriptor, 0

    def write(self, content: bytes | memoryview) -> None:
        """Append; an error names the file and how far it came."""
        rest = memoryview(content).cast("B")
        try:
            while rest:
                done = os.write(self.descriptor, rest)
                self.size += done
                rest = rest[done:]
        except OSError as error:
            where = f"{self.path} at byte {self.size:,}"
            raise OSError(error.errno, error.strerror, where) from error

    def write_start(self, content: bytes) -> None:
        """Overwrite the first bytes."""
        try:
            os.pwrite(self.descriptor, content, 0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self.path} at byte 0") from error


@contextmanager
def replacing(path: Path) -> Iterator[Sink]:
    """Write a file beside `path`, sync it, and put it in its place when the block ends well.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was, and nothing lies beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            yield Sink(path, descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by the given bytes, or leave it as it was."""
    with replacing(path) as sink:
        sink.write(content)


def write_text(path: Path, text: str) -> None:
    """Replace a file by the given text in UTF-8, or leave it as it was."""
    write_bytes(path, text.encode("utf-8"))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while content := file.read(1 << 22):
            digest.update(content)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory as lasting as the files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
