"""The grouped reward and its relatives on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from elva_kernels import reference
from elva_kernels.backends.boundary import (
    DTYPE_CODES,
    SCALE_CODES,
    empty,
    empty_gradient,
    module,
    operand,
    pointer,
)
from elva_kernels.backends.launcher import Gradients, Groups, Tensors
from elva_kernels.backends.segments import occurrences
from elva_kernels.reference import Wanted, Weights, compute_dtype

_NOTHING: Wanted = (False, False, False)


def ranking_reward(groups: Groups, weights: Weights) -> Tensors:
    """Values alone."""
    return _forward(groups, None, weights, None, _NOTHING)[:5]


def ranking_reward_saved(groups: Groups, weights: Weights) -> Tensors:
    """Values, and each candidate's two gradient coefficients and the query's one."""
    saved = groups.empty_saved()
    return *_forward(groups, None, weights, saved, _NOTHING)[:5], saved


def ranking_reward_and_grad(
    groups: Groups,
    upstream: Tensor | None,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Values and gradients in one pass over memory; a bank's gradient takes a second one."""
    index = groups.negative_index
    if index is None or not wrt[2]:
        return _forward(groups, upstream, weights, None, wrt)
    saved = groups.empty_saved()
    *results, _ = _forward(groups, upstream, weights, saved, groups.in_groups(wrt))
    return *results, _bank_gradient(groups, index, saved, upstream)


def ranking_reward_backward(
    groups: Groups,
    saved: Tensor,
    grad_reward: Tensor,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Gradients from what was saved; reads the inputs again."""
    index = groups.negative_index
    gradients = _empty_gradients(groups, groups.in_groups(wrt))
    if any(x is not None for x in gradients):
        module().reward_backward(
            DTYPE_CODES[groups.query.dtype],
            torch.get_num_threads(),
            *groups.sizes,
            *map(operand, groups[:3]),
            operand(groups.negative_index),
            operand(grad_reward),
            saved.data_ptr(),
            *(pointer(x) for x in gradients),
        )
    if index is None or not wrt[2]:
        return gradients
    return *gradients[:2], _bank_gradient(groups, index, saved, grad_reward)


def reward_from_scores(
    scores: Tensor, mask: Tensor | None, relevance: Tensor | None, weights: Weights
) -> Tensors:
    """Values of given scores [*, C], the positive's first, and the live ones of those."""
    leading, dtype = scores.shape[:-1], compute_dtype(scores.dtype)
    reward = empty(leading, dtype)
    rank = empty(leading, torch.int32)
    values = (reward, torch.empty_like(reward), torch.empty_like(reward), rank)
    _from_scores(scores, mask, relevance, None, weights, [x.data_ptr() for x in values], 0)
    return *values, reference.live_scores(scores, mask)


def reward_from_scores_backward(
    scores: Tensor,
    mask: Tensor | None,
    relevance: Tensor | None,
    grad_reward: Tensor,
    weights: Weights,
) -> Tensors:
    """The gradient of sum(grad_reward * reward) on `scores`: [*, C], in the scores' dtype."""
    grad_scores = empty_gradient(scores)
    no_values = [0, 0, 0, 0]
    _from_scores(scores, mask, relevance, grad_reward, weights, no_values, grad_scores.data_ptr())
    return (grad_scores,)


def group_advantages(reward: Tensor, *, scale: str, std_eps: float) -> Tensors:
    """Of rewards [*, G], in float32 (float64 for float64)."""
    *leading, size = reward.shape
    advantages = torch.empty(reward.shape, dtype=compute_dtype(reward.dtype))
    module().group_advantages(
        DTYPE_CODES[reward.dtype],
        torch.get_num_threads(),
        tuple(leading),
        size,
        operand(reward),
        SCALE_CODES[scale],
        std_eps,
        reference.SAME_REWARD,
        advantages.data_ptr(),
    )
    return (advantages,)


def _forward(
    groups: Groups,
    upstream: Tensor | None,
    weights: Weights,
    saved: Tensor | None,
    wrt: Wanted,
) -> Gradients:
    """The values and the gradients in `wrt`; fills in what is saved, where that is given."""
    values, gradients = _empty_values(groups), _empty_gradients(groups, wrt)
    module().reward_forward(
        DTYPE_CODES[groups.query.dtype],
        torch.get_num_threads(),
        *groups.sizes,
        *map(operand, groups[:4]),
        pointer(groups.relevance),
        operand(groups.negative_index),
        operand(upstream),
        weights,
        *[x.data_ptr() for x in values],
        pointer(saved),
        *[pointer(x) for x in gradients],
    )
    return *values, *gradients


def _bank_gradient(groups: Groups, index: Tensor, saved: Tensor, upstream: Tensor | None) -> Tensor:
    """The gradient [M, D] of a bank whose rows the index names."""
    gradient = empty_gradient(groups.negatives)
    order, first = occurrences(index, len(gradient))
    module().bank_gradient(
        DTYPE_CODES[groups.query.dtype],
        torch.get_num_threads(),
        *groups.sizes,
        operand(groups.query),
        operand(groups.negatives),
        operand(upstream),
        *(x.data_ptr() for x in (saved, order, first, gradient)),
    )
    return gradient


def _empty_gradients(groups: Groups, wrt: Wanted) -> Gradients:
    return tuple(
        empty_gradient(x) if wanted else None for x, wanted in zip(groups[:3], wrt, strict=True)
    )


def _from_scores(
    scores: Tensor,
    mask: Tensor | None,
    relevance: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    values: list[int],
    grad_scores: int,
) -> None:
    """Fills in what has an address: the four values, the gradient."""
    module().reward_from_scores(
        DTYPE_CODES[scores.dtype],
        torch.get_num_threads(),
        tuple(scores.shape[:-1]),
        scores.shape[-1],
        operand(scores),
        operand(mask),
        pointer(relevance),
        operand(upstream),
        weights,
        *values,
        grad_scores,
    )


def _empty_values(groups: Groups) -> Tensors:
    leading, dtype = groups.leading, compute_dtype(groups.query.dtype)
    reward = empty(leading, dtype)
    return (
        reward,
        torch.empty_like(reward),
        torch.empty_like(reward),
        empty(leading, torch.int32),
        torch.empty(*leading, groups.n + 1, dtype=dtype),
    )
