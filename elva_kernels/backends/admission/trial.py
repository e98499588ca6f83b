"""What a trial is, and how its results are held against the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from elva_kernels.backends.launcher import Launcher
from elva_kernels.reference import Weights, compute_dtype

Launchers = Callable[[str], Launcher]  # a backend's launcher of any op
# (launchers of a backend, dtype, device, variant: soft ranks, symmetric, a small k or head)
# -> None, or raises Wrong.
Trial = Callable[[Launchers, torch.dtype, torch.device, bool], None]

WEIGHTS = Weights(margin=-0.9, rank_penalty=0.05, w_margin=0.4, w_rank=0.6)
TEMPERATURE = 0.1
# Errors of a wrong kernel are orders above these; those of a right one are below by as much.
_ALLOWED = {torch.float32: 2e-5, torch.float64: 1e-11}


class Wrong(Exception):
    """A result that is not the reference's."""


def check(
    name: str,
    found: Tensor,
    truth: Tensor,
    rounding: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raises Wrong where a result is further from the truth than its dtype explains."""
    allowed = _ALLOWED[compute_dtype(dtype or found.dtype)]
    if not found.is_floating_point():
        allowed = 0.0
    actual, expected = found.cpu().double(), truth.double()
    if actual.shape != expected.shape:
        raise Wrong(f"{name} has shape {list(actual.shape)}, not {list(expected.shape)}")
    # Where both are infinite or both NaN, a difference would be NaN.
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs() - rounding)
    if not bool((error <= allowed).all()):
        worst = error.nan_to_num(nan=torch.inf).max().item()
        raise Wrong(f"{name} is {worst:.1e} from the reference, allowed are {allowed:.0e}")
