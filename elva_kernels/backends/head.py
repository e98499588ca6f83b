"""The reward of in-batch queries' heads and its slopes, in torch and bounded memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

from elva_kernels import reference
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import Weights

_PAIRS = 2**22  # of a positive and a negative of the head at once: 16 MB of float32. Ours.


def reward_of_head(scores: Tensor, rank: Tensor, head: int, weights: Weights) -> Tensors:
    """The values of `reference.reward_of_head`: reward, margin_reward, rank_reward [B]."""
    parts = [
        reference.reward_of_head(some, rank, head, weights)[:3]
        for some, rank in _parts(rank, scores)
    ]
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def slopes_of_head(
    scores: Tensor, rank: Tensor, head: int, grad_reward: Tensor, weights: Weights
) -> Tensor:
    """As `reference.head_slopes`."""
    parts = _parts(rank, scores, grad_reward)
    return torch.cat(
        [reference.head_slopes(some, rank, head, grad, weights) for some, rank, grad in parts]
    )


def _parts(rank: Tensor, scores: Tensor, *more: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """(scores, rank, ...) of some queries at a time: every positive meets every negative."""
    rows = max(1, _PAIRS // max(1, rank.shape[1] * scores.shape[1]))
    return zip(*(x.split(rows) for x in (scores, rank, *more)), strict=True)
