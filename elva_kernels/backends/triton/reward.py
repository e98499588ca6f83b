"""The grouped reward and its relatives by the Triton kernels.

Kernels are imported when they are first launched, for they import triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.launcher import Tensors, saved_shape
from elva_kernels.backends.triton import launch
from elva_kernels.reference import Wanted, Weights, compute_dtype


def ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values alone: reward, margin_reward, rank_reward, rank, scores."""
    results = _reward(query, positive, negatives, mask, None, weights, save=False, grads=False)
    return tuple(results[:5])


def ranking_reward_saved(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values, and coefficients for the backward."""
    results = _reward(query, positive, negatives, mask, None, weights, save=True, grads=False)
    return tuple(results[:6])


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
    """Values, and the gradients of sum(upstream * reward)."""
    results = _reward(query, positive, negatives, mask, upstream, weights, save=True, grads=True)
    return *results[:5], *results[6:]


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
    """Gradients of sum(grad_reward * reward); reads the inputs again."""
    from elva_kernels.backends.triton.kernels.reward import gradient_kernel

    embeddings = (query, positive, negatives)
    gradients = tuple(launch.empty(x.shape, x.dtype, x.device) for x in embeddings)
    n, dim = negatives.shape[-2:]
    sizes = launch.blocks(launch.architecture_of(query.device), dim, query.dtype)
    leading = negatives.shape[:-2]
    inputs = (*embeddings, mask, grad_reward)
    for part, (inner, groups), strides in launch.parts(leading, (*inputs, saved, *gradients)):
        with launch.on(query.device):
            gradient_kernel[(groups,)](
                *part[:4],
                part[5],
                part[4],
                *part[6:],
                n + 1,
                dim,
                inner,
                *strides[:5],
                SAME=positive.stride(-1) == negatives.stride(-1),
                ROWS=sizes.rows,
                BLOCK=sizes.columns,
                **sizes.options(),
            )
    return gradients


def reward_from_scores(scores: Tensor, mask: Tensor | None, weights: Weights) -> Tensors:
    """Values of given scores [*, C], and the live ones of those."""
    from elva_kernels.backends.triton.kernels.from_scores import scores_kernel

    leading, dtype = scores.shape[:-1], compute_dtype(scores.dtype)
    values = _empty_values(leading, scores.shape[-1], dtype, scores.device)
    sizes = launch.rank_blocks(launch.architecture_of(scores.device))
    for part, (inner, groups), strides in launch.parts(leading, (scores, mask, *values)):
        with launch.on(scores.device):
            scores_kernel[(groups,)](
                *part,
                scores.shape[-1],
                inner,
                *strides[:2],
                **_scalars(weights),
                BLOCK=sizes.rows,
                **sizes.options(),
            )
    return values


def reward_from_scores_backward(
    scores: Tensor, mask: Tensor | None, grad_reward: Tensor, weights: Weights
) -> Tensors:
    """Gradient of sum(grad_reward * reward) on `scores`."""
    from elva_kernels.backends.triton.kernels.from_scores import scores_gradient_kernel

    leading, candidates = scores.shape[:-1], scores.shape[-1]
    gradient = launch.empty(scores.shape, scores.dtype, scores.device)
    slopes = launch.empty((*leading, 2 * candidates), torch.float64, scores.device)
    sizes = launch.rank_blocks(launch.architecture_of(scores.device))
    tensors = (scores, mask, grad_reward, slopes, gradient)
    for part, (inner, groups), strides in launch.parts(leading, tensors):
        with launch.on(scores.device):
            scores_gradient_kernel[(groups,)](
                *part,
                candidates,
                inner,
                *strides[:3],
                **_scalars(weights),
                BLOCK=sizes.rows,
                **sizes.options(),
            )
    return (gradient,)


def _reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    upstream: Tensor | None,
    weights: Weights,
    *,
    save: bool,
    grads: bool,
) -> Any:
    """The five values, `saved` or None, the three gradients or None."""
    from elva_kernels.backends.triton.kernels.reward import reward_kernel

    device, leading = query.device, negatives.shape[:-2]
    n, dim = negatives.shape[-2:]
    values = _empty_values(leading, n + 1, compute_dtype(query.dtype), device)
    scratch = saved = None
    if save:
        scratch = launch.empty((*leading, 4 * (n + 1)), torch.float64, device)
        saved = launch.empty(saved_shape((*leading, n + 1)), torch.float64, device)
    inputs = (query, positive, negatives)
    gradients: Any = (None, None, None)
    if grads:
        gradients = tuple(launch.empty(x.shape, x.dtype, device) for x in inputs)
    sizes = launch.blocks(launch.architecture_of(query.device), dim, query.dtype)
    tensors = (*inputs, mask, upstream, *values, scratch, saved, *gradients)
    for part, (inner, groups), strides in launch.parts(leading, tensors):
        with launch.on(device):
            reward_kernel[(groups,)](
                *part,
                n + 1,
                dim,
                inner,
                *strides[:5],
                **_scalars(weights),
                SAME=positive.stride(-1) == negatives.stride(-1),
                ROWS=sizes.rows,
                BLOCK=sizes.columns,
                SPAN=launch.SPAN * sizes.columns,
                RANKS=launch.RANKS,
                **sizes.options(),
            )
    return *values, saved, *gradients


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
