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
)
from elva_kernels.backends.launcher import Tensors, saved_shape
from elva_kernels.reference import Wanted, Weights, compute_dtype

_NOWHERE = (0, 0, 0)  # of gradients that are not wanted


def ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values alone."""
    values = _empty_values(query, negatives)
    _forward(query, positive, negatives, mask, None, weights, values, 0, _NOWHERE)
    return values


def ranking_reward_saved(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values, and each candidate's two gradient coefficients and the query's one."""
    values = _empty_values(query, negatives)
    saved = torch.empty(saved_shape(values[-1].shape), dtype=torch.float64)
    _forward(query, positive, negatives, mask, None, weights, values, saved.data_ptr(), _NOWHERE)
    return *values, saved


def ranking_reward_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    wrt: Wanted,
) -> Tensors:
    """Values and gradients in one pass over memory."""
    values = _empty_values(query, negatives)
    gradients = (empty_gradient(query), empty_gradient(positive), empty_gradient(negatives))
    addresses = tuple(x.data_ptr() for x in gradients)
    _forward(query, positive, negatives, mask, upstream, weights, values, 0, addresses)
    return *values, *gradients


def ranking_reward_backward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    saved: Tensor,
    grad_reward: Tensor,
    weights: Weights,
    wrt: Wanted,
) -> Tensors:
    """Gradients from what was saved; reads the inputs again."""
    gradients = (empty_gradient(query), empty_gradient(positive), empty_gradient(negatives))
    n, dim = negatives.shape[-2:]
    module().reward_backward(
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        tuple(negatives.shape[:-2]),
        n,
        dim,
        operand(query),
        operand(positive),
        operand(negatives),
        operand(grad_reward),
        saved.data_ptr(),
        *(x.data_ptr() for x in gradients),
    )
    return gradients


def reward_from_scores(scores: Tensor, mask: Tensor | None, weights: Weights) -> Tensors:
    """Values of given scores [*, C], the positive's first, and the live ones of those."""
    leading, dtype = scores.shape[:-1], compute_dtype(scores.dtype)
    reward = empty(leading, dtype)
    rank = empty(leading, torch.int32)
    values = (reward, torch.empty_like(reward), torch.empty_like(reward), rank)
    _from_scores(scores, mask, None, weights, [x.data_ptr() for x in values], 0)
    return *values, reference.live_scores(scores, mask)


def reward_from_scores_backward(
    scores: Tensor, mask: Tensor | None, grad_reward: Tensor, weights: Weights
) -> Tensors:
    """The gradient of sum(grad_reward * reward) on `scores`: [*, C], in the scores' dtype."""
    grad_scores = empty_gradient(scores)
    no_values = [0, 0, 0, 0]
    _from_scores(scores, mask, grad_reward, weights, no_values, grad_scores.data_ptr())
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
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    values: Tensors,
    saved: int,
    gradients: tuple[int, ...],
) -> None:
    """Fills the values in, and where an address is given also what is saved and the gradients."""
    n, dim = negatives.shape[-2:]
    module().reward_forward(
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        tuple(negatives.shape[:-2]),
        n,
        dim,
        operand(query),
        operand(positive),
        operand(negatives),
        operand(mask),
        operand(upstream),
        weights,
        *[x.data_ptr() for x in values],
        saved,
        *gradients,
    )


def _from_scores(
    scores: Tensor,
    mask: Tensor | None,
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
        operand(upstream),
        weights,
        *values,
        grad_scores,
    )


def _empty_values(query: Tensor, negatives: Tensor) -> Tensors:
    leading, dtype = negatives.shape[:-2], compute_dtype(query.dtype)
    reward = empty(leading, dtype)
    return (
        reward,
        torch.empty_like(reward),
        torch.empty_like(reward),
        empty(leading, torch.int32),
        torch.empty(*leading, negatives.shape[-2] + 1, dtype=dtype),
    )
