"""Codes of rows, and the search among them, as torch knows them."""

from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import FineCodes, RowCodes
from elva_kernels.registered.library import Registered, register


def _row_codes(rows: Tensor, fine: bool, backend: str) -> Tensors:
    launch = launcher("row_codes", backend, rows.device, rows.dtype)
    found: Tensors = launch(rows, fine)
    return found


def _trace_row_codes(rows: Tensor, fine: bool, _: str) -> Tensors:
    code = rows.new_empty(rows.shape, dtype=torch.int8)
    numbers = rows.new_empty(rows.shape[:1], dtype=torch.float32)
    second = code if fine else code.new_empty((rows.shape[0], 0))
    return code, torch.empty_like(second), numbers, torch.empty_like(numbers)


def _nearest_codes(*given: Any) -> Tensors:
    query, rows = FineCodes(*given[:4]), RowCodes(*given[4:7])
    mask, floor, depth, backend = given[7:]
    launch = launcher("nearest_codes", backend, query.code.device, query.scale.dtype)
    found: Tensors = launch(query, rows, depth, mask=mask, floor=floor)
    return found


def _trace_nearest_codes(query: Tensor, *given: Any) -> Tensors:
    shape = (query.shape[0], given[-2])
    bounds = query.new_empty(shape, dtype=torch.float32)
    return bounds, query.new_empty(shape, dtype=torch.int64)


_OPS = register(
    {
        "row_codes": Registered(
            "(Tensor rows, bool fine, str backend) "
            "-> (Tensor code, Tensor fine, Tensor scale, Tensor lost)",
            _row_codes,
            _trace_row_codes,
        ),
        "nearest_codes": Registered(
            "(Tensor query, Tensor query_fine, Tensor query_scale, Tensor query_lost, "
            "Tensor code, Tensor scale, Tensor lost, Tensor? mask, Tensor? floor, "
            "SymInt depth, str backend) -> (Tensor bounds, Tensor index)",
            _nearest_codes,
            _trace_nearest_codes,
        ),
    }
)

row_codes = _OPS.row_codes.default
nearest_codes = _OPS.nearest_codes.default
