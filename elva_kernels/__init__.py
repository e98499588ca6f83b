"""Kernels for retrieval embeddings trained by ranking rewards (ELVA, arXiv:2606.20280)."""

from elva_kernels.dispatch import (
    BackendUnavailable,
    Report,
    available_backends,
    doctor,
    warm_up,
)
from elva_kernels.modules import RankingRewardLoss
from elva_kernels.ops import (
    group_advantages,
    ranking_reward,
    ranking_reward_and_grad,
    reward_from_scores,
)
from elva_kernels.reference import RankingReward

__all__ = [
    "BackendUnavailable",
    "RankingReward",
    "RankingRewardLoss",
    "Report",
    "available_backends",
    "doctor",
    "group_advantages",
    "ranking_reward",
    "ranking_reward_and_grad",
    "reward_from_scores",
    "warm_up",
]
