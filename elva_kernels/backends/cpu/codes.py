"""Codes of rows, and the search among them, on the CPU."""

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, module, operand, pointer
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import FineCodes, RowCodes


def row_codes(rows: Tensor, fine: bool) -> Tensors:
    """Codes of [P, D], fine codes [P, D or 0], scales and losses [P]."""
    count, dim = rows.shape
    code = torch.empty(count, dim, dtype=torch.int8, device="cpu")
    second = torch.empty(count, dim if fine else 0, dtype=torch.int8, device="cpu")
    scale, lost = (torch.empty(count, dtype=torch.float32, device="cpu") for _ in range(2))
    module().row_codes(
        DTYPE_CODES[rows.dtype],
        torch.get_num_threads(),
        count,
        dim,
        operand(rows),
        code.data_ptr(),
        second.data_ptr() if fine else 0,
        scale.data_ptr(),
        lost.data_ptr(),
    )
    return code, second, scale, lost


def nearest_codes(
    query: FineCodes, rows: RowCodes, depth: int, *, mask: Tensor | None, floor: Tensor | None
) -> Tensors:
    """Bounds and indices [Q, depth]."""
    shape = (len(query.scale), depth)
    bounds = torch.empty(shape, dtype=torch.float32, device="cpu")
    index = torch.empty(shape, dtype=torch.int64, device="cpu")
    given = [x.contiguous() for x in (*query, *rows)]
    allowed = None if mask is None else mask.contiguous()
    least = None if floor is None else floor.contiguous()
    module().nearest_codes(
        torch.get_num_threads(),
        shape[0],
        len(rows.scale),
        query.code.shape[1],
        depth,
        *map(pointer, given),
        pointer(allowed),
        pointer(least),
        bounds.data_ptr(),
        index.data_ptr(),
    )
    return bounds, index
