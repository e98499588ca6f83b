"""Calls the compiled module `elva_kernels._C`: allocates outputs, passes pointers and strides.

The only Python that knows the binary boundary (csrc/elva.h). Inputs arrive checked by `ops`: CPU
tensors of one dtype out of bfloat16, float16, float32, float64, expanded to one leading shape `*`,
with any strides. They are read where they lie: nothing is copied. Outputs are contiguous.
Reference: `elva_kernels.reference`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_METRIC_CODES = {"dot": 0, "cosine": 1}
_LARGE_BYTES = 1 << 20  # the memory of larger gradients is kept (csrc/cpu/kept_memory.cpp)

Values = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def unavailable_reason() -> str | None:
    """None where the compiled module works, else one sentence: what is missing and what to do."""
    return _load()[1]


def describe() -> dict[str, Any]:
    """What the compiled module is and what it uses here, for `doctor()`.

    Keys: `available` (bool), `reason` (None or a sentence); where it loads also `level` (in use),
    `levels` (that this CPU and its operating system support, best first), `compiler`, `cuda`
    (bool), `cuda_archs` (tuple of str), `threads` (what a call made now would use).
    """
    module, reason = _load()
    facts: dict[str, Any] = {"available": reason is None, "reason": reason}
    if module is not None:
        info = module.build_info()
        facts["level"] = module.level() if reason is None else None
        facts["levels"] = tuple(module.levels().split())
        facts["compiler"] = info["compiler"]
        facts["cuda"] = info["cuda"]
        facts["cuda_archs"] = tuple(filter(None, info["cuda_archs"].split(",")))
        facts["threads"] = torch.get_num_threads()
    return facts


def build_digest() -> str:
    """What this build of the module is: its verdicts hold for no other."""
    path = _module().__file__
    assert path is not None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def reward_forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float = 0.0,
) -> Values:
    """Values alone.

    Args:
        query, positive: [*, D].
        negatives: [*, N, D], of the same `*`.
        mask: bool [*, N], True where live, or None for all; a masked row is never read.

    Returns:
        reward, margin_reward, rank_reward [*], rank int32 [*], scores [*, N + 1]; in float32
        (float64 for float64) but the rank.
    """
    weights = (margin, rank_penalty, w_margin, w_rank, rank_temperature)
    return _forward(query, positive, negatives, mask, *weights, save=False)[0]


def reward_forward_saved(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reward_forward`, and a sixth tensor: `saved`, float64 [*, 2 N + 3].

    It holds each candidate's two gradient coefficients and the query's one: all that
    `reward_backward` needs beside the inputs.
    """
    weights = (margin, rank_penalty, w_margin, w_rank, rank_temperature)
    values, saved = _forward(query, positive, negatives, mask, *weights, save=True)
    assert saved is not None
    return *values, saved


def reward_backward(
    query: Tensor, positive: Tensor, negatives: Tensor, saved: Tensor, grad_reward: Tensor
) -> Gradients:
    """Gradients of sum(grad_reward * reward); reads the inputs again.

    Args:
        saved: from `reward_forward_saved` on the same inputs.
        grad_reward: [*], in the reward's dtype, any strides (it may be expanded).

    Returns:
        grad_query, grad_positive [*, D], grad_negatives [*, N, D], in the inputs' dtype.
    """
    gradients = _empty_gradients(query, positive, negatives)
    n, dim = negatives.shape[-2:]
    _module().reward_backward(
        _DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        tuple(negatives.shape[:-2]),
        n,
        dim,
        _operand(query),
        _operand(positive),
        _operand(negatives),
        _operand(grad_reward),
        saved.data_ptr(),
        *(gradient.data_ptr() for gradient in gradients),
    )
    return cast(Gradients, gradients)


