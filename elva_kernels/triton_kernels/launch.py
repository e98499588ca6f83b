"""Launches the Triton kernels: allocates outputs, passes pointers and strides, picks block sizes.

Inputs arrive checked by `ops`: one dtype out of bfloat16, float16, float32, float64, on one device,
expanded to one leading shape `*`, with any strides. They are read where they lie. Outputs are
contiguous. Signatures are those of `elva_kernels.native`. Reference: `elva_kernels.reference`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elva_kernels.reference import compute_dtype

Tensors = tuple[Tensor, ...]


class Blocks(NamedTuple):
    """Sizes of a tile of embeddings, the warps that work on it, and the registers of a thread."""

    rows: int
    columns: int
    num_warps: int
    registers: int | None  # None: as many as the compiler likes

    def options(self) -> dict[str, Any]:
        """As the compiler takes them."""
        capped = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "enable_fp_fusion": False} | capped


# Architecture -> by D, the first row whose D is not exceeded. `columns` decides the order of sums,
# so it is the same everywhere; the rest only decides speed. Sized by what the compiler reports
# (tests/kernels/triton_resources.json) and the bytes in flight, not yet timed on a GPU. Left to
# itself NVIDIA's compiler spills a few bytes to fit one more program; hence a number of registers
# that leaves room for two programs where both fit (sm_90 on), else for one.
_LARGEST = 2**63
_BLOCKS = {
    "sm_80": ((32, Blocks(32, 32, 4, 255)), (_LARGEST, Blocks(16, 128, 8, 255))),
    "sm_90": ((32, Blocks(32, 32, 4, 255)), (_LARGEST, Blocks(16, 128, 8, 128))),
    "hip": ((32, Blocks(32, 32, 2, None)), (_LARGEST, Blocks(16, 128, 4, None))),
}
_SPAN = 16  # tiles summed in lanes before they are added up in float64
_RANKS = 32  # candidates compared with as many at a time


def blocks(architecture: str, dim: int, dtype: torch.dtype) -> Blocks:
    """The tile for embeddings of size `dim`; float64 takes half the rows, wide types registers."""
    found = next(sizes for most, sizes in _BLOCKS[architecture] if dim <= most)
    if dtype.itemsize == 2:
        return found
    rows = found.rows // 2 if dtype == torch.float64 else found.rows
    return found._replace(rows=rows, registers=found.registers and 255)


def rank_blocks(architecture: str) -> Blocks:
    """The tile for scores alone, compared with one another."""
    return Blocks(_RANKS, _RANKS, 4, None if architecture == "hip" else 255)


@functools.cache
def _architecture(device: torch.device) -> str:
    """The row of `_BLOCKS` for a device; every later NVIDIA GPU takes the last one's."""
    if torch.version.hip is not None:
        return "hip"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "sm_80"
    return "sm_90"


def reward_forward(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None, **weights: float
) -> Tensors:
    """Values alone: reward, margin_reward, rank_reward, rank, scores."""
    results = _reward(query, positive, negatives, mask, None, weights, save=False, grads=False)
    return tuple(results[:5])


def reward_forward_saved(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None, **weights: float
) -> Tensors:
    """Values, and `saved` [*, 2 N + 3] float64 for `reward_backward`."""
    results = _reward(query, positive, negatives, mask, None, weights, save=True, grads=False)
    return tuple(results[:6])


def reward_value_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    **weights: float,
) -> Tensors:
    """Values, and the gradients of sum(weight * reward); `weight` None is 1."""
    results = _reward(query, positive, negatives, mask, weight, weights, save=True, grads=True)
    return *results[:5], *results[6:]


def reward_backward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    grad_reward: Tensor,
    **_: float,
) -> Tensors:
    """Gradients of sum(grad_reward * reward); reads the inputs again."""
    from elva_kernels.triton_kernels.reward import gradient_kernel

    gradients = tuple(_empty(x.shape, x.dtype, x.device) for x in (query, positive, negatives))
    n, dim = negatives.shape[-2:]
    sizes = blocks(_architecture(query.device), dim, query.dtype)
    leading = negatives.shape[:-2]
    inputs = (query, positive, negatives, mask, grad_reward)
    for part, (inner, groups), strides in _parts(leading, (*inputs, saved, *gradients)):
        with _on(query.device):
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


def reward_from_scores(scores: Tensor, mask: Tensor | None, **weights: float) -> Tensors:
    """Values of given scores [*, C], and the live ones of those."""
    from elva_kernels.triton_kernels.scores import scores_kernel

    leading, dtype = scores.shape[:-1], compute_dtype(scores.dtype)
    values = _empty_values(leading, scores.shape[-1], dtype, scores.device)
    sizes = rank_blocks(_architecture(scores.device))
    for part, (inner, groups), strides in _parts(leading, (scores, mask, *values)):
        with _on(scores.device):
            scores_kernel[(groups,)](
                *part,
                scores.shape[-1],
                inner,
                *strides[:2],
                **_weights(weights),
                BLOCK=sizes.rows,
                **sizes.options(),
            )
    return values


