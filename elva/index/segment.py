"""A segment: the embeddings of some items, once written never changed.

    0     magic "ELVASEG1"
    8     u64 little-endian, bytes of the header
    16    SHA-256 of the header
    48    header: JSON {version, dtype, dim, rows, metric, model, table_bytes, sums}; zeros to 4096
    4096  rows * dim numbers
    ...   Arrow IPC stream: `id` and whatever else is known of each item
    ...   SHA-256 of each block of 4 MiB from byte 4096 on, whose own SHA-256 is the header's `sums`

Every byte is covered: the header by its digest, its padding by being zero, the rest by the sums.
The file's size must be the one that the header adds up to before anything is mapped.
"""

import hashlib
import json
import mmap
import os
import struct
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from elva.errors import IndexFault, UserError
from elva.files import open_regular, replacing
from elva.index import scale
from elva.model.identity import Identity
from elva.settings import FileSize, Places, Sha256, between, build, read_json, shown

MAGIC = b"ELVASEG1"
VERSION = 1
HEADER_BYTES = 4096
BLOCK_BYTES = 4 << 20
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DIGEST = hashlib.sha256().digest_size
Rows = Annotated[int, between(0, 2**48)]
Width = Annotated[int, between(1, 2**24)]
Read = TypeVar("Read")


@dataclass(frozen=True)
class Header:
    """What a segment's first page says."""

    dtype: Literal["float16", "bfloat16", "float32"]
    dim: Width
    rows: Rows
    metric: Literal["cosine"]
    model: Identity
    table_bytes: FileSize
    sums: Sha256
    version: Literal[1] = VERSION


