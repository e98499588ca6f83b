"""The search among codes of rows by the CUDA kernels: bounds by one, the choice by another."""

from collections.abc import Callable

import torch
from torch import Tensor

from elva_kernels.backends.boundary import pointer
from elva_kernels.backends.cuda import launch
from elva_kernels.backends.cuda.select import Best, takes
from elva_kernels.backends.gpu import codes
from elva_kernels.backends.gpu.topk import search
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import FineCodes, RowCodes


def nearest_codes(
    query: FineCodes, rows: RowCodes, depth: int, *, mask: Tensor | None, floor: Tensor | None
) -> Tensors:
    """Bounds and indices [Q, depth]."""
    return codes.nearest_codes(_Queries, query, rows, depth, mask=mask, floor=floor, choose=_choose)


class _Queries:
    """Some queries as the kernel reads them: both bytes padded by zeros."""

    def __init__(self, query: FineCodes) -> None:
        count, dim = query.code.shape
        piece = launch.module().CUDA_CODE_PIECE
        padded = -(-dim // piece) * piece
        self.query = query
        self.packed = query.code.new_zeros((count, 2, padded))
        self.packed[:, 0, :dim], self.packed[:, 1, :dim] = query.code, query.fine

    def __call__(self, rows: RowCodes, mask: Tensor | None) -> Tensor:
        count, dim = self.query.code.shape
        bounds = rows.scale.new_empty((count, len(rows.scale)))
        launch.call(
            "nearest_codes",
            launch.module().cuda_code_bounds,
            *launch.place(rows.code),
            *bounds.shape,
            dim,
            self.packed.shape[2],
            self.packed.data_ptr(),
            self.query.scale.data_ptr(),
            self.query.lost.data_ptr(),
            *map(pointer, rows),
            pointer(None if mask is None else mask.contiguous()),
            bounds.data_ptr(),
        )
        return bounds


def _choose(
    query: Tensor, rows: int, k: int, step: int, scores_of: Callable[[slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """As `search`."""
    if not (takes(k) and len(query)):
        return search(query, rows, k, step, scores_of)
    shape = (len(query), k)
    found = Best("nearest_codes", query.new_empty(shape), query.new_empty(shape, dtype=torch.int64))
    for first in range(0, rows, step):
        found.add(scores_of(slice(first, first + step)), first)
    return found.scores, found.index
