"""Calls of `elva_kernels._C` on rewards and scores that are given; as `native`."""

import torch
from torch import Tensor

from elva_kernels.native import (
    _DTYPE_CODES,
    _empty,
    _empty_gradients,
    _module,
    _operand,
    _value_dtype,
)
from elva_kernels.reference import SAME_REWARD

_SCALE_CODES = {"std": 0, "batch": 1, "none": 2}


def reward_from_scores(
    scores: Tensor,
    mask: Tensor | None,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same rewards from given scores [*, C], the positive's first, of any strides.

    Returns:
        reward, margin_reward, rank_reward [*] in float32 (float64 for float64), rank int32 [*].
    """
    lead = scores.shape[:-1]
    dtype = _value_dtype(scores.dtype)
    reward = _empty(lead, dtype)
    margin_reward, rank_reward = torch.empty_like(reward), torch.empty_like(reward)
    rank = _empty(lead, torch.int32)
    _module().reward_from_scores(
        _DTYPE_CODES[scores.dtype],
        torch.get_num_threads(),
        tuple(lead),
        scores.shape[-1],
        _operand(scores),
        _operand(mask),
        None,
        (margin, rank_penalty, w_margin, w_rank, rank_temperature),
        reward.data_ptr(),
        margin_reward.data_ptr(),
        rank_reward.data_ptr(),
        rank.data_ptr(),
        0,
    )
    return reward, margin_reward, rank_reward, rank


def reward_from_scores_backward(
    scores: Tensor,
    mask: Tensor | None,
    grad_reward: Tensor,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float = 0.0,
) -> Tensor:
    """Gradient of sum(grad_reward * reward) on `scores`: [*, C], in the scores' dtype.

    `grad_reward` is [*] in the reward's dtype, any strides.
    """
    (grad_scores,) = _empty_gradients(scores)
    _module().reward_from_scores(
        _DTYPE_CODES[scores.dtype],
        torch.get_num_threads(),
        tuple(scores.shape[:-1]),
        scores.shape[-1],
        _operand(scores),
        _operand(mask),
        _operand(grad_reward),
        (margin, rank_penalty, w_margin, w_rank, rank_temperature),
        0,
        0,
        0,
        0,
        grad_scores.data_ptr(),
    )
    return grad_scores


def group_advantages(reward: Tensor, *, scale: str, std_eps: float) -> Tensor:
    """Of rewards [*, G], in float32 (float64 for float64)."""
    *leading, size = reward.shape
    advantages = torch.empty(reward.shape, dtype=_value_dtype(reward.dtype))
    _module().group_advantages(
        _DTYPE_CODES[reward.dtype],
        torch.get_num_threads(),
        tuple(leading),
        size,
        _operand(reward),
        _SCALE_CODES[scale],
        std_eps,
        SAME_REWARD,
        advantages.data_ptr(),
    )
    return advantages
