"""Kernels for retrieval embeddings trained by ranking rewards (ELVA, arXiv:2606.20280).

    result = elva_kernels.ranking_reward(query, positive, negatives)  # [B, D], [B, D], [B, N, D]
    (-result.reward.mean()).backward()

One page a name: `help(elva_kernels.ranking_reward)`.

Rewards, each group with its own negatives
    ranking_reward              reward, its two terms, the positive's rank, scores
    ranking_reward_and_grad     the same and all gradients, in one pass
    reward_from_scores          the reward of scores that came from elsewhere
    group_advantages            GRPO's advantages of rollouts
    RankingRewardLoss           minus the mean reward, as a module

A batch, whose candidates are each query's negatives
    info_nce                    InfoNCE in bounded memory; over all processes with `group`
    info_nce_and_grad           the same and its gradients, for GradCache
    InfoNCELoss                 the same as a module
    in_batch_ranking_reward     the reward against the whole batch
    in_batch_ranking_reward_and_grad
    rank_statistics             ranks, ties, hardest negatives, logsumexp

Search
    topk                        the best rows of a corpus, exactly
    row_codes, coded_topk       the same answers, of which most rows are never read

What runs here
    doctor, available_backends  each backend, or why it cannot run
    warm_up                     self-tests now: before a CUDA graph is captured

Results: RankingReward, RankStatistics, TopK, RowCodes, CodedTopK, Report. A backend that was named
and cannot run raises BackendUnavailable.
"""

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
