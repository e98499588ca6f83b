"""Rows as 8-bit codes, and what they prove of a score: eq. 16 and 17."""

from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.reference.rows import unit
from elva_kernels.reference.topk import TopK

MOST_COLUMNS = 65_536
"""Products of two rows of codes stay below 2^31."""

LARGEST_CODE = 127
FINE_STEPS = 256  # of a fine code in a step of a code

ROTATION_ERROR = 4e-6
"""The rotation of a unit row in float32: 2 log2(D) additions an element, each within 2^-24."""

SCORE_ERROR = 1.2e-5
"""What a float32 score may lie above the truth (1e-5, the contract's), and a bound's own float32
arithmetic below it."""

_BLOCK_ELEMENTS = 2**20


class RowCodes(NamedTuple):
    """8-bit codes of rows, which bound every cosine with them (eq. 16).

    A unit row lies within `lost` of `scale * code`, after a rotation that is the same for all rows.

    Attributes:
        code: int8 [P, D].
        scale: float32 [P].
        lost: float32 [P], a distance, rounded up; inf for a row that is not finite.
    """

    code: Tensor
    scale: Tensor
    lost: Tensor


class FineCodes(NamedTuple):
    """16-bit codes of queries: unit rows lie within `lost` of scale * (code + fine / 256)."""

    code: Tensor  # int8 [Q, D]
    fine: Tensor  # int8 [Q, D]
    scale: Tensor  # float32 [Q]
    lost: Tensor  # float32 [Q]


def row_codes(rows: Tensor) -> RowCodes:
    """Eq. 16 of [P, D]."""
    code, _, scale, lost = _coded(rows, fine=False)
    return RowCodes(code, scale, lost)


def fine_codes(rows: Tensor) -> FineCodes:
    """Eq. 16 of [Q, D], the codes followed by a second byte."""
    return FineCodes(*_coded(rows, fine=True))


def nearest_codes(
    query: FineCodes,
    rows: RowCodes,
    depth: int,
    *,
    mask: Tensor | None = None,
    floor: Tensor | None = None,
) -> TopK:
    """The rows with the largest bounds (eq. 17) of each query: bound descending, then index.

    Args:
        depth: at most P, rows a query.
        mask: bool [P], the rows that may be found.
        floor: float32 [Q]; rows whose bounds are below it need not be found.

    Returns:
        float32 bounds [Q, depth] and int64 rows; -inf and -1 where there are no more.
    """
    best = TopK(
        query.scale.new_empty((len(query.scale), 0)),
        torch.empty((len(query.scale), 0), dtype=torch.int64, device=query.code.device),
    )
    height = max(1, _BLOCK_ELEMENTS // query.code.shape[1])
    for first in range(0, len(rows.scale), height):
        some = RowCodes(*(x[first : first + height] for x in rows))
        bounds = score_bounds(query, some)
        if mask is not None:
            bounds = torch.where(mask[first : first + height], bounds, -torch.inf)
        index = torch.arange(first, first + bounds.shape[1], device=bounds.device)
        bounds = torch.cat([best.scores, bounds], -1)
        index = torch.cat([best.index, index.expand(len(bounds), -1)], -1)
        order = bounds.sort(dim=-1, descending=True, stable=True).indices[:, :depth]
        best = TopK(bounds.gather(-1, order), index.gather(-1, order))
    unseen = best.scores == -torch.inf
    if floor is not None:
        unseen |= best.scores < floor.unsqueeze(1)
    return TopK(best.scores.masked_fill(unseen, -torch.inf), best.index.masked_fill(unseen, -1))


def score_bounds(query: FineCodes, rows: RowCodes) -> Tensor:
    """Eq. 17, float32 [Q, P]: no cosine of `topk` lies above it."""
    fine = query.code.double() + query.fine.double() / FINE_STEPS
    near = (query.scale.double()[:, None] * fine) @ (rows.scale.double()[:, None] * rows.code).T
    missed = query.lost.double()[:, None] + SCORE_ERROR
    lost = rows.lost.double()
    return (near + missed * (1 + lost) + lost).float()


def rotated(rows: Tensor) -> Tensor:
    """Rows under the rotation of eq. 16: their scalar products stay, large elements are spread.

    Twice, elements change signs by `sign` and a Hadamard matrix of the largest power of two that
    fits mixes them: those at the start of the row, then those at its end.
    """
    dim = rows.shape[-1]
    size = 1 << (dim.bit_length() - 1)
    for turn, first in enumerate((0, dim - size)):
        rows = rows * sign(turn, torch.arange(dim, device=rows.device)).to(rows.dtype)
        mixed = rows[..., first : first + size]
        half = size
        while half > 1:
            half //= 2
            left, right = mixed.unflatten(-1, (-1, 2, half)).unbind(-2)
            mixed = torch.stack([left + right, left - right], -2).flatten(-3)
        rows = torch.cat([rows[..., :first], mixed * size**-0.5, rows[..., first + size :]], -1)
    return rows


def sign(turn: int, element: Tensor) -> Tensor:
    """1 or -1 at each place of a row: a bit of a hash of 32 bits, the same on every backend."""
    bits = (2 * element + turn) * 0x9E3779B1 & 0xFFFFFFFF
    bits = (bits ^ bits >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    return 1 - 2 * ((bits ^ bits >> 13) & 1)


def _coded(rows: Tensor, *, fine: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    finite = torch.isfinite(rows).all(-1)
    rows = rotated(unit(torch.where(finite[:, None], rows, 0.0)).float())
    scale = rows.abs().amax(-1) / LARGEST_CODE
    steps = rows.double() / torch.where(scale == 0, 1.0, scale).double()[:, None]
    code = steps.round().clamp(-LARGEST_CODE, LARGEST_CODE)
    rest = ((steps - code) * FINE_STEPS).round().clamp(-128, 127) if fine else 0 * code[:, :0]
    left = steps - code - (rest / FINE_STEPS if fine else 0)
    lost = left.norm(dim=-1) * scale.double() * (1 + 1e-6) + ROTATION_ERROR * (scale > 0).double()
    lost = torch.where(finite, lost, torch.inf).float()
    return code.to(torch.int8), rest.to(torch.int8), scale, lost
