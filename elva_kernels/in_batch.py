"""Statistics and reward over the candidates of a batch, as users call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elva_kernels import checks
from elva_kernels.reference import RankingReward, RankStatistics, Weights
from elva_kernels.registered import in_batch as registered
from elva_kernels.registered import shares
from elva_kernels.registered.batch import Given
from elva_kernels.registered.library import is_watched, requires_grad, wanted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rank_statistics(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    k: int = 0,
    temperature: float | Tensor | None = None,
    excluded: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    group: ProcessGroup | None = None,
    global_target: bool = False,
    check_finite: bool = False,
    backend: str = "auto",
) -> RankStatistics:
    """Rank each query's positives among the candidates of a batch, and find its hardest negatives.

    With the cosine similarities s_ij of query i and candidate j, T_i the positives of query i and
    L_i its negatives (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4, for the rank), for t in T_i::

        n_greater = #{j in L_i : s_ij > s_it}    n_equal = #{j in L_i : s_ij = s_it}
        rank      = 1 + n_greater + n_equal      logsumexp = log sum_{T_i and L_i} exp(s_ij / T)

    A positive loses every tie, and its score comes out of the same arithmetic as the others: a
    copy of it anywhere in `candidates` counts as equal. Negatives are all candidates but those that
    are positives of the query, or that `excluded`, `candidate_ids` or `max_score` leave out: none
    of these is ever formed as a [B, M] mask.

    Args:
        query: [B, D], bfloat16, float16, float32 or float64, of any finite magnitude and strides.
        candidates: [M, D], as `query`.
        target: integers [B] in [0, M), each query's positive, or [B, P], its positives, filled up
            with -1: none of them is its negative, and one listed twice counts twice. None is
            ``arange(B)``. Out of range raises on a CPU; on a GPU, where looking would wait for the
            device, the results of that pair are NaN.
        k: how many of the hardest negatives to return; all of them where there are fewer.
        temperature: T > 0 of `logsumexp`, a number or a tensor of one; None: no `logsumexp`.
        excluded: integers [E, 2], pairs (row of query, row of candidates) that are no negatives, in
            any order, repeats allowed; fastest in ascending order of the query. On a CPU a pair out
            of range, or one that names a positive, raises; on a GPU it says nothing.
        candidate_ids: integers [M]; candidates with the id of one of a query's positives are no
            negatives of that query. None: all differ.
        max_score: a candidate that scores above it is no negative of that query (the paper's
            filter of false negatives). None: no limit.
        group: a process group of torch.distributed, every process of which makes this call with
            its own queries and candidates, of any number: the candidates are then those of all
            processes, in the order of their ranks, M in all, and results are of its own queries,
            what one process computes from the rows of all. Rows travel once, never scores. None:
            this process alone.
        global_target: with a group, whether `target` and the candidates of `excluded` are rows of
            all M candidates; else they are rows of its own. `candidate_ids` are always of its own.
        check_finite: raise on NaN and inf rows, with their indices. Waits for the device.
        backend: "auto", or a name out of `available_backends()`, which is used or raises.

    Returns:
        RankStatistics: `rank`, `n_greater`, `n_equal` int32 and `target_score` in the shape of
        `target`, [B] or [B, P] (0, 0, 0 and -inf where it holds -1); `hardest_score`, `logsumexp`
        [B] and `topk_scores` [B, min(k, M)], as `target_score` in float32 (float64 for float64);
        `hardest_index` [B] and `topk_index` [B, min(k, M)] int64. Negatives are ordered by score
        descending, then index ascending; places that no finite negative takes hold -inf and -1. A
        zero row scores 0. With a NaN or inf row as query or positive, `target_score` and
        `logsumexp` are NaN and the rank is the worst; as a candidate of others it ranks below every
        number.

    Raises:
        ValueError: a shape, device, layout, index or number out of its range.
        TypeError: a dtype, or an argument of another type.
        BackendUnavailable: the named backend cannot run here.

    Differentiable: nothing; all results are detached.

    Equivalent to::

        scores = torch.cosine_similarity(query[:, None], candidates, dim=-1)
        target_score = scores.gather(1, target[:, None])
        negative = torch.arange(M) != target[:, None]
        rank = 1 + (negative & (scores >= target_score)).sum(1)
        topk_scores, topk_index = scores.where(negative, -torch.inf).topk(k)
        logsumexp = (scores / temperature).logsumexp(1)
    """
    op = "rank_statistics"
    given = Given(target, excluded, candidate_ids, max_score, global_target)
    given = checks.batch(op, query, candidates, given, group, check_finite)
    checks.known_backend(op, backend)
    k = checks.count(op, "k", k, 0)
    t = None if temperature is None else checks.temperature(op, temperature, query).detach()
    query, candidates = query.detach(), candidates.detach()
    if group is None:
        scalars = (t, given.max_score, k, backend)
        found = registered.rank_statistics(query, candidates, *given[:3], *scalars)
    else:
        found = shares.rank_statistics(query, candidates, given, group, t, k, backend)
    *results, logsumexp = found
    return RankStatistics._make([*results, None if t is None else logsumexp])


def in_batch_ranking_reward(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    head: int | None = 100,
    excluded: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    group: ProcessGroup | None = None,
    global_target: bool = False,
    margin: float = 0.1,
    rank_penalty: float = 0.01,
    w_margin: float = 0.4,
    w_rank: float = 0.6,
    check_finite: bool = False,
    backend: str = "auto",
) -> RankingReward:
    """`ranking_reward` with the candidates of the whole batch as each query's negatives.

    With s_0 a positive's cosine similarity and r_0 its rank over all M candidates, s_i and r_i
    those of the negatives (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4)::

        margin_reward = max(0, s_0 - max_i s_i - margin)
        rank_reward   = s_0 / (1 + log r_0) - rank_penalty * sum_{r_i <= head} s_i (log r_i - 1)
        reward        = w_margin * margin_reward + w_rank * rank_reward

    Of several positives each has its reward against the same negatives, and the query their mean; a
    query without one has reward 0.

    Differs from the paper: it ranks a mined pool of 100 negatives a query, whose penalty has 100
    terms. Over a batch the penalty would grow with the batch, so only negatives at ranks up to
    `head` enter it; the default is the paper's pool. The margin and rank penalty that it does not
    print are ours, as in `ranking_reward`.

    Args:
        query, candidates, target, excluded, candidate_ids, max_score, group, global_target,
            check_finite, backend: as in `rank_statistics`.
        head: >= 1, the last rank that enters the penalty; None: all of them.
        margin, rank_penalty, w_margin, w_rank: as in `ranking_reward`.

    Returns:
        RankingReward: `reward`, `margin_reward`, `rank_reward` [B] and `scores`
        [B, P + min(head, M)] (the positives', -inf where `target` holds -1, then the hardest
        negatives' in order, then -inf; P = 1 for a target [B]) in float32, or float64 for float64
        inputs; `rank` int32 in the shape of `target`, over all M, 0 where it holds -1. A NaN or inf
        row makes NaN of the rewards of those queries whose pair it is in, and of its own gradient;
        it is nobody else's negative.

    Raises:
        As `rank_statistics`.

    Differentiable: `reward`, once, in query and candidates (closed form; gradients in the input's
    dtype, rounded once). The other results are detached. With a group, a process's rows receive the
    gradient of the sum of all processes' losses: the mean over processes of the parameters'
    gradients, as DistributedDataParallel and FSDP2 take it, is that of the mean of the losses. The
    backward exchanges a few numbers too, so every process has to run it. torch.func: as `info_nce`.

    Equivalent to::

        found = rank_statistics(query, candidates, target, k=head)
        k = torch.arange(1, min(head, M) + 1)
        k = k + (found.target_score[:, None] > found.topk_scores)
        margin_reward = (found.target_score - found.hardest_score - margin).relu()
        rank_reward = found.target_score / (1 + found.rank.log())
        penalty = torch.where(k <= head, found.topk_scores * (k.log() - 1), 0).sum(1)
        reward = w_margin * margin_reward + w_rank * (rank_reward - rank_penalty * penalty)
    """
    op = "in_batch_ranking_reward"
    given = Given(target, excluded, candidate_ids, max_score, global_target)
    given = checks.batch(op, query, candidates, given, group, check_finite)
    checks.known_backend(op, backend)
    head = None if head is None else checks.count(op, "head", head, 1)
    weights = checks.weights(
        op, Weights(margin, rank_penalty, w_margin, w_rank), checks.WIDEST_COSINE
    )
    if group is not None:
        scalars = (head, weights, backend)
        return RankingReward(
            *shares.in_batch_ranking_reward(query, candidates, given, group, *scalars)
        )
    head = max(1, candidates.shape[0]) if head is None else head
    arguments = (query, candidates, *given.named, head, weights, op, backend)
    if is_watched(query, candidates):
        wrt = [requires_grad(query), requires_grad(candidates)]
        results = registered.differentiable_in_batch_ranking_reward(wrt, *arguments)
    else:
        results = registered.in_batch_ranking_reward(*arguments)
    return RankingReward(*results[:5])


def in_batch_ranking_reward_and_grad(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    wrt: Sequence[str] = ("query", "candidates"),
    head: int | None = 100,
    excluded: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    group: ProcessGroup | None = None,
    global_target: bool = False,
    margin: float = 0.1,
    rank_penalty: float = 0.01,
    w_margin: float = 0.4,
    w_rank: float = 0.6,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[RankingReward, Tensor | None, Tensor | None]:
    """`in_batch_ranking_reward` and the gradients of ``sum(weight * reward)`` in one call.

    For trainers that hold embeddings without a graph (GradCache: embed without one, take the
    gradients of the embeddings here, embed again with it).

    Args:
        weight: broadcastable to the reward [B], the upstream gradient; None is 1.
        wrt: the gradients that are wanted, of "query" and "candidates"; the others are neither
            computed nor written.
        query, candidates, target, head, excluded, candidate_ids, max_score, group, global_target,
            margin, rank_penalty, w_margin, w_rank, check_finite, backend: as in
            `in_batch_ranking_reward`. With a group the gradients are of the sum of all processes'
            ``sum(weight * reward)``, on its own rows.

    Returns:
        (RankingReward, grad_query [B, D], grad_candidates [M, D]): the gradients in the inputs'
        dtype, rounded once, as `in_batch_ranking_reward`'s backward gives them; None for one that
        is not in `wrt`.

    Raises:
        As `in_batch_ranking_reward`.

    Differentiable: no; the results are detached.

    Equivalent to::

        result = in_batch_ranking_reward(query, candidates, target)
        grad_query, grad_candidates = torch.autograd.grad(
            (weight * result.reward).sum(), (query, candidates)
        )
    """
    op = "in_batch_ranking_reward_and_grad"
    given = Given(target, excluded, candidate_ids, max_score, global_target)
    given = checks.batch(op, query, candidates, given, group, check_finite)
    checks.known_backend(op, backend)
    asked = checks.wrt(op, wrt, ("query", "candidates"))
    head = None if head is None else checks.count(op, "head", head, 1)
    weights = checks.weights(
        op, Weights(margin, rank_penalty, w_margin, w_rank), checks.WIDEST_COSINE
    )
    if weight is not None:
        weight = checks.upstream_of(op, weight, query, query.shape[:1])
    query, candidates = query.detach(), candidates.detach()
    if group is not None:
        scalars = (head, weights, backend, asked, weight)
        values, (grad_query, grad_candidates) = shares.in_batch_ranking_reward_and_grad(
            query, candidates, given, group, *scalars
        )
        return RankingReward(*values), grad_query, grad_candidates
    head = max(1, candidates.shape[0]) if head is None else head
    *values, index = registered.in_batch_ranking_reward(
        query, candidates, *given.named, head, weights, op, backend
    )
    result = RankingReward(*values)
    if not any(asked):
        return result, None, None
    one = torch.ones_like(result.reward)
    upstream = one if weight is None else weight.expand(one.shape)
    gradients = registered.in_batch_ranking_reward_backward(
        query,
        candidates,
        index,
        result.scores,
        result.rank,
        upstream,
        head,
        weights,
        asked,
        backend,
        target is None,
    )
    grad_query, grad_candidates = wanted(gradients, asked)
    return result, grad_query, grad_candidates
