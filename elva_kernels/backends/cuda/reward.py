"""The grouped reward by the CUDA kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, empty, operand, pointer
from elva_kernels.backends.cuda import launch
from elva_kernels.backends.launcher import Gradients, Groups, Tensors
from elva_kernels.backends.segments import occurrences
from elva_kernels.reference import Wanted, Weights

_OP = "ranking_reward"  # for messages


def ranking_reward(groups: Groups, weights: Weights) -> Tensors:
    """Values alone."""
    return _forward(groups, None, weights)


def ranking_reward_saved(groups: Groups, weights: Weights) -> Tensors:
    """Values, and coefficients for the backward."""
    saved = groups.empty_saved()
    return *_forward(groups, None, weights, saved), saved


def ranking_reward_and_grad(
    groups: Groups,
    upstream: Tensor | None,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Values and gradients: one read and one write where a cluster holds a group."""
    gradients = _empty_gradients(groups, wrt)
    saved = groups.empty_saved()  # for groups that no cluster holds, and for the bank
    values = _forward(groups, upstream, weights, saved, gradients)
    return *values, *_with_bank(gradients, groups, saved, upstream, wrt)


def ranking_reward_backward(
    groups: Groups,
    saved: Tensor,
    grad_reward: Tensor,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Gradients from what was saved; reads the inputs again, but not their relevance."""
    gradients = _empty_gradients(groups, wrt)
    if any(x is not None for x in gradients):
        launch.call(
            _OP,
            launch.module().cuda_reward_backward,
            DTYPE_CODES[groups.query.dtype],
            launch.place(groups.query),
            *groups.sizes,
            *map(operand, groups[:3]),
            operand(groups.negative_index),
            operand(grad_reward),
            saved.data_ptr(),
            *(pointer(x) for x in gradients),
        )
    return _with_bank(gradients, groups, saved, grad_reward, wrt)


def _with_bank(
    gradients: Gradients, groups: Groups, saved: Tensor, upstream: Tensor | None, wrt: Wanted
) -> Gradients:
    """With the gradient of sum(upstream * reward) on a bank, from what a forward saved."""
    index = groups.negative_index
    if index is None or not wrt[2]:
        return gradients
    query, _, bank, *_ = groups
    order, first = occurrences(index, len(bank))
    gradient = torch.empty_like(bank, memory_format=torch.contiguous_format)
    launch.call(
        _OP,
        launch.module().cuda_bank_gradient,
        DTYPE_CODES[query.dtype],
        launch.place(query),
        *groups.sizes,
        operand(query),
        operand(bank),
        operand(upstream),
        *(x.data_ptr() for x in (saved, order, first, gradient)),
    )
    return *gradients[:2], gradient


def _forward(
    groups: Groups,
    upstream: Tensor | None,
    weights: Weights,
    saved: Tensor | None = None,
    gradients: Gradients = (None, None, None),
) -> Tensors:
    leading, n, *rest = groups.sizes
    query, device = groups.query, groups.query.device
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
        *map(operand, groups[:4]),
        pointer(groups.relevance),
        operand(groups.negative_index),
        operand(upstream),
        weights,
        *(x.data_ptr() for x in values),
        pointer(saved),
        *(pointer(x) for x in gradients),
    )
    return values


def _empty_gradients(groups: Groups, wrt: Wanted) -> Gradients:
    """Those that the forward and the backward write."""
    written = zip(groups[:3], groups.in_groups(wrt), strict=True)
    dense = torch.contiguous_format
    return tuple(
        torch.empty_like(x, memory_format=dense) if wanted else None for x, wanted in written
    )
