"""Calls the compiled module ``elva_kernels._C``: allocates the outputs, passes pointers, sizes and strides.

The only Python that knows the binary boundary (``csrc/elva.h``). Inputs arrive checked by ``ops``: CPU tensors of
one dtype out of bfloat16, float16, float32, float64, expanded to one leading shape ``*``, with any strides. They
are read where they lie: nothing is copied. Outputs are contiguous. Reference: ``elva_kernels.reference``.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_LEVEL_VARIABLE = "ELVA_KERNELS_CPU_LEVEL"

Values = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def unavailable_reason() -> str | None:
    """None where the compiled module works, else one sentence: what is missing and what to do."""
    return _load()[1]


def describe() -> dict[str, Any]:
    """What the compiled module is and what it uses here, for ``doctor()``.

    Keys: ``available`` (bool), ``reason`` (None or a sentence); where it loads also ``level`` (in use), ``levels``
    (supported by this CPU and its operating system, best first), ``compiler``, ``cuda`` (bool), ``cuda_archs``
    (tuple of str), ``threads`` (what a call made now would use).
    """
    module, reason = _load()
    facts: dict[str, Any] = {"available": reason is None, "reason": reason}
    if module is not None:
        facts.update(module.build_info())
        facts["levels"] = tuple(module.supported_levels())
        facts["level"] = module.level()
        facts["threads"] = torch.get_num_threads()
    return facts


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
) -> Values:
    """Values alone.

    Args:
        query, positive: [*, D].
        negatives: [*, N, D], of the same ``*``.
        mask: bool [*, N], True where the negative is live, or None for all; a masked row is never read.

    Returns:
        reward, margin_reward, rank_reward [*] and scores [*, N+1] in float32 (float64 for float64), rank int32 [*].
    """
    raise NotImplementedError


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``reward_forward``, and a sixth tensor: ``saved``, float64 [*, 2 N + 3].

    ``saved`` holds each candidate's two gradient coefficients and the query's one (csrc/elva.h): all that
    ``reward_backward`` needs beside the inputs.
    """
    raise NotImplementedError


def reward_backward(
    query: Tensor, positive: Tensor, negatives: Tensor, saved: Tensor, grad_reward: Tensor
) -> Gradients:
    """Gradients of sum(grad_reward * reward); reads the inputs again.

    Args:
        saved: from ``reward_forward_saved`` on the same inputs.
        grad_reward: [*], in the reward's dtype, any strides (it may be expanded).

    Returns:
        grad_query [*, D], grad_positive [*, D], grad_negatives [*, N, D], contiguous, in the input's dtype.
    """
    raise NotImplementedError


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values and gradients in one pass over memory.

    Args:
        weight: upstream gradient [*] in the reward's dtype (float32, float64 for float64), any strides; None is 1.

    Returns:
        reward, margin_reward, rank_reward, rank, scores, grad_query, grad_positive, grad_negatives.
    """
    raise NotImplementedError


def reward_from_scores(
    scores: Tensor,
    mask: Tensor | None,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same rewards from given scores [*, C] (column 0 is the positive; any supported dtype, any strides).

    Returns:
        reward, margin_reward, rank_reward [*] in float32 (float64 for float64), rank int32 [*].
    """
    raise NotImplementedError


def reward_from_scores_backward(
    scores: Tensor,
    mask: Tensor | None,
    grad_reward: Tensor,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
) -> Tensor:
    """Gradient of sum(grad_reward * reward) on ``scores``: [*, C], contiguous, in the scores' dtype.

    ``grad_reward`` is [*] in the reward's dtype, any strides.
    """
    raise NotImplementedError


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or the reason why there is none."""
    return None, "elva_kernels._C is not built: install a C++ compiler and reinstall"
