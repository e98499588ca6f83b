"""What a backend must get right before "auto" uses it: codes of rows, and the search among them."""

from __future__ import annotations

import torch
from torch import Tensor

from elva_kernels import reference
from elva_kernels.backends.admission.topk import check_found
from elva_kernels.backends.admission.trial import Launchers, Trial, Wrong, check
from elva_kernels.reference import FineCodes, RowCodes

_DIMS = (77, 512)  # rows that are not on 16 bytes, and rows that are
_ROWS = 400  # more than a block of a GPU's, and than a depth that is chosen in one pass
_TIMES = 12  # the queries so many times: more than are taken in one pass
_ROOM = 2e-6  # that SCORE_ERROR leaves for a bound's own arithmetic


def _rows(count: int, dim: int) -> Tensor:
    """Random ones, the second of them zero and the third not finite."""
    with torch.device("cpu"):  # whatever the default device is
        generator = torch.Generator().manual_seed(dim)
        rows = torch.randn(count, dim, generator=generator)
    rows[1] = 0
    rows[2, dim // 2] = torch.nan
    return rows


def _try_row_codes(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    for dim in _DIMS:
        rows = _rows(40, dim).to(dtype)
        code, fine, scale, lost = (x.cpu() for x in launchers("row_codes")(rows.to(device), soft))
        # By both bytes: what lies half way between two codes may be rounded to either.
        truth = reference.fine_codes(rows.double())
        if soft:
            exact = truth.code + truth.fine.double() / 256
            rounding = torch.tensor(4 / 256, device="cpu")
            check("code", code + fine.double() / 256, exact, rounding, torch.float32)
        else:
            check("code", code, truth.code, (truth.fine.short().abs() >= 124).double())
            truth = truth._replace(lost=reference.row_codes(rows.double()).lost)
        exact = 127 * truth.scale
        check("scale", 127 * scale, exact, 1e-5 * exact)
        check("lost", lost, truth.lost, 1e-4 * truth.lost.nan_to_num(posinf=0.0))


def _try_nearest_codes(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    del dtype  # codes have none
    depth = 300 if soft else 20
    for dim in _DIMS:
        rows = reference.row_codes(_rows(_ROWS, dim))
        query = reference.fine_codes(_rows(4, dim))
        mask = torch.arange(_ROWS, device="cpu") % 7 != 3 if soft else None
        truth = reference.nearest_codes(query, rows, depth, mask=mask)
        for times in (1, _TIMES):
            found = launchers("nearest_codes")(
                FineCodes(*(torch.cat([x] * times).to(device) for x in query)),
                RowCodes(*(x.to(device) for x in rows)),
                depth,
                mask=None if mask is None else mask.to(device),
                floor=None,
            )
            right = reference.TopK(*(x.repeat(times, 1) for x in truth))
            check_found(found, right, "bounds")
            if bool((found[0].cpu() < right.scores - _ROOM).any()):
                raise Wrong("bounds are below those of the reference")


TRIALS: dict[str, Trial] = {"row_codes": _try_row_codes, "nearest_codes": _try_nearest_codes}
