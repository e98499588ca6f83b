"""The search among codes of rows by the Triton kernel: bounds of blocks, the choice torch's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.gpu import codes
from elva_kernels.backends.launcher import Tensors
from elva_kernels.backends.triton import INTERPRETED, launch
from elva_kernels.backends.triton.in_batch import Tile, options
from elva_kernels.reference import FineCodes, RowCodes
from elva_kernels.reference.codes import FINE_STEPS, SCORE_ERROR

# Of corpus rows, queries and columns: for few queries, for many, and for rows that are not on 16
# bytes, whose codes are loaded one by one. Products of integers are exact: a tile decides speed
# alone. Sized by what the compiler reports (tests/kernels/triton_resources.json) and the bytes in
# flight, not yet timed on a GPU.
FEW, MANY, ODD = Tile(128, 16, 128, 4, 4), Tile(128, 64, 128, 8, 3), Tile(64, 16, 32, 4, 2)
_INTERPRETED = Tile(64, 16, 64, 4, 1)


def nearest_codes(
    query: FineCodes, rows: RowCodes, depth: int, *, mask: Tensor | None, floor: Tensor | None
) -> Tensors:
    """Bounds and indices [Q, depth]."""
    bounds_by = partial(partial, _bounds)
    return codes.nearest_codes(bounds_by, query, rows, depth, mask=mask, floor=floor)


def tile_of(query: FineCodes, rows: RowCodes) -> Tile:
    if INTERPRETED:
        return _INTERPRETED
    if not all(map(launch.is_wide, (query.code, query.fine, rows.code))):
        return ODD
    return FEW if len(query.code) <= FEW.columns else MANY


def constants_of(tile: Tile) -> dict[str, float]:
    """The constants of `codes.code_bounds_kernel`."""
    sizes = {"ROWS": tile.rows, "QUERIES": tile.columns, "DEPTH": tile.depth}
    return {"FINE_STEP": 1 / FINE_STEPS, "ERROR": SCORE_ERROR} | sizes


def options_of(architecture: str, tile: Tile) -> dict[str, Any]:
    """As the compiler takes them: sums of floats are not fused."""
    return options(architecture, tile) | {"enable_fp_fusion": False}


def _bounds(query: FineCodes, rows: RowCodes, mask: Tensor | None) -> Tensor:
    from elva_kernels.backends.triton.kernels import codes as kernels

    (q, dim), n, device = query.code.shape, len(rows.scale), rows.code.device
    bounds = launch.empty((q, n), torch.float32, device)
    tile = tile_of(query, rows)
    with launch.on(device):
        kernels.code_bounds_kernel[(-(-n // tile.rows) * -(-q // tile.columns),)](
            *query,
            *rows,
            None if mask is None else mask.contiguous(),
            bounds,
            q,
            n,
            dim,
            **constants_of(tile),
            **options_of(launch.architecture_of(device), tile),
        )
    return bounds
