"""The grouped reward and its relatives by the Triton kernels.

Kernels are imported when they are first launched, for they import triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.launcher import Gradients, Groups, Tensors
from elva_kernels.backends.segments import occurrences
from elva_kernels.backends.triton import launch
from elva_kernels.reference import Wanted, Weights, compute_dtype

_NONE: Gradients = (None, None, None)


def ranking_reward(groups: Groups, weights: Weights) -> Tensors:
    """Values alone: reward, margin_reward, rank_reward, rank, scores."""
    return _reward(groups, None, weights, None, _NONE)


def ranking_reward_saved(groups: Groups, weights: Weights) -> Tensors:
    """Values, and coefficients for the backward."""
    saved = groups.empty_saved(launch.empty)
    return *_reward(groups, None, weights, saved, _NONE), saved


def ranking_reward_and_grad(
    groups: Groups,
    upstream: Tensor | None,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Values, and the gradients of sum(upstream * reward), None where they are not in `wrt`."""
    saved, gradients = groups.empty_saved(launch.empty), _empty_gradients(groups, wrt)
    values = _reward(groups, upstream, weights, saved, gradients)
    return *values, *_with_bank(gradients, groups, saved, upstream, wrt)


def ranking_reward_backward(
    groups: Groups,
    saved: Tensor,
    grad_reward: Tensor,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    """Gradients of sum(grad_reward * reward); reads the inputs again, but not their relevance."""
    from elva_kernels.backends.triton.kernels.reward import gradient_kernel

    gradients = _empty_gradients(groups, wrt)
    sizes = _blocks(groups)
    tensors = (*_operands(groups), grad_reward, saved, *gradients)
    launches = () if gradients == _NONE else launch.parts(groups.leading, tensors)
    for part, (inner, programs), strides in launches:
        with launch.on(groups.query.device):
            gradient_kernel[(programs,)](
                *part[:4],
                part[5],
                part[4],
                *part[6:],
                groups.n + 1,
                groups.dim,
                _bank_rows(groups),
                inner,
                *strides[:3],
                *strides[3][:3],
                *strides[4][:2],
                WIDE=_are_wide(groups),
                ROWS=sizes.rows,
                BLOCK=sizes.columns,
                **sizes.options(),
            )
    return _with_bank(gradients, groups, saved, grad_reward, wrt)


def reward_from_scores(
    scores: Tensor, mask: Tensor | None, relevance: Tensor | None, weights: Weights
) -> Tensors:
    """Values of given scores [*, C], and the live ones of those."""
    from elva_kernels.backends.triton.kernels.from_scores import scores_kernel

    leading, dtype = scores.shape[:-1], compute_dtype(scores.dtype)
    values = _empty_values(leading, scores.shape[-1], dtype, scores.device)
    sizes = launch.rank_blocks(launch.architecture_of(scores.device))
    tensors = (scores, mask, relevance, *values)
    for part, (inner, groups), strides in launch.parts(leading, tensors):
        with launch.on(scores.device):
            scores_kernel[(groups,)](
                *part,
                scores.shape[-1],
                inner,
                *strides[0],
                *strides[1][:3],
                **_scalars(weights),
                BLOCK=sizes.rows,
                **sizes.options(),
            )
    return values


def reward_from_scores_backward(
    scores: Tensor,
    mask: Tensor | None,
    relevance: Tensor | None,
    grad_reward: Tensor,
    weights: Weights,
) -> Tensors:
    """Gradient of sum(grad_reward * reward) on `scores`."""
    from elva_kernels.backends.triton.kernels.from_scores import scores_gradient_kernel

    leading, candidates = scores.shape[:-1], scores.shape[-1]
    gradient = launch.empty(scores.shape, scores.dtype, scores.device)
    slopes = launch.empty((*leading, 2 * candidates), torch.float64, scores.device)
    sizes = launch.rank_blocks(launch.architecture_of(scores.device))
    tensors = (scores, mask, relevance, grad_reward, slopes, gradient)
    for part, (inner, groups), strides in launch.parts(leading, tensors):
        with launch.on(scores.device):
            scores_gradient_kernel[(groups,)](
                *part,
                candidates,
                inner,
                *strides[0],
                *strides[1][:3],
                *strides[3],
                **_scalars(weights),
                BLOCK=sizes.rows,
                **sizes.options(),
            )
    return (gradient,)


def _bank_rows(groups: Groups) -> int | None:
    return None if groups.negative_index is None else len(groups.negatives)


def _are_wide(groups: Groups) -> bool:
    """Whether candidates are dense rows, and each begins at a multiple of 16 bytes."""
    return launch.is_wide(groups.positive) and launch.is_wide(groups.negatives)


def _operands(groups: Groups) -> tuple[Tensor | None, ...]:
    """As the kernels take them: a bank is every group's, and its index says what is masked."""
    if groups.negative_index is None:
        return groups[:4]
    bank = groups.negatives.expand(*groups.leading, *groups.negatives.shape)
    return groups.query, groups.positive, bank, groups.negative_index


def _blocks(groups: Groups, *, soft: bool = False) -> launch.Blocks:
    architecture = launch.architecture_of(groups.query.device)
    lean = _are_wide(groups) and not soft
    return launch.blocks(architecture, groups.dim, groups.query.dtype, lean=lean)


def _empty_gradients(groups: Groups, wrt: Wanted) -> Gradients:
    return tuple(
        launch.empty(x.shape, x.dtype, x.device) if wanted else None
        for x, wanted in zip(groups[:3], groups.in_groups(wrt), strict=True)
    )


def _reward(
    groups: Groups,
    upstream: Tensor | None,
    weights: Weights,
    saved: Tensor | None,
    gradients: Gradients,
) -> Tensors:
    """The five values; fills in `saved` and the gradients."""
    from elva_kernels.backends.triton.kernels.reward import reward_kernel

    device, candidates = groups.query.device, groups.n + 1
    values = _empty_values(groups.leading, candidates, compute_dtype(groups.query.dtype), device)
    scratch = None
    if saved is not None:
        scratch = launch.empty((*groups.leading, 4 * candidates), torch.float64, device)
    sizes = _blocks(groups, soft=weights.rank_temperature > 0)
    tensors = (*_operands(groups), upstream, groups.relevance, *values, scratch, saved, *gradients)
    for part, (inner, programs), strides in launch.parts(groups.leading, tensors):
        with launch.on(device):
            reward_kernel[(programs,)](
                *part,
                candidates,
                groups.dim,
                _bank_rows(groups),
                inner,
                *strides[:3],
                *strides[3][:3],
                *strides[4][:2],
                **_scalars(weights),
                WIDE=_are_wide(groups),
                ROWS=sizes.rows,
                BLOCK=sizes.columns,
                SPAN=launch.SPAN * sizes.columns,
                RANKS=launch.RANKS,
                **sizes.options(),
            )
    return values


def _with_bank(
    gradients: Gradients, groups: Groups, saved: Tensor, upstream: Tensor | None, wrt: Wanted
) -> Gradients:
    """With a bank's [M, D], the sum over the groups that name a row; by what `saved` holds."""
    from elva_kernels.backends.triton.kernels.bank import bank_gradient_kernel

    index = groups.negative_index
    if index is None or not wrt[2]:
        return gradients
    query, _, bank, *_ = groups
    rows, dim = bank.shape
    gradient = launch.empty(bank.shape, bank.dtype, bank.device)
    if rows == 0:
        return *gradients[:2], gradient
    order, first = occurrences(index, rows)
    flat = query.reshape(-1, dim)
    weight = None if upstream is None else upstream.reshape(-1)
    sizes = launch.bank_blocks(launch.architecture_of(bank.device))
    across = max(1, min(-(-dim // sizes.columns), launch.BANK_PROGRAMS // rows))
    with launch.on(bank.device):
        bank_gradient_kernel[(rows * across,)](
            flat,
            bank,
            weight,
            saved,
            order,
            first,
            gradient,
            groups.n,
            dim,
            across,
            *flat.stride(),
            *bank.stride(),
            0 if weight is None else weight.stride(0),
            dtype=launch.triton_type(compute_dtype(query.dtype)),
            ROWS=sizes.rows,
            BLOCK=sizes.columns,
            **sizes.options(),
        )
    return *gradients[:2], gradient


def _scalars(weights: Weights) -> dict[str, Any]:
    """The weights as the kernels take them: no temperature means hard ranks."""
    scalars: dict[str, Any] = weights._asdict()
    temperature = scalars.pop("rank_temperature")
    soft = temperature > 0
    return scalars | {"inverse_temperature": 1.0 / temperature if soft else 0.0, "SOFT": soft}


def _empty_values(
    leading: torch.Size, candidates: int, dtype: torch.dtype, device: torch.device
) -> Tensors:
    rewards = (launch.empty(leading, dtype, device) for _ in range(3))
    rank = launch.empty(leading, torch.int32, device)
    return *rewards, rank, launch.empty((*leading, candidates), dtype, device)
