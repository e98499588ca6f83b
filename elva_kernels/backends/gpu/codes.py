"""The search among codes of rows: blocks of bounds, of which the best are kept."""

from collections.abc import Callable

import torch
from torch import Tensor

from elva_kernels.backends.gpu.topk import search
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import FineCodes, RowCodes

_WORKSPACE_BYTES = 256 << 20  # of bounds that a search holds at once; ours
_QUERIES = 4096  # at a time, so that blocks of rows stay large; ours

# Of some rows and the mask's part for them, or None, the bounds float32 [Q, n]; -inf where masked.
Bounds = Callable[[RowCodes, Tensor | None], Tensor]


def nearest_codes(
    bounds_by: Callable[[FineCodes], Bounds],
    query: FineCodes,
    rows: RowCodes,
    depth: int,
    *,
    mask: Tensor | None,
    floor: Tensor | None,
    choose: Callable[..., tuple[Tensor, Tensor]] = search,
) -> Tensors:
    """Bounds and indices [Q, depth].

    Args:
        bounds_by: a backend's, of some queries.
        choose: as `search`.
    """
    rows = RowCodes(*(x.contiguous() for x in rows))
    found = []
    for some in zip(*(x.contiguous().split(_QUERIES) for x in query), strict=True):
        bounds_of, count = bounds_by(FineCodes(*some)), len(some[0])

        def scores_of(part: slice, bounds_of: Bounds = bounds_of) -> Tensor:
            hidden = None if mask is None else mask[part]
            return bounds_of(RowCodes(*(x[part] for x in rows)), hidden)

        step = max(1, _WORKSPACE_BYTES // (4 * max(1, count)))
        found.append(choose(some[2], len(rows.scale), depth, step, scores_of))
    bounds, index = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    unseen = bounds == -torch.inf
    if floor is not None:
        unseen |= bounds < floor.unsqueeze(1)
    return bounds.masked_fill(unseen, -torch.inf), index.masked_fill(unseen, -1)
