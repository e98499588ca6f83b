"""How the Triton kernels are launched: sizes of tiles, groups covered, the device, memory."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Sizes of a tile of embeddings, the warps that work on it, and the registers of a thread."""

    rows: int
    columns: int
    num_warps: int
    registers: int | None  # None: as many as the compiler likes

    def options(self) -> dict[str, Any]:
        """As the compiler takes them."""
        capped = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "enable_fp_fusion": False} | capped


# Architecture -> by D, the first row whose D is not exceeded. `columns`, and of the query's
# gradient `rows`, decide the order of sums, so they are the same everywhere; the rest only decides
# speed. Sized by what Triton 3.6 and 3.9 report (tests/kernels/triton_resources.json) and the bytes
# in flight. Left to itself NVIDIA's compiler spills a few bytes to fit one more program; hence a
# number of registers that leaves room for two where both fit (sm_90 on, `lean`), else for one.
_LARGEST = 2**63
_BLOCKS = {
    "sm_80": ((32, Blocks(32, 32, 4, 255)), (_LARGEST, Blocks(16, 128, 8, 255))),
    "sm_90": ((32, Blocks(32, 32, 4, 255)), (_LARGEST, Blocks(16, 128, 8, 128))),
    "hip": ((32, Blocks(32, 32, 2, None)), (_LARGEST, Blocks(16, 128, 4, None))),
}
SPAN = 16  # tiles summed in lanes before they are added up in float64
RANKS = 32  # candidates compared with as many at a time
BANK_PROGRAMS = 2**15  # of a bank's gradient: of more rows than that, each is one program's. Ours


def blocks(architecture: str, dim: int, dtype: torch.dtype, *, lean: bool) -> Blocks:
    """The tile for embeddings of size `dim`; float64 takes half the rows.

    lean: wide loads and hard ranks; else, and for wide types, a thread needs more registers.
    """
    found = next(sizes for most, sizes in _BLOCKS[architecture] if dim <= most)
    if dtype.itemsize == 2 and lean:
        return found
    rows = found.rows // 2 if dtype == torch.float64 else found.rows
    return found._replace(rows=rows, registers=found.registers and 255)


def rank_blocks(architecture: str) -> Blocks:
    """The tile for scores alone, compared with one another."""
    return Blocks(RANKS, RANKS, 4, None if architecture == "hip" else 255)


def bank_blocks(architecture: str) -> Blocks:
    """The tile of queries whose pulls on a row of a bank are summed at once, in float64."""
    return Blocks(8, 128, 4, None if architecture == "hip" else 128)


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The row of `_BLOCKS` for a device; every later NVIDIA GPU takes the last one's."""
    if torch.version.hip is not None:
        return "hip"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "sm_80"
    return "sm_90"


def parts(
    leading: Sequence[int], tensors: Sequence[Tensor | None]
) -> Iterator[tuple[list[Tensor | None], tuple[int, int], list[tuple[int, ...]]]]:
    """Launches that cover all groups: tensors, (inner, groups), strides.

    A kernel finds a group in two leading dimensions, the outer one of any size and the inner one of
    `inner`. Leading dimensions that step alike in every tensor are merged; where more than two are
    left, each index of the first is a launch of its own. A tensor's strides are those of the two
    leading dimensions, then its own from the last dimension backwards.
    """
    given = [x for x in tensors if x is not None]
    rank = len(leading)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for axis, size in enumerate(leading):
        if size == 0:
            return
        if size == 1:
            continue
        steps = tuple(x.stride(axis) for x in given)
        if merged and merged[-1][1] == tuple(size * step for step in steps):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    if len(merged) > 2:
        for i in range(leading[0]):
            yield from parts(leading[1:], [None if x is None else x[i] for x in tensors])
        return
    still = (1, (0,) * len(given))
    (outer, outer_steps), (inner, inner_steps) = [still] * (2 - len(merged)) + merged
    steps_of = iter(zip(outer_steps, inner_steps, strict=True))
    strides = [
        (0, 0, 0, 0) if x is None else (*next(steps_of), *reversed(x.stride()[rank:]))
        for x in tensors
    ]
    yield list(tensors), (inner, outer * inner), strides


def is_wide(rows: Tensor) -> bool:
    """Whether rows [*, D] are dense and can be read, and their like written, 16 bytes at a time."""
    steps = (rows.shape[-1], *rows.stride()[:-1])
    aligned = all(step * rows.element_size() % 16 == 0 for step in steps)
    return aligned and rows.stride(-1) == 1 and rows.data_ptr() % 16 == 0


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def triton_type(dtype: torch.dtype) -> Any:
    language = importlib.import_module("triton.language")
    return getattr(language, str(dtype).removeprefix("torch."))
