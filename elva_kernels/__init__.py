"""Kernels for retrieval embeddings trained by ranking rewards (ELVA, arXiv:2606.20280)."""

from elva_kernels.dispatch import (
    BackendUnavailable,
    Report,
    available_backends,
    doctor,
    warm_up,
)
from elva_kernels.infonce import info_nce
from elva_kernels.modules import InfoNCELoss, RankingRewardLoss
from elva_kernels.ops import (
    group_advantages,
    ranking_reward,
    ranking_reward_and_grad,
    reward_from_scores,
)
from elva_kernels.reference import RankingReward, TopK
from elva_kernels.reference_batch import RankStatistics
from elva_kernels.search import topk
from elva_kernels.statistics import in_batch_ranking_reward, rank_statistics

__all__ = [
    "BackendUnavailable",
    "InfoNCELoss",
    "RankStatistics",
    "RankingReward",
    "RankingRewardLoss",
    "Report",
    "TopK",
    "available_backends",
    "doctor",
    "group_advantages",
    "in_batch_ranking_reward",
    "info_nce",
    "rank_statistics",
    "ranking_reward",
    "ranking_reward_and_grad",
    "reward_from_scores",
    "topk",
    "warm_up",
]
