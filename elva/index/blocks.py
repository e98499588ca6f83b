"""A file that is written once: a header, content, and a checksum of each block of it.

    0     magic, 8 bytes
    8     u64 little-endian, bytes of the header
    16    SHA-256 of the header
    48    header: JSON with `version` and `sums` among its fields; zeros to 4096
    4096  content
    ...   SHA-256 of each block of 4 MiB from byte 4096 on, whose own SHA-256 is the header's `sums`

Every byte is covered: the header by its digest, its padding by being zero, the rest by the sums.
The file's size must be the one that the header adds up to before anything is mapped.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from elva.errors import IndexFault, UserError
from elva.files import Sink, open_regular, replacing
from elva.settings import Places, build, read_json, shown

HEADER_BYTES = 4096
BLOCK_BYTES = 4 << 20
_DIGEST = hashlib.sha256().digest_size
Read = TypeVar("Read")
Head = TypeVar("Head")


class Blocks(Generic[Head]):
    """A mapped file. `verify` reads all of it; opening checks its size and header only.

    Args:
        kind: of its header, a dataclass with a field `sums`.
        magic: its first bytes.
        content_bytes: of a header, how many there are.

    Raises:
        IndexFault: no such file, or a damaged one.
    """

    def __init__(
        self, path: Path, magic: bytes, kind: type[Head], content_bytes: Callable[[Head], int]
    ) -> None:
        self.path = path
        try:
            descriptor, self.size = open_regular(path)
        except OSError as error:
            raise IndexFault(
                f"{path}: must be readable, got {error.strerror}; build the index again"
            ) from None
        try:
            start = os.pread(descriptor, HEADER_BYTES, 0)
            self.header = _header(path, start, magic, kind)
            self.header_sum = start[16:48].hex()
            self.end = HEADER_BYTES + content_bytes(self.header)
            expected = self.end + -(-(self.end - HEADER_BYTES) // BLOCK_BYTES) * _DIGEST
            if self.size != expected:
                raise damaged(path, f"{expected:,} bytes, got {self.size:,}")
            self.map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def tensor(self, dtype: torch.dtype, count: int, offset: int) -> Tensor:
        """[count] of numbers that lie at a byte of the file, mapped, read-only."""
        if not count:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors
            return torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Compare every byte with its checksum.

        Args:
            progress: called with the bytes that were read since it was called before.

        Raises:
            IndexFault: the first byte range that differs.
        """
        with memoryview(self.map) as view:
            sums = view[self.end :]
            wanted_sums: str = getattr(self.header, "sums")  # noqa: B009 (every kind's)
            if hashlib.sha256(sums).hexdigest() != wanted_sums:
                raise damaged(self.path, f"its checksums at byte {self.end:,}")

            def check(number: int) -> tuple[int, int | None]:
                start = HEADER_BYTES + number * BLOCK_BYTES
                block = view[start : min(start + BLOCK_BYTES, self.end)]
                found = hashlib.sha256(block).digest()
                wanted = sums[number * _DIGEST : (number + 1) * _DIGEST]
                return len(block), None if found == wanted else start

            try:
                with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves the GIL
                    for read, bad in pool.map(check, range(len(sums) // _DIGEST)):
                        if bad is not None:
                            raise damaged(self.path, f"its checksum in the block at byte {bad:,}")
                        if progress is not None:
                            progress(read)
            finally:
                sums.release()


@contextmanager
def writing(path: Path, magic: bytes, kind: type) -> Iterator[Writer]:
    """Write such a file whole or not at all; the block calls `Writer.finish` last.

    Raises:
        OSError: the disk; the path and the byte are in it.
    """
    with replacing(path) as sink:
        sink.write(bytes(HEADER_BYTES))
        yield Writer(path, sink, magic, kind)


class Writer:
    """A file being written, and the checksums of its blocks so far."""

    def __init__(self, path: Path, sink: Sink, magic: bytes, kind: type) -> None:
        self.path, self.sink, self.magic, self.kind = path, sink, magic, kind
        self._done: list[bytes] = []
        self._open = hashlib.sha256()
        self._room = BLOCK_BYTES

    def write(self, content: memoryview) -> None:
        """Append content."""
        self.sink.write(content)
        while content:
            part, content = content[: self._room], content[self._room :]
            self._open.update(part)
            self._room -= len(part)
            if not self._room:
                self._close()

    def finish(self, header: Mapping[str, Any]) -> None:
        """Write the checksums and the header, to which their own checksum is added."""
        if self._room < BLOCK_BYTES:
            self._close()
        listed = b"".join(self._done)
        self.sink.write(listed)
        text = json.dumps({**header, "sums": hashlib.sha256(listed).hexdigest()}).encode()
        if 48 + len(text) > HEADER_BYTES:
            raise IndexFault(
                f"index: the model's name must be under 3 kB, got a header of {len(text):,} bytes; "
                "move it to a shorter path"
            )
        start = self.magic + struct.pack("<Q", len(text)) + hashlib.sha256(text).digest() + text
        # Nothing is written that is not read.
        _header(self.path, start.ljust(HEADER_BYTES, b"\0"), self.magic, self.kind)
        self.sink.write_start(start)

    def _close(self) -> None:
        self._done.append(self._open.digest())
        self._open, self._room = hashlib.sha256(), BLOCK_BYTES


def damaged(path: Path, rule: str) -> IndexFault:
    """The error for a file that is not what was written."""
    return IndexFault(f"{path}: must have {rule}; the file is damaged, make it again")


def read_fields(
    kind: type[Read], content: bytes, path: Path, versions: tuple[int, ...] = (1,)
) -> Read:
    """A dataclass from the JSON of a file that nobody vouches for.

    Args:
        versions: of the file's format that can be read, the newest last.

    Raises:
        IndexFault: another version, or a field that is missing, unknown or against its rule.
    """
    places = Places("fields")
    try:
        data = read_json(content, places)
        version = data.get("version") if isinstance(data, dict) else None
        if type(version) is int and version not in versions:
            raise IndexFault(
                f"{path}: must be of version {versions[-1]}, got {shown(version)}; "
                "use the elva that wrote it or build the index again"
            )
        found: Read = build(kind, data, places)
    except IndexFault:
        raise
    except UserError as error:
        reason = str(error).removeprefix("fields: ")
        raise damaged(path, f"its fields as they are written ({reason})") from None
    return found


def _header(path: Path, start: bytes, magic: bytes, kind: type[Head]) -> Head:
    if len(start) < HEADER_BYTES or start[:8] != magic:
        raise damaged(path, "an index segment's first bytes")
    (length,) = struct.unpack("<Q", start[8:16])
    text = start[48 : 48 + length]
    if len(text) != length or hashlib.sha256(text).digest() != start[16:48]:
        raise damaged(path, "its header's checksum")
    if any(start[48 + length :]):
        raise damaged(path, "zeros after its header")
    return read_fields(kind, text, path)
