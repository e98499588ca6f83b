"""A segment: the embeddings of some items, once written never changed.

A file of blocks (`blocks`), whose content is rows * dim numbers, and then an Arrow IPC stream: `id`
and whatever else is known of each item.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import torch
from torch import Tensor

from elva.errors import IndexFault
from elva.index import blocks, scale, stream
from elva.index.blocks import HEADER_BYTES, Blocks, damaged
from elva.model.identity import Identity
from elva.settings import FileSize, Sha256, between

MAGIC = b"ELVASEG1"
VERSION: Literal[1] = 1
Dtype = Literal["float16", "bfloat16", "float32"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Rows = Annotated[int, between(0, 2**48)]
Width = Annotated[int, between(1, 2**24)]


@dataclass(frozen=True)
class Header:
    """What a segment's first page says."""

    dtype: Dtype
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
        self._file = Blocks(path, MAGIC, Header, lambda head: _row_bytes(head) + head.table_bytes)
        header = self._file.header
        self.size, self.header_sum = self._file.size, self._file.header_sum
        self.dtype, self.dim, self.rows = header.dtype, header.dim, header.rows
        self.model = header.model
        self.rows_bytes = _row_bytes(header)

    @property
    def content(self) -> memoryview:
        """The whole file's bytes."""
        return memoryview(self._file.map)

    @cached_property
    def embeddings(self) -> Tensor:
        """[rows, dim], mapped, read-only."""
        flat = self._file.tensor(DTYPES[self.dtype], self.rows * self.dim, HEADER_BYTES)
        return flat.view(self.rows, self.dim)

    @cached_property
    def table(self) -> pa.Table:
        """`id` and metadata, a row an embedding, mapped."""
        start = HEADER_BYTES + self.rows_bytes
        view = self.content[start : self._file.end]
        try:
            return stream.read(view, self.rows)
        except ValueError:
            raise damaged(self.path, "a readable table of ids") from None

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Compare every byte with its checksum; see `Blocks.verify`."""
        self._file.verify(progress)


def write(
    path: Path,
    chunks: Iterable[Tensor],
    table: pa.Table | pa.RecordBatchReader,
    *,
    dim: int,
    dtype: str,
    model: Identity,
) -> None:
    """Write a segment whole or not at all.

    Args:
        chunks: [n, dim] each, finite, together as many rows as `table`; rounded once to `dtype`.
        table: a string column `id`, unique, and any others; or the batches of such a table.

    Raises:
        IndexFault: a NaN or infinite embedding, or a wrong count or width.
        OSError: the disk; the path and the byte are in it.
    """
    rows = 0
    with blocks.writing(path, MAGIC, Header) as file:
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
            file.write(memoryview(stored.flatten().view(torch.uint8).numpy().data))
        written = stream.write(file.write, table)
        if rows != written.rows:
            raise IndexFault(
                f"index: ids must be one a row, got {written.rows} for {rows} embeddings; "
                "give as many of each"
            )
        file.finish(
            {"version": VERSION, "dtype": dtype, "dim": dim, "rows": rows, "metric": "cosine",
             "model": asdict(model), "table_bytes": written.bytes}
        )  # fmt: skip


def _row_bytes(header: Header) -> int:
    return header.rows * header.dim * DTYPES[header.dtype].itemsize


def _check_finite(stored: Tensor, first: int, table: pa.Table | pa.RecordBatchReader) -> None:
    # The smallest and the largest are NaN or infinite if any number is: no mask is written.
    if not stored.numel() or bool(torch.isfinite(torch.stack(stored.aminmax())).all()):
        return
    row = first + int((~torch.isfinite(stored)).any(1).int().argmax())
    known = isinstance(table, pa.Table) and row < table.num_rows
    name = f" ({table['id'][row].as_py()})" if known else ""
    raise IndexFault(
        f"index: embeddings must be finite, got NaN or infinity in row {row}{name}; mend the model"
    )
