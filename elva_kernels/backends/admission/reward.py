"""What a backend must get right before "auto" uses it: the grouped reward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elva_kernels import reference
from elva_kernels.backends.admission.trial import TEMPERATURE, WEIGHTS, Launchers, Trial, check
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import ALL, Weights


class _Case(NamedTuple):
    """Inputs on the device, and what must come of them, in float64 on the CPU."""

    inputs: tuple[Any, ...]  # query, positive, negatives, mask, and no index
    upstream: Tensor
    weights: Weights
    truth: reference.RankingReward
    gradients: Tensors
    norms: Tensors  # of the rows that the gradients are of


def _case(dtype: torch.dtype, device: torch.device, soft: bool) -> _Case:
    """Ragged sizes, wide strides, a tie, a zero row, masked NaN, huge rows, a group with NaN."""
    with torch.device("cpu"):  # whatever the default device is
        return _case_from(torch.Generator().manual_seed(1), dtype, device, soft)


def _case_from(
    generator: torch.Generator, dtype: torch.dtype, device: torch.device, soft: bool
) -> _Case:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, positive, negatives = randn(4, 77), randn(4, 77), randn(4, 9, 2 * 77)
    positive += query
    negatives[..., ::2] += torch.linspace(-1, 1, 9).double()[:, None] * query[:, None]
    negatives[0, 2, ::2] = positive[0]
    negatives[1, 4] = 0
    negatives[2] *= 2.0 ** (8 if dtype == torch.float16 else 70)
    mask = torch.rand(4, 9, generator=generator) < 0.8
    mask[0, 2] = mask[1, 4] = mask[3, 5] = True
    mask[1, 6] = mask[3, 8] = False
    negatives[~mask] = torch.nan
    negatives[3, 5, 8] = torch.nan
    rounded = [x.to(dtype) for x in (query, positive, negatives)]
    inputs = (*(x.to(device) for x in rounded), mask.to(device))
    exact = [rounded[0].double(), rounded[1].double(), rounded[2][..., ::2].double()]
    upstream = randn(4).to(reference.compute_dtype(dtype))
    weights = WEIGHTS._replace(rank_temperature=TEMPERATURE if soft else 0.0)
    truth, *gradients = reference.ranking_reward_and_grad(
        exact[0], exact[1], exact[2], mask, upstream.double(), weights
    )
    return _Case(
        (inputs[0], inputs[1], inputs[2][..., ::2], inputs[3], None),
        upstream.to(device),
        weights,
        truth,
        tuple(x for x in gradients if x is not None),
        tuple(x.norm(dim=-1, keepdim=True) for x in exact),
    )


def _try_values(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    case = _case(dtype, device, soft)
    _check_values(launchers("ranking_reward")(*case.inputs, case.weights), case.truth)


def _try_autograd(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    """The forward that saves and the backward: neither means anything without the other."""
    case = _case(dtype, device, soft)
    *values, saved = launchers("ranking_reward_saved")(*case.inputs, case.weights)
    _check_values(values, case.truth)
    backward = launchers("ranking_reward_backward")
    _check_gradients(backward(*case.inputs, saved, case.upstream, case.weights, ALL), case)


def _try_value_and_grad(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    case = _case(dtype, device, soft)
    launch = launchers("ranking_reward_and_grad")
    results = launch(*case.inputs, case.upstream, case.weights, ALL)
    _check_values(results[:5], case.truth)
    _check_gradients(results[5:], case)


def _try_scores(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    case = _case(dtype, device, soft)
    scores, mask = case.truth.scores.to(dtype), case.inputs[3]
    truth = reference.reward_from_scores(scores.double(), mask.cpu(), case.weights)
    _check_values(launchers("reward_from_scores")(scores.to(device), mask, case.weights), truth)


def _try_scores_backward(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    case = _case(dtype, device, soft)
    scores, mask = case.truth.scores.to(dtype), case.inputs[3]
    truth = reference.reward_from_scores_backward(
        scores.double(), mask.cpu(), case.upstream.cpu().double(), case.weights
    )
    launch = launchers("reward_from_scores_backward")
    (gradient,) = launch(scores.to(device), mask, case.upstream, case.weights)
    check("grad_scores", gradient, truth, torch.finfo(dtype).eps * truth.abs())


TRIALS: dict[str, Trial] = {
    "ranking_reward": _try_values,
    "ranking_reward_saved": _try_autograd,
    "ranking_reward_backward": _try_autograd,
    "ranking_reward_and_grad": _try_value_and_grad,
    "reward_from_scores": _try_scores,
    "reward_from_scores_backward": _try_scores_backward,
}


def _check_values(found: Iterable[Tensor], truth: reference.RankingReward) -> None:
    for name, actual, expected in zip(truth._fields, found, truth, strict=True):
        check(name, actual, expected, torch.zeros_like(expected, dtype=torch.float64))


def _check_gradients(found: Iterable[Tensor], case: _Case) -> None:
    names = ("grad_query", "grad_positive", "grad_negatives")
    for name, actual, truth, norm in zip(names, found, case.gradients, case.norms, strict=True):
        scale = norm.nan_to_num()
        rounding = torch.finfo(actual.dtype).eps * truth.abs() * scale
        if actual.dtype == torch.float16:  # subnormal gradients of huge rows
            rounding = rounding + 2.0**-25 * scale
        check(name, actual.cpu().double() * scale, truth * scale, rounding, actual.dtype)
