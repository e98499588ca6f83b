"""The grouped reward by the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, operand, pointer
from elva_kernels.backends.cuda import launch
from elva_kernels.backends.launcher import Tensors, saved_shape
from elva_kernels.backends.segments import occurrences
from elva_kernels.reference import Weights

_OP = "ranking_reward"  # for messages
Wanted = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, ...]


def ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values alone."""
    return _forward(query, positive, negatives, mask, index, None, weights)


def ranking_reward_saved(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values, and coefficients for the backward."""
    saved = _empty_saved(query, negatives, index)
    return *_forward(query, positive, negatives, mask, index, None, weights, saved), saved


def ranking_reward_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Values and gradients: one read and one write where a cluster holds a group."""
    inputs = (query, positive, negatives, mask, index)
    gradients = _empty_gradients(*inputs, wrt)
    # For groups that no cluster holds, and for the bank.
    saved = _empty_saved(query, negatives, index) if any(wrt) else None
    values = _forward(*inputs, upstream, weights, saved, gradients)
    if index is not None and wrt[2] and saved is not None:
        gradients = (*gradients[:2], _bank_gradient(query, negatives, index, saved, upstream))
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
) -> Gradients:
    """Gradients from what was saved; reads the inputs again."""
    gradients = _empty_gradients(query, positive, negatives, mask, index, wrt)
    if any(x is not None for x in gradients):
        launch.call(
            _OP,
            launch.module().cuda_reward_backward,
            DTYPE_CODES[query.dtype],
            launch.place(query),
            tuple(query.shape[:-1]),
            _count(negatives, index),
            query.shape[-1],
            operand(query),
            operand(positive),
            operand(negatives),
            operand(index),
            negatives.shape[0] if index is not None else 0,
            operand(grad_reward),
            saved.data_ptr(),
            *(pointer(x) for x in gradients),
        )
    if index is not None and wrt[2]:
        gradients = (*gradients[:2], _bank_gradient(query, negatives, index, saved, grad_reward))
    return gradients


def _bank_gradient(
    query: Tensor, bank: Tensor, index: Tensor, saved: Tensor, upstream: Tensor | None
) -> Tensor:
    """The gradient of sum(upstream * reward) on the bank, from what a forward saved."""
    rows, dim = bank.shape
    order, first = occurrences(index, rows)
    gradient = bank.new_empty(rows, dim)
    launch.call(
        _OP,
        launch.module().cuda_bank_gradient,
        DTYPE_CODES[query.dtype],
        launch.place(query),
        tuple(query.shape[:-1]),
        index.shape[-1],
        dim,
        rows,
        operand(query),
        operand(bank),
        operand(upstream),
        saved.data_ptr(),
        order.data_ptr(),
        first.data_ptr(),
        gradient.data_ptr(),
    )
    return gradient


def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    saved: Tensor | None = None,
    gradients: Gradients = (None, None, None),
) -> Tensors:
    leading, n = query.shape[:-1], _count(negatives, index)
    reward, margin_reward, rank_reward = (
        query.new_empty(leading, dtype=torch.float32) for _ in range(3)
    )
    rank = query.new_empty(leading, dtype=torch.int32)
    scores = query.new_empty((*leading, n + 1), dtype=torch.float32)
    values = (reward, margin_reward, rank_reward, rank, scores)
    size = launch.module().cuda_reward_scratch_bytes(reward.numel(), n)
    scratch = query.new_empty(size, dtype=torch.uint8) if size else None
    launch.call(
        _OP,
        launch.module().cuda_reward_forward,
        DTYPE_CODES[query.dtype],
        (*launch.place(query), pointer(scratch)),
        tuple(leading),
        n,
        query.shape[-1],
        operand(query),
        operand(positive),
        operand(negatives),
        operand(mask),
        operand(index),
        negatives.shape[0] if index is not None else 0,
        operand(upstream),
        weights,
        *(x.data_ptr() for x in values),
        pointer(saved),
        *(pointer(x) for x in gradients),
    )
    return values


def _count(negatives: Tensor, index: Tensor | None) -> int:
    """Negatives of a group."""
    return negatives.shape[-2] if index is None else index.shape[-1]


def _empty_saved(query: Tensor, negatives: Tensor, index: Tensor | None) -> Tensor:
    shape = saved_shape((*query.shape[:-1], _count(negatives, index) + 1))
    return query.new_empty(shape, dtype=torch.float64)


def _empty_gradients(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    wrt: Wanted,
) -> Gradients:
    """Those that the forward and the backward write: a bank's is made of what they save."""
    wanted = (wrt[0], wrt[1], wrt[2] and index is None)
    inputs = (query, positive, negatives)
    return tuple(x.new_empty(x.shape) if w else None for x, w in zip(inputs, wanted, strict=True))