def reward_from_scores_backward(
    scores: Tensor, mask: Tensor | None, grad_reward: Tensor, **weights: float
) -> Tensors:
    """Gradient of sum(grad_reward * reward) on `scores`."""
    from elva_kernels.triton_kernels.scores import scores_gradient_kernel

    leading, candidates = scores.shape[:-1], scores.shape[-1]
    gradient = _empty(scores.shape, scores.dtype, scores.device)
    slopes = _empty((*leading, 2 * candidates), torch.float64, scores.device)
    sizes = rank_blocks(_architecture(scores.device))
    tensors = (scores, mask, grad_reward, slopes, gradient)
    for part, (inner, groups), strides in _parts(leading, tensors):
        with _on(scores.device):
            scores_gradient_kernel[(groups,)](
                *part,
                candidates,
                inner,
                *strides[:3],
                **_weights(weights),
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
    weights: dict[str, float],
    *,
    save: bool,
    grads: bool,
) -> Any:
    """The five values, `saved` or None, the three gradients or None."""
    from elva_kernels.triton_kernels.reward import reward_kernel

    device, leading = query.device, negatives.shape[:-2]
    n, dim = negatives.shape[-2:]
    values = _empty_values(leading, n + 1, compute_dtype(query.dtype), device)
    scratch = saved = None
    if save:
        scratch = _empty((*leading, 4 * (n + 1)), torch.float64, device)
        saved = _empty((*leading, 2 * n + 3), torch.float64, device)
    inputs = (query, positive, negatives)
    gradients: Any = (None, None, None)
    if grads:
        gradients = tuple(_empty(x.shape, x.dtype, device) for x in inputs)
    sizes = blocks(_architecture(query.device), dim, query.dtype)
    tensors = (*inputs, mask, upstream, *values, scratch, saved, *gradients)
    for part, (inner, groups), strides in _parts(leading, tensors):
        with _on(device):
            reward_kernel[(groups,)](
                *part,
                n + 1,
                dim,
                inner,
                *strides[:5],
                **_weights(weights),
                SAME=positive.stride(-1) == negatives.stride(-1),
                ROWS=sizes.rows,
                BLOCK=sizes.columns,
                SPAN=_SPAN * sizes.columns,
                RANKS=_RANKS,
                **sizes.options(),
            )
    return *values, saved, *gradients


def _weights(weights: dict[str, float]) -> dict[str, Any]:
    """The scalars as the kernels take them: no temperature means hard ranks."""
    temperature = weights.get("rank_temperature", 0.0)
    named = {name: value for name, value in weights.items() if name != "rank_temperature"}
    soft = temperature > 0
    return named | {"coldness": 1.0 / temperature if soft else 0.0, "SOFT": soft}


def _parts(
    leading: Sequence[int], tensors: Sequence[Tensor | None]
) -> Iterator[tuple[list[Tensor | None], tuple[int, int], list[tuple[int, ...]]]]:
    """Launches that cover all groups: tensors, (inner, groups), strides.

    A kernel finds a group in two leading dimensions, the outer one of any size and the inner one of
    `inner`. Leading dimensions that step alike in every tensor are merged; where more than two are
    left, each index of the first is a launch of its own. A tensor's strides are those of the two
    leading dimensions, then its own from the last dimension backwards.
    """
    given = [x for x in tensors if x is not None]
    rank = len(leading)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for axis, size in enumerate(leading):
        if size == 0:
            return
        if size == 1:
            continue
        steps = tuple(x.stride(axis) for x in given)
        if merged and merged[-1][1] == tuple(size * step for step in steps):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    if len(merged) > 2:
        for i in range(leading[0]):
            yield from _parts(leading[1:], [None if x is None else x[i] for x in tensors])
        return
    still = (1, (0,) * len(given))
    (outer, outer_steps), (inner, inner_steps) = [still] * (2 - len(merged)) + merged
    steps_of = iter(zip(outer_steps, inner_steps, strict=True))
    strides = [
        (0, 0, 0, 0) if x is None else (*next(steps_of), *reversed(x.stride()[rank:]))
        for x in tensors
    ]
    yield list(tensors), (inner, outer * inner), strides


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _empty_values(
    leading: torch.Size, candidates: int, dtype: torch.dtype, device: torch.device
) -> Tensors:
    rewards = (_empty(leading, dtype, device) for _ in range(3))
    rank = _empty(leading, torch.int32, device)
    return *rewards, rank, _empty((*leading, candidates), dtype, device)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)
