"""Kernels for retrieval embeddings trained by ranking rewards (ELVA, arXiv:2606.20280)."""

from elva_kernels.backends.choice import BackendUnavailable
from elva_kernels.codes import CodedTopK, coded_topk, row_codes
from elva_kernels.doctor import Report, available_backends, doctor, warm_up
from elva_kernels.in_batch import (
    in_batch_ranking_reward,
    in_batch_ranking_reward_and_grad,
    rank_statistics,
)
from elva_kernels.info_nce import info_nce, info_nce_and_grad
from elva_kernels.modules import InfoNCELoss, RankingRewardLoss
from elva_kernels.reference import RankingReward, RankStatistics, RowCodes, TopK
from elva_kernels.reward import (
    group_advantages,
    ranking_reward,
    ranking_reward_and_grad,
    reward_from_scores,
)
from elva_kernels.topk import topk

__version__ = "0.2.0"  # of elva/__init__.py, which the build reads

__all__ = [
    "BackendUnavailable",
    "CodedTopK",
    "InfoNCELoss",
    "RankStatistics",
    "RankingReward",
    "RankingRewardLoss",
    "Report",
    "RowCodes",
    "TopK",
    "available_backends",
    "coded_topk",
    "doctor",
    "group_advantages",
    "in_batch_ranking_reward",
    "in_batch_ranking_reward_and_grad",
    "info_nce",
    "info_nce_and_grad",
    "rank_statistics",
    "ranking_reward",
    "ranking_reward_and_grad",
    "reward_from_scores",
    "row_codes",
    "topk",
    "warm_up",
]
