"""The grouped reward and its relatives on the CPU."""

from __future__ import annotations

from typing import Any

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
from elva_kernels.backends.launcher import Gradients, Tensors, saved_shape
from elva_kernels.backends.segments import occurrences
from elva_kernels.reference import Wanted, Weights, compute_dtype

_NOTHING: Wanted = (False, False, False)


def ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    relevance: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values alone."""
    inputs = (query, positive, negatives, mask, index, relevance)
    return _forward(*inputs, None, weights, None, _NOTHING)[:5]


def ranking_reward_saved(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    relevance: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values, and each candidate's two gradient coefficients and the query's one."""
    saved = _empty_saved(query, negatives, index)
    inputs = (query, positive, negatives, mask, index, relevance)
    return *_forward(*inputs, None, weights, saved, _NOTHING)[:5], saved


def ranking_reward_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    relevance: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Values and gradients in one pass over memory; a bank's gradient takes a second one."""
    inputs = (query, positive, negatives, mask, index, relevance)
    if index is None or not wrt[2]:
        return _forward(*inputs, upstream, weights, None, wrt)
    saved = _empty_saved(query, negatives, index)
    *results, _ = _forward(*inputs, upstream, weights, saved, (wrt[0], wrt[1], False))
    return *results, _bank_gradient(query, negatives, index, saved, upstream)


def ranking_reward_backward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    relevance: Tensor | None,
    saved: Tensor,
    grad_reward: Tensor,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Gradients from what was saved; reads the inputs again."""
    bank = index is not None and wrt[2]
    gradients = _empty_gradients(query, positive, negatives, (wrt[0], wrt[1], wrt[2] and not bank))
    if any(x is not None for x in gradients):
        module().reward_backward(
            DTYPE_CODES[query.dtype],
            torch.get_num_threads(),
            *_sizes(query, negatives, index),
            operand(query),
            operand(positive),
            operand(negatives),
            operand(index),
            operand(grad_reward),
            saved.data_ptr(),
            *(pointer(x) for x in gradients),
        )
    if index is None or not bank:
        return gradients
    return *gradients[:2], _bank_gradient(query, negatives, index, saved, grad_reward)


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
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    relevance: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    saved: Tensor | None,
    wrt: Wanted,
) -> Gradients:
    """The values and the gradients in `wrt`; fills in what is saved, where that is given."""
    values = _empty_values(query, negatives if index is None else index.unsqueeze(-1))
    gradients = _empty_gradients(query, positive, negatives, wrt)
    module().reward_forward(
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        *_sizes(query, negatives, index),
        operand(query),
        operand(positive),
        operand(negatives),
        operand(mask),
        pointer(relevance),
        operand(index),
        operand(upstream),
        weights,
        *[x.data_ptr() for x in values],
        pointer(saved),
        *[pointer(x) for x in gradients],
    )
    return *values, *gradients


def _bank_gradient(
    query: Tensor, bank: Tensor, index: Tensor, saved: Tensor, upstream: Tensor | None
) -> Tensor:
    """The gradient [M, D] of a bank whose rows the index names."""
    gradient = empty_gradient(bank)
    order, first = occurrences(index, len(bank))
    module().bank_gradient(
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        *_sizes(query, bank, index),
        operand(query),
        operand(bank),
        operand(upstream),
        saved.data_ptr(),
        order.data_ptr(),
        first.data_ptr(),
        gradient.data_ptr(),
    )
    return gradient


def _sizes(query: Tensor, negatives: Tensor, index: Tensor | None) -> tuple[Any, int, int, int]:
    """The leading shape, N, D, and the rows of a bank."""
    n, dim = negatives.shape[-2:]
    leading = tuple(query.shape[:-1])
    return (leading, n, dim, 0) if index is None else (leading, index.shape[-1], dim, n)


def _empty_saved(query: Tensor, negatives: Tensor, index: Tensor | None) -> Tensor:
    leading, n, _, _ = _sizes(query, negatives, index)
    return torch.empty(saved_shape((*leading, n + 1)), dtype=torch.float64)


def _empty_gradients(query: Tensor, positive: Tensor, negatives: Tensor, wrt: Wanted) -> Gradients:
    inputs = (query, positive, negatives)
    return tuple(
        empty_gradient(x) if wanted else None for x, wanted in zip(inputs, wrt, strict=True)
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


def _empty_values(query: Tensor, rows: Tensor) -> Tensors:
    leading, dtype = rows.shape[:-2], compute_dtype(query.dtype)
    reward = empty(leading, dtype)
    return (
        reward,
        torch.empty_like(reward),
        torch.empty_like(reward),
        empty(leading, torch.int32),
        torch.empty(*leading, rows.shape[-2] + 1, dtype=dtype),
    )
