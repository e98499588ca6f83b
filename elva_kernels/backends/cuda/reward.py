"""The grouped reward by the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, operand, pointer
from elva_kernels.backends.cuda import launch
from elva_kernels.backends.launcher import Tensors, saved_shape
from elva_kernels.reference import Wanted, Weights

_OP = "ranking_reward"  # for messages


def ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values alone."""
    return _forward(query, positive, negatives, mask, None, weights)


def ranking_reward_saved(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values, and coefficients for the backward."""
    saved = _empty_saved(negatives)
    return *_forward(query, positive, negatives, mask, None, weights, saved), saved


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
    """Values and gradients: one read and one write where a cluster holds a group."""
    gradients = _empty_gradients(query, positive, negatives)
    saved = _empty_saved(negatives)  # for groups that no cluster holds
    values = _forward(query, positive, negatives, mask, upstream, weights, saved, gradients)
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
    gradients = _empty_gradients(query, positive, negatives)
    n, dim = negatives.shape[-2:]
    launch.call(
        _OP,
        launch.module().cuda_reward_backward,
        DTYPE_CODES[query.dtype],
        launch.place(query),
        tuple(negatives.shape[:-2]),
        n,
        dim,
        0,
        operand(query),
        operand(positive),
        operand(negatives),
        None,
        operand(grad_reward),
        saved.data_ptr(),
        *(x.data_ptr() for x in gradients),
    )
    return gradients


def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    saved: Tensor | None = None,
    gradients: tuple[Tensor | None, ...] = (None, None, None),
) -> Tensors:
    *leading, n, dim = negatives.shape
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
        dim,
        0,
        operand(query),
        operand(positive),
        operand(negatives),
        operand(mask),
        None,
        operand(upstream),
        weights,
        *(x.data_ptr() for x in values),
        pointer(saved),
        *(pointer(x) for x in gradients),
    )
    return values


def _empty_saved(negatives: Tensor) -> Tensor:
    *leading, n, _ = negatives.shape
    return negatives.new_empty(saved_shape((*leading, n + 1)), dtype=torch.float64)


def _empty_gradients(*inputs: Tensor) -> Tensors:
    return tuple(x.new_empty(x.shape) for x in inputs)
