"""The grouped reward and its relatives by the Triton kernels.

Kernels are imported when they are first launched, for they import triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elva_kernels.backends.launcher import Gradients, Tensors, saved_shape
from elva_kernels.backends.segments import occurrences
from elva_kernels.backends.triton import launch
from elva_kernels.reference import Wanted, Weights, compute_dtype

_NONE: Gradients = (None, None, None)


def ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    relevance: Tensor | None,
    weights: Weights,
) -> Tensors:
    """Values alone: reward, margin_reward, rank_reward, rank, scores."""
    groups = _Groups(query, positive, negatives, mask, index)
    return _reward(groups, relevance, None, weights, None, _NONE)


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
    groups = _Groups(query, positive, negatives, mask, index)
    saved = groups.empty_saved()
    return *_reward(groups, relevance, None, weights, saved, _NONE), saved


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
    """Values, and the gradients of sum(upstream * reward), None where they are not in `wrt`."""
    groups = _Groups(query, positive, negatives, mask, index)
    saved, gradients = groups.empty_saved(), groups.empty_gradients(wrt)
    values = _reward(groups, relevance, upstream, weights, saved, gradients)
    if index is None or not wrt[2]:
        return *values, *gradients
    return *values, *gradients[:2], _bank_gradient(query, negatives, index, saved, upstream)


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
    """Gradients of sum(grad_reward * reward); reads the inputs again, but not their relevance."""
    from elva_kernels.backends.triton.kernels.reward import gradient_kernel

    groups = _Groups(query, positive, negatives, mask, index)
    gradients = groups.empty_gradients(wrt)
    sizes = groups.blocks()
    tensors = (*groups.tensors(), grad_reward, saved, *gradients)
    launches = () if gradients == _NONE else launch.parts(groups.leading, tensors)
    for part, (inner, programs), strides in launches:
        with launch.on(query.device):
            gradient_kernel[(programs,)](
                *part[:4],
                part[5],
                part[4],
                *part[6:],
                groups.n + 1,
                groups.dim,
                groups.bank_rows,
                inner,
                *strides[:3],
                *strides[3][:3],
                *strides[4][:2],
                WIDE=groups.are_wide,
                ROWS=sizes.rows,
                BLOCK=sizes.columns,
                **sizes.options(),
            )
    if index is None or not wrt[2]:
        return gradients
    return *gradients[:2], _bank_gradient(query, negatives, index, saved, grad_reward)


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


class _Groups(NamedTuple):
    """The inputs of a grouped op, and what its launches take of them."""

    query: Tensor  # [*, D]
    positive: Tensor  # [*, D]
    negatives: Tensor  # [*, N, D], or a bank [M, D]
    mask: Tensor | None  # [*, N]
    row_index: Tensor | None  # int64 [*, N], rows of the bank

    @property
    def leading(self) -> torch.Size:
        return self.query.shape[:-1]

    @property
    def n(self) -> int:
        row_index = self.row_index
        return self.negatives.shape[-2] if row_index is None else row_index.shape[-1]

    @property
    def dim(self) -> int:
        return self.query.shape[-1]

    @property
    def bank_rows(self) -> int | None:
        return None if self.row_index is None else len(self.negatives)

    @property
    def are_wide(self) -> bool:
        """Whether candidates are dense rows, and each begins at a multiple of 16 bytes."""
        return all(launch.is_wide(x) for x in (self.positive, self.negatives))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """As the kernels take them: a bank is every group's, and its index says what is masked."""
        if self.row_index is None:
            return self.query, self.positive, self.negatives, self.mask
        bank = self.negatives.expand(*self.leading, *self.negatives.shape)
        return self.query, self.positive, bank, self.row_index

    def blocks(self, *, soft: bool = False) -> launch.Blocks:
        architecture = launch.architecture_of(self.query.device)
        lean = self.are_wide and not soft
        return launch.blocks(architecture, self.dim, self.query.dtype, lean=lean)

    def empty_saved(self) -> Tensor:
        shape = saved_shape((*self.leading, self.n + 1))
        return launch.empty(shape, torch.float64, self.query.device)

    def empty_gradients(self, wrt: Wanted) -> Gradients:
        """Memory for those in `wrt`, but for a bank's, which is not a sum over one group."""
        wanted = (wrt[0], wrt[1], wrt[2] and self.row_index is None)
        return tuple(
            launch.empty(x.shape, x.dtype, x.device) if is_wanted else None
            for x, is_wanted in zip(self[:3], wanted, strict=True)
        )


def _reward(
    groups: _Groups,
    relevance: Tensor | None,
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
    sizes = groups.blocks(soft=weights.rank_temperature > 0)
    tensors = (*groups.tensors(), upstream, relevance, *values, scratch, saved, *gradients)
    for part, (inner, programs), strides in launch.parts(groups.leading, tensors):
        with launch.on(device):
            reward_kernel[(programs,)](
                *part,
                candidates,
                groups.dim,
                groups.bank_rows,
                inner,
                *strides[:3],
                *strides[3][:3],
                *strides[4][:2],
                **_scalars(weights),
                WIDE=groups.are_wide,
                ROWS=sizes.rows,
                BLOCK=sizes.columns,
                SPAN=launch.SPAN * sizes.columns,
                RANKS=launch.RANKS,
                **sizes.options(),
            )
    return values


def _bank_gradient(
    query: Tensor, bank: Tensor, index: Tensor, saved: Tensor, upstream: Tensor | None
) -> Tensor:
    """[M, D], the sum over the groups that name a row; by what `saved` holds of them."""
    from elva_kernels.backends.triton.kernels.bank import bank_gradient_kernel

    rows, dim = bank.shape
    gradient = launch.empty(bank.shape, bank.dtype, bank.device)
    if rows == 0:
        return gradient
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
            index.shape[-1],
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
    return gradient


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
