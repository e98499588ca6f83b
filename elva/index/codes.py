"""8-bit codes of a segment's rows, beside it: what exact search reads in place of the rows.

A file of blocks (`blocks`), whose content is rows * dim codes, zeros up to a multiple of 4 bytes,
and a float32 scale and a float32 loss of each row (`elva_kernels.row_codes`). Its header names the
segment's by its SHA-256, so that no other segment's codes pass for these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import elva_kernels
from elva.errors import IndexFault
from elva.index import blocks
from elva.index.blocks import HEADER_BYTES, Blocks, damaged
from elva.index.segment import Rows, Segment, Width
from elva.progress import SILENT, Reporter
from elva.settings import Sha256
from elva_kernels import RowCodes

MAGIC = b"ELVACOD1"
VERSION: Literal[1] = 1
SUFFIX = ".codes"
CODED_ROWS = 16_384
"""At a time."""


@dataclass(frozen=True)
class Header:
    """What a file of codes says of itself.

    Args:
        segment: SHA-256 of the header of the segment whose rows these are.
    """

    dim: Width
    rows: Rows
    segment: Sha256
    sums: Sha256
    version: Literal[1] = VERSION


class SegmentCodes:
    """One mapped file of codes. `verify` reads all of it; opening checks its size and header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = Blocks(path, MAGIC, Header, _content_bytes)
        except IndexFault as error:
            index = path.parent.parent
            raise IndexFault(f"{error}; elva index codes {index} makes codes again") from None
        self.size, self.header_sum = self._file.size, self._file.header_sum

    def check_of(self, one: Segment) -> None:
        """Refuse the codes of another segment."""
        header = self._file.header
        if (header.rows, header.dim, header.segment) != (one.rows, one.dim, one.header_sum):
            raise damaged(self.path, f"the codes of {one.path.name}")

    @cached_property
    def codes(self) -> RowCodes:
        """Code [rows, dim], scale and lost [rows], mapped, read-only."""
        rows, dim = self._file.header.rows, self._file.header.dim
        numbers = HEADER_BYTES + _padded(rows * dim)
        code = self._file.tensor(torch.int8, rows * dim, HEADER_BYTES)
        scale = self._file.tensor(torch.float32, rows, numbers)
        lost = self._file.tensor(torch.float32, rows, numbers + 4 * rows)
        for name, values in (("scale", scale), ("loss", lost)):
            if not bool(((values >= 0) & values.isfinite()).all()):
                raise damaged(self.path, f"a {name} of each row")
        return RowCodes(code.view(rows, dim), scale, lost)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Compare every byte with its checksum; see `Blocks.verify`."""
        self._file.verify(progress)


def write(one: Segment, path: Path, reporter: Reporter = SILENT, done: int = 0) -> SegmentCodes:
    """Write the codes of a segment's rows, whole or not at all.

    Args:
        done: rows that the reporter has been told of before.
    """
    scales, losses = [], []
    with blocks.writing(path, MAGIC, Header) as file:
        for part in one.embeddings.split(CODED_ROWS):
            coded = elva_kernels.row_codes(part)
            file.write(_bytes(coded.code))
            scales.append(coded.scale)
            losses.append(coded.lost)
            done += len(part)
            reporter.advance(done)
        file.write(memoryview(bytes(_padded(one.rows * one.dim) - one.rows * one.dim)))
        for numbers in (scales, losses):
            file.write(_bytes(torch.cat(numbers)))
        file.finish(
            {"version": VERSION, "dim": one.dim, "rows": one.rows, "segment": one.header_sum}
        )
    return SegmentCodes(path)


def _content_bytes(header: Header) -> int:
    return _padded(header.rows * header.dim) + 8 * header.rows


def _padded(count: int) -> int:
    return -(-count // 4) * 4


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().flatten().view(torch.uint8).numpy().data)