class Segment:
    """One mapped segment. `verify` reads all of it; opening checks sizes and the header only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            descriptor, self.size = open_regular(path)
        except OSError as error:
            raise IndexFault(
                f"{path}: must be readable, got {error.strerror}; build the index again"
            ) from None
        try:
            start = os.pread(descriptor, HEADER_BYTES, 0)
            header = _header(path, start)
            self.header_sum = start[16:48].hex()
            self.dtype, self.dim, self.rows = header.dtype, header.dim, header.rows
            self.model, self._sums = header.model, bytes.fromhex(header.sums)
            self._row_bytes = self.rows * self.dim * DTYPES[self.dtype].itemsize
            self._data_end = HEADER_BYTES + self._row_bytes + header.table_bytes
            blocks = -(-(self._data_end - HEADER_BYTES) // BLOCK_BYTES)
            expected = self._data_end + blocks * DIGEST
            if self.size != expected:
                raise damaged(path, f"{expected:,} bytes, got {self.size:,}")
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    @property
    def content(self) -> memoryview:
        """The whole file's bytes."""
        return memoryview(self._map)

    @cached_property
    def embeddings(self) -> Tensor:
        """[rows, dim], mapped, read-only."""
        kind = DTYPES[self.dtype]
        if not self._row_bytes:
            return torch.empty(self.rows, self.dim, dtype=kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors
            flat = torch.frombuffer(
                self._map, dtype=kind, count=self.rows * self.dim, offset=HEADER_BYTES
            )
        return flat.view(self.rows, self.dim)

    @cached_property
    def table(self) -> pa.Table:
        """`id` and metadata, a row an embedding, mapped."""
        start = HEADER_BYTES + self._row_bytes
        view = memoryview(self._map)[start : self._data_end]
        try:
            table = pa.ipc.open_stream(pa.py_buffer(view)).read_all()
            table.validate(full=True)  # offsets out of the buffers would be read as they are
        except (pa.ArrowException, KeyError, OSError, ValueError):
            raise damaged(self.path, "a readable table of ids") from None
        names = table.schema.names
        if table.num_rows != self.rows or len({*names}) < len(names) or "id" not in names:
            raise damaged(self.path, "an id for each row, and each field once")
        if table.schema.field("id").type != pa.string() or table["id"].null_count:
            raise damaged(self.path, "an id for each row")
        return table

    def verify(self) -> None:
        """Compare every byte with its checksum.

        Raises:
            IndexFault: the first byte range that differs.
        """
        with memoryview(self._map) as view:
            sums = view[self._data_end :]
            if hashlib.sha256(sums).digest() != self._sums:
                raise damaged(self.path, f"its checksums at byte {self._data_end:,}")

            def check(number: int) -> int | None:
                block = _block(view[: self._data_end], number)
                found = hashlib.sha256(block).digest()
                wanted = sums[number * DIGEST : (number + 1) * DIGEST]
                return None if found == wanted else number

            try:
                with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves the GIL
                    for bad in pool.map(check, range(len(sums) // DIGEST)):
                        if bad is not None:
                            at = HEADER_BYTES + bad * BLOCK_BYTES
                            raise damaged(self.path, f"its checksum in the block at byte {at:,}")
            finally:
                sums.release()


def write(
    path: Path, chunks: Iterable[Tensor], table: pa.Table, *, dim: int, dtype: str, model: Identity
) -> None:
    """Write a segment whole or not at all.

    Args:
        chunks: [n, dim] each, finite, together as many rows as `table`; rounded once to `dtype`.
        table: a string column `id`, unique, and any others.

    Raises:
        IndexFault: a NaN or infinite embedding, or a wrong count or width.
        OSError: the disk; the path and the byte are in it.
    """
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    ids = buffer.getvalue()
    rows = 0
    with replacing(path) as sink:
        sink.write(bytes(HEADER_BYTES))
        sums = _Sums()
        for chunk in chunks:
            if not chunk.is_floating_point():
                raise IndexFault(
                    f"index: embeddings must be of floats, got {chunk.dtype}; convert them"
                )
            if chunk.ndim != 2 or chunk.shape[1] != dim:
                raise IndexFault(
                    f"index: embeddings must be [n, {dim}], got {tuple(chunk.shape)}; "
                    "embed all of it with one model"
                )
            stored = scale.rounded(chunk, DTYPES[dtype])
            _check_finite(stored, rows, table)
            rows += len(stored)
            content = memoryview(stored.view(torch.uint8).flatten().numpy().data)
            sums.update(content)
            sink.write(content)
        if rows != table.num_rows:
            raise IndexFault(
                f"index: ids must be one a row, got {table.num_rows} for {rows} embeddings; "
                "give as many of each"
            )
        sums.update(memoryview(ids))
        sink.write(memoryview(ids))
        listed = sums.digest()
        sink.write(listed)
        sums_sum = hashlib.sha256(listed).hexdigest()
        header = {
            "version": VERSION, "dtype": dtype, "dim": dim, "rows": rows, "metric": "cosine",
            "model": asdict(model), "table_bytes": ids.size, "sums": sums_sum,
        }  # fmt: skip
        text = json.dumps(header).encode()
        if 48 + len(text) > HEADER_BYTES:
            raise IndexFault(
                f"index: the model's name must be under 3 kB, got {len(model.name)} characters; "
                "move it to a shorter path"
            )
        digest = hashlib.sha256(text).digest()
        start = MAGIC + struct.pack("<Q", len(text)) + digest + text
        _header(path, start.ljust(HEADER_BYTES, b"\0"))  # nothing is written that is not read
        sink.write_start(start)


def damaged(path: Path, rule: str) -> IndexFault:
    """The error for a file that is not what was written."""
    return IndexFault(f"{path}: must have {rule}; the file is damaged, make it again")


def read_fields(kind: type[Read], content: bytes, path: Path) -> Read:
    """A dataclass from the JSON of a file that nobody vouches for.

    Raises:
        IndexFault: another version, or a field that is missing, unknown or against its rule.
    """
    places = Places("fields")
    try:
        data = read_json(content, places)
        version = data.get("version") if isinstance(data, dict) else VERSION
        if type(version) is int and version != VERSION:
            raise IndexFault(
                f"{path}: must be of version {VERSION}, got {shown(version)}; "
                "use the elva that wrote it or build the index again"
            )
        found: Read = build(kind, data, places)
    except IndexFault:
        raise
    except UserError as error:
        reason = str(error).removeprefix("fields: ")
        raise damaged(path, f"its fields as they are written ({reason})") from None
    return found


def _header(path: Path, start: bytes) -> Header:
    if len(start) < HEADER_BYTES or start[:8] != MAGIC:
        raise damaged(path, "an index segment's first bytes")
    (length,) = struct.unpack("<Q", start[8:16])
    text = start[48 : 48 + length]
    if len(text) != length or hashlib.sha256(text).digest() != start[16:48]:
        raise damaged(path, "its header's checksum")
    if any(start[48 + length :]):
        raise damaged(path, "zeros after its header")
    return read_fields(Header, text, path)


def _block(data: memoryview, number: int) -> memoryview:
    start = HEADER_BYTES + number * BLOCK_BYTES
    return data[start : start + BLOCK_BYTES]


def _check_finite(stored: Tensor, first: int, table: pa.Table) -> None:
    # The smallest and the largest are NaN or infinite if any number is: no mask is written.
    if not stored.numel() or bool(torch.isfinite(torch.stack(stored.aminmax())).all()):
        return
    row = first + int((~torch.isfinite(stored)).any(1).int().argmax())
    name = table["id"][row].as_py() if row < table.num_rows else ""
    raise IndexFault(
        f"index: embeddings must be finite, got NaN or infinity in row {row} ({name}); "
        "mend the model"
    )


class _Sums:
    """Digests of a stream in blocks of `BLOCK_BYTES`."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._open = hashlib.sha256()
        self._room = BLOCK_BYTES

    def update(self, content: memoryview) -> None:
        for part in self._parts(content):
            self._open.update(part)
            self._room -= len(part)
            if not self._room:
                self._close()

    def digest(self) -> bytes:
        """All of them, the last block as short as it is."""
        if self._room < BLOCK_BYTES:
            self._close()
        return b"".join(self._done)

    def _parts(self, content: memoryview) -> Iterator[memoryview]:
        while content:
            part = content[: self._room]
            content = content[len(part) :]
            yield part

    def _close(self) -> None:
        self._done.append(self._open.digest())
        self._open, self._room = hashlib.sha256(), BLOCK_BYTES
