"""The definition of every op, in plain differentiable torch; every other backend must agree.

Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; the equation numbers are ours, one list for
all ops. In a group, `s_0` is the positive's score, `s_i` (i = 1..N) a negative's, `r_i` the 1-based
rank of candidate i:

    (1)  s_i      = q . c_i / (|q| |c_i|)
    (2)  r_i      = 1 + #{j : s_j > s_i} + #{j : s_j = s_i, j before i};
                    the positive comes after all its ties, the negatives in the order of indices
    (3)  R_margin = max(0, s_0 - max_i s_i - margin)
    (4)  R_rank   = s_0 / (1 + log r_0) - rank_penalty * sum_{i>0} s_i (log r_i - 1)
    (5)  R        = w_margin R_margin + w_rank R_rank
    (6)  r~_i     = 1 + sum_{j != i} sigmoid((s_j - s_i) / rank_temperature);
                    in place of r_i in (4) where a temperature is given; ours, not the paper's
    (3g) R_margin = max(0, s_0 - max_i (s_i - margin g_i) - margin)
    (4g) R_rank   = s_0 / (1 + log r_0) + sum_{i>0} g_i s_i / (1 + log r_i)
                    - rank_penalty * sum_{i>0} (1 - g_i) s_i (log r_i - 1);
                    in place of (3) and (4) where negatives have a relevance g_i in [0, 1]: the
                    margin to negative i is (1 - g_i) of the margin, and a share g_i of its score
                    counts as the positive's does, as in a DCG; ours, not the paper's. Of equal
                    s_i - margin g_i the first is the hardest
    (7)  A_g      = (R_g - mean R) / (std R + std_eps)
                    GRPO: DeepSeekMath, arXiv:2402.03300, sec. 4.1

Ranks are constants to the gradient in (4), so autograd yields the closed form
    dR/ds_0 = w_margin [hinge open] + w_rank / (1 + log r_0)
    dR/ds_i = - w_margin [hinge open, i hardest] - w_rank rank_penalty (log r_i - 1)
with a relevance
    dR/ds_i = - w_margin [hinge open, i hardest]
              + w_rank (g_i / (1 + log r_i) - rank_penalty (1 - g_i) (log r_i - 1))
and in both
    ds_i/dq = (c^_i - s_i q^) / |q|,  ds_i/dc_i = (q^ - s_i c^_i) / |c_i|,   x^ = x / |x|

In a batch, B queries share M candidates; query i has the positives T_i, candidates all, as a rule
one. `u` is a row over its norm, `id` a candidate's id (its index where none is given):

    (8)  s_ij    = u(q_i) . u(c_j), clamped to [-1, 1]; NaN where either row is not finite
    (9)  L_i     = {j : j not in T_i, id_j != id_t for t in T_i, (i, j) not excluded,
                   not s_ij > max_score}, the negatives of query i
    (10) rank_it = 1 + #{j in L_i : s_ij > s_it} + #{j in L_i : s_ij = s_it} for t in T_i;
                   NaN counts as less than any number and equal to NaN
    (11) lse_i(X) = log(sum_{t in X} exp(s_it / T) + sum_{j in L_i} exp(s_ij / T)), if finite;
                   the statistic is lse_i(T_i)
    (12) R_i     = mean_{t in T_i} R_it, with (3) and (5) of s_it and of the hardest in L_i, and
         R_rank  = s_it / (1 + log rank_it)
                   - rank_penalty * sum_{j in L_i, r_ij <= head} s_ij (log r_ij - 1)
                   r_ij is the rank of negative j by (2); ours: the paper ranks a fixed pool
    (13) loss_i  = mean_{t in T_i} lse_i({t}) - s_it / T; 0 without a positive
                   InfoNCE: van den Oord et al., arXiv:1807.03748, eq. 4, with f = exp(s / T)
    (14) loss_i  = half of (13) and half of its twin, the mean over t in T_i of what candidate t
                   loses in looking for query i among the queries k with t in L_k
                   and a positive of their own

A row that is not finite spoils the results of its own pairs alone: it is nobody else's negative in
(11) to (14), and its pairs add nothing to the gradients of other rows. Its own gradient is NaN, and
so is that of a query with such a positive.

Search:

    (15) topk(q) = the k rows c with the largest s = q . c / (|q| |c|), or s = q . c;
                   equal scores in the order of indices
    (16) H u(c)  = t b + r with integers |b_i| <= 127, t = max_i |(H u(c))_i| / 127 and |r| <= lost;
                   H is orthogonal, the same for all rows (`rotated`); for a query b has halves,
                   quarters, ... down to 1 / 256
    (17) u(q) . u(c) <= t_q t_c b_q . b_c + lost_q (1 + lost_c) + lost_c, by Cauchy and Schwarz:
                   (15) is among the rows whose bounds reach the k-th best score of any rows

Inputs are computed in float32 (float64 stays float64), so half inputs are rounded once, in the
gradient. Shapes broadcast over leading dimensions; arguments are taken as checked by `checks`.
"""

from elva_kernels.reference.codes import (
    MOST_COLUMNS,
    SCORE_ERROR,
    FineCodes,
    RowCodes,
    fine_codes,
    nearest_codes,
    row_codes,
    score_bounds,
)
from elva_kernels.reference.in_batch import (
    NO_CANDIDATE,
    NO_POSITIVE,
    Batch,
    RankStatistics,
    cosine_matrix,
    gradients_of_slopes,
    head_slopes,
    in_batch_gradients,
    info_nce,
    info_nce_gradients,
    info_nce_of_scores,
    mean_of_positives,
    rank_statistics,
    reward_of_head,
    statistics_of_scores,
)
from elva_kernels.reference.reward import (
    ALL,
    SAME_REWARD,
    RankingReward,
    Wanted,
    Weights,
    cosine_scores,
    group_advantages,
    live_scores,
    ranking_reward,
    ranking_reward_and_grad,
    reward_from_scores,
    reward_from_scores_backward,
)
from elva_kernels.reference.rows import compute_dtype, scaled, times_power
from elva_kernels.reference.topk import TopK, topk

__all__ = [
    "ALL",
    "MOST_COLUMNS",
    "NO_CANDIDATE",
    "NO_POSITIVE",
    "SAME_REWARD",
    "SCORE_ERROR",
    "Batch",
    "FineCodes",
    "RankStatistics",
    "RankingReward",
    "RowCodes",
    "TopK",
    "Wanted",
    "Weights",
    "compute_dtype",
    "cosine_matrix",
    "cosine_scores",
    "fine_codes",
    "gradients_of_slopes",
    "group_advantages",
    "head_slopes",
    "in_batch_gradients",
    "info_nce",
    "info_nce_gradients",
    "info_nce_of_scores",
    "live_scores",
    "mean_of_positives",
    "nearest_codes",
    "rank_statistics",
    "ranking_reward",
    "ranking_reward_and_grad",
    "reward_from_scores",
    "reward_from_scores_backward",
    "reward_of_head",
    "row_codes",
    "scaled",
    "score_bounds",
    "statistics_of_scores",
    "times_power",
    "topk",
]
