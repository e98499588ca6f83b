"""The grouped reward by the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, empty, operand, pointer
from elva_kernels.backends.cuda import launch
from elva_kernels.backends.launcher import Gradients, Tensors, saved_shape
from elva_kernels.backends.segments import occurrences
from elva_kernels.reference import Wanted, Weights

_OP = "ranking_reward"  # for messages


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
    return _forward(query, positive, negatives, mask, index, relevance, None, weights)


def ranking_reward_saved(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    relevance: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values, and coefficients for the backward."""
    saved = _empty_saved(query, negatives, index)
    inputs = (query, positive, negatives, mask, index, relevance)
    return *_forward(*inputs, None, weights, saved), saved


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
    """Values and gradients: one read and one write where a cluster holds a group."""
    gradients: Any = _empty_gradients(query, positive, negatives, index, wrt)
    # For groups that no cluster holds, and for the bank.
    saved = _empty_saved(query, negatives, index)
    inputs = (query, positive, negatives, mask, index, relevance)
    values = _forward(*inputs, upstream, weights, saved, gradients)
    if index is not None and wrt[2]:
        gradients[2] = _bank_gradient(query, negatives, index, saved, upstream)
    return *values, *gradients


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
    """Gradients from what was saved; reads the inputs again, but not their relevance."""
    gradients: Any = _empty_gradients(query, positive, negatives, index, wrt)
    if any(x is not None for x in gradients):
        launch.call(
            _OP,
            launch.module().cuda_reward_backward,
            DTYPE_CODES[query.dtype],
            launch.place(query),
            *_sizes(query, negatives, index),
            operand(query),
            operand(positive),
            operand(negatives),
            operand(index),
            operand(grad_reward),
            saved.data_ptr(),
            *(pointer(x) for x in gradients),
        )
    if index is not None and wrt[2]:
        gradients[2] = _bank_gradient(query, negatives, index, saved, grad_reward)
    return tuple(gradients)


def _bank_gradient(
    query: Tensor, bank: Tensor, index: Tensor, saved: Tensor, upstream: Tensor | None
) -> Tensor:
    """The gradient of sum(upstream * reward) on the bank, from what a forward saved."""
    order, first = occurrences(index, len(bank))
    gradient = torch.empty_like(bank, memory_format=torch.contiguous_format)
    launch.call(
        _OP,
        launch.module().cuda_bank_gradient,
        DTYPE_CODES[query.dtype],
        launch.place(query),
        *_sizes(query, bank, index),
        operand(query),
        operand(bank),
        operand(upstream),
        *(x.data_ptr() for x in (saved, order, first, gradient)),
    )
    return gradient


def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    relevance: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    saved: Tensor | None = None,
    gradients: Sequence[Tensor | None] = (None, None, None),
) -> Tensors:
    leading, n, *rest = _sizes(query, negatives, index)
    device = query.device
    values = (
        *(empty(leading, torch.float32, device) for _ in range(3)),
        empty(leading, torch.int32, device),
        empty((*leading, n + 1), torch.float32, device),
    )
    size = launch.module().cuda_reward_scratch_bytes(values[0].numel(), n)
    scratch = query.new_empty(size, dtype=torch.uint8) if size else None
    launch.call(
        _OP,
        launch.module().cuda_reward_forward,
        DTYPE_CODES[query.dtype],
        (*launch.place(query), pointer(scratch)),
        leading,
        n,
        *rest,
        operand(query),
        operand(positive),
        operand(negatives),
        operand(mask),
        pointer(relevance),
        operand(index),
        operand(upstream),
        weights,
        *(x.data_ptr() for x in values),
        pointer(saved),
        *(pointer(x) for x in gradients),
    )
    return values


def _sizes(query: Tensor, negatives: Tensor, index: Tensor | None) -> tuple[Any, ...]:
    """The leading shape, a group's negatives, D, and the rows of the bank, if there is one."""
    leading, dim = tuple(query.shape[:-1]), query.shape[-1]
    if index is None:
        return leading, negatives.shape[-2], dim, 0
    return leading, index.shape[-1], dim, len(negatives)


def _empty_saved(query: Tensor, negatives: Tensor, index: Tensor | None) -> Tensor:
    leading, n, *_ = _sizes(query, negatives, index)
    return empty(saved_shape((*leading, n + 1)), torch.float64, query.device)


def _empty_gradients(
    query: Tensor, positive: Tensor, negatives: Tensor, index: Tensor | None, wrt: Wanted
) -> list[Tensor | None]:
    """Those that the forward and the backward write: a bank's is made of what they save."""
    written = zip((query, positive, negatives), (*wrt[:2], wrt[2] and index is None), strict=True)
    dense = torch.contiguous_format
    return [torch.empty_like(x, memory_format=dense) if wanted else None for x, wanted in written]