def reward_value_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values and gradients in one pass over memory.

    Args:
        weight: upstream gradient [*] in the reward's dtype, any strides; None is 1.

    Returns:
        reward, margin_reward, rank_reward, rank, scores, grad_query, grad_positive, grad_negatives.
    """
    values = _empty_values(query, negatives)
    gradients = _empty_gradients(query, positive, negatives)
    n, dim = negatives.shape[-2:]
    _module().reward_forward(
        _DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        tuple(negatives.shape[:-2]),
        n,
        dim,
        _operand(query),
        _operand(positive),
        _operand(negatives),
        _operand(mask),
        _operand(weight),
        (margin, rank_penalty, w_margin, w_rank, rank_temperature),
        *(value.data_ptr() for value in values),
        0,
        *(gradient.data_ptr() for gradient in gradients),
    )
    return cast(
        tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        (*values, *gradients),
    )


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> tuple[Tensor, Tensor]:
    """The best rows of corpus [P, D] for each row of query [Q, D], both of any strides.

    Returns:
        scores [Q, min(k, P)] in float32 (float64 for float64), index int64 of the same shape.
    """
    kept = min(k, corpus.shape[0])
    scores = torch.empty(query.shape[0], kept, dtype=_value_dtype(query.dtype))
    index = torch.empty(query.shape[0], kept, dtype=torch.int64)
    _module().topk(
        _DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        _METRIC_CODES[metric],
        query.shape[0],
        corpus.shape[0],
        query.shape[1],
        kept,
        _operand(query),
        _operand(corpus),
        scores.data_ptr(),
        index.data_ptr(),
    )
    return scores, index


def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float,
    *,
    save: bool,
) -> tuple[Values, Tensor | None]:
    values = _empty_values(query, negatives)
    lead = negatives.shape[:-2]
    n, dim = negatives.shape[-2:]
    saved = torch.empty(*lead, 2 * n + 3, dtype=torch.float64) if save else None
    _module().reward_forward(
        _DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        tuple(lead),
        n,
        dim,
        _operand(query),
        _operand(positive),
        _operand(negatives),
        _operand(mask),
        None,
        (margin, rank_penalty, w_margin, w_rank, rank_temperature),
        *(value.data_ptr() for value in values),
        0 if saved is None else saved.data_ptr(),
        0,
        0,
        0,
    )
    return values, saved


def _operand(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.stride())


def _value_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_values(query: Tensor, negatives: Tensor) -> Values:
    lead = negatives.shape[:-2]
    dtype = _value_dtype(query.dtype)
    reward = _empty(lead, dtype)
    return (
        reward,
        torch.empty_like(reward),
        torch.empty_like(reward),
        _empty(lead, torch.int32),
        torch.empty(*lead, negatives.shape[-2] + 1, dtype=dtype),
    )


def _empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(_empty_gradient(x) for x in inputs)


def _empty_gradient(x: Tensor) -> Tensor:
    if x.nbytes < _LARGE_BYTES and x.is_contiguous():
        return torch.empty_like(x)
    return _empty_kept(x.shape, x.dtype)


def _empty_kept(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Where it is large, of memory that is kept for the next one; an index is not."""
    if dtype in _DTYPE_CODES and shape.numel() * dtype.itemsize >= _LARGE_BYTES:
        return from_dlpack(_module().empty(_DTYPE_CODES[dtype], tuple(shape)))
    return _empty(shape, dtype)


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    # Sizes as separate arguments: torch parses a Size in twice the time it takes to allocate.
    return torch.empty(*shape, dtype=dtype) if shape else torch.empty((), dtype=dtype)


def _module() -> ModuleType:
    module, reason = _load()
    if module is None or reason is not None:
        raise RuntimeError(reason)
    return module


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or the reason why it cannot be used."""
    try:
        module = importlib.import_module("elva_kernels._C")
    except ModuleNotFoundError:
        return None, (
            "elva_kernels._C is not built: no C++ compiler was found at install time, or this is a "
            "source tree that was not installed; install g++ 10 or later and run pip install again"
        )
    except ImportError as error:
        return (
            None,
            f"elva_kernels._C does not load ({error}); reinstall the package on this machine",
        )
    try:
        module.level()
    except RuntimeError as error:
        return module, str(error)
    return module, None
