"""Statistics, reward and InfoNCE over the candidates of a batch, as users call them."""

from typing import Literal, overload

from torch import Tensor

from elva_kernels import checks
from elva_kernels.reference import RankingReward, RankStatistics, Weights
from elva_kernels.registered import in_batch as registered
from elva_kernels.registered.library import is_watched


def rank_statistics(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    k: int = 0,
    temperature: float | Tensor | None = None,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> RankStatistics:
    """Rank each query's target among the candidates of a batch, and find its hardest negatives.

    With the cosine similarities s_ij of query i and candidate j, t_i the target and L_i the
    negatives of query i (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4, for the rank)::

        n_greater = #{j in L_i : s_ij > s_it}    n_equal = #{j in L_i : s_ij = s_it}
        rank      = 1 + n_greater + n_equal      logsumexp = log sum_{t_i and L_i} exp(s_ij / T)

    The positive loses every tie, and its score comes out of the same arithmetic as the others: a
    copy of it anywhere in `candidates` counts as equal.

    Args:
        query: [B, D], bfloat16, float16, float32 or float64, of any finite magnitude and strides.
        candidates: [M, D], as `query`.
        target: integers [B] in [0, M), each query's positive; None is ``arange(B)``. Out of range
            raises on a CPU; on a GPU, where looking would wait for the device, it is not looked at.
        k: how many of the hardest negatives to return; all of them where there are fewer.
        temperature: T > 0 of `logsumexp`, a number or a tensor of one; None: no `logsumexp`.
        candidate_ids: integers [M]; candidates with the id of a query's target are no negatives of
            that query. None: all differ.
        max_score: a candidate that scores above it is no negative of that query (the paper's
            filter of false negatives). None: no limit.
        check_finite: raise on NaN and inf rows, with their indices. Waits for the device.
        backend: "auto", or a name out of `available_backends()`, which is used or raises.

    Returns:
        RankStatistics: `rank`, `n_greater`, `n_equal` [B] int32; `target_score`, `hardest_score`,
        `logsumexp` [B] and `topk_scores` [B, min(k, M)] in float32 (float64 for float64);
        `hardest_index` [B] and `topk_index` [B, min(k, M)] int64. Negatives are ordered by score
        descending, then index ascending; places that no finite negative takes hold -inf and -1. A
        zero row scores 0. With a NaN or inf row as query or target, `target_score` and `logsumexp`
        are NaN and the rank is the worst; as a candidate of others it ranks below every number.

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
    checks.batch(op, query, candidates, target, candidate_ids, check_finite)
    checks.known_backend(op, backend)
    k = checks.count(op, "k", k, 0)
    max_score = checks.max_score(op, max_score)
    t = None if temperature is None else checks.temperature(op, temperature, query).detach()
    *results, logsumexp = registered.rank_statistics(
        query.detach(), candidates.detach(), target, candidate_ids, t, max_score, k, backend
    )
    return RankStatistics._make([*results, None if t is None else logsumexp])


def in_batch_ranking_reward(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    head: int | None = 100,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    margin: float = 0.1,
    rank_penalty: float = 0.01,
    w_margin: float = 0.4,
    w_rank: float = 0.6,
    check_finite: bool = False,
    backend: str = "auto",
) -> RankingReward:
    """`ranking_reward` with the candidates of the whole batch as each query's negatives.

    With s_0 the target's cosine similarity and r_0 its rank over all M candidates, s_i and r_i
    those of the negatives (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4)::

        margin_reward = max(0, s_0 - max_i s_i - margin)
        rank_reward   = s_0 / (1 + log r_0) - rank_penalty * sum_{r_i <= head} s_i (log r_i - 1)
        reward        = w_margin * margin_reward + w_rank * rank_reward

    Differs from the paper: it ranks a mined pool of 100 negatives a query, whose penalty has 100
    terms. Over a batch the penalty would grow with the batch, so only negatives at ranks up to
    `head` enter it; the default is the paper's pool. The margin and rank penalty that it does not
    print are ours, as in `ranking_reward`.

    Args:
        query, candidates, target, candidate_ids, max_score, check_finite, backend: as in
            `rank_statistics`.
        head: >= 1, the last rank that enters the penalty; None: all of them.
        margin, rank_penalty, w_margin, w_rank: as in `ranking_reward`.

    Returns:
        RankingReward: `reward`, `margin_reward`, `rank_reward` [B] and `scores`
        [B, 1 + min(head, M)] (the target's, then the hardest negatives' in order, then -inf) in
        float32, or float64 for float64 inputs; `rank` [B] int32, over all M. A NaN or inf row
        makes NaN of the reward of its own pair and of its own gradient; it is nobody else's
        negative.

    Raises:
        As `rank_statistics`.

    Differentiable: `reward`, once, in query and candidates (closed form; gradients in the input's
    dtype, rounded once). The other results are detached.

    Equivalent to::

        found = rank_statistics(query, candidates, target, k=head)
        k = torch.arange(1, head + 1)
        k = k + (found.target_score[:, None] > found.topk_scores)
        margin_reward = (found.target_score - found.hardest_score - margin).relu()
        rank_reward = found.target_score / (1 + found.rank.log())
        penalty = torch.where(k <= head, found.topk_scores * (k.log() - 1), 0).sum(1)
        reward = w_margin * margin_reward + w_rank * (rank_reward - rank_penalty * penalty)
    """
    op = "in_batch_ranking_reward"
    checks.batch(op, query, candidates, target, candidate_ids, check_finite)
    checks.known_backend(op, backend)
    weights = Weights(margin, rank_penalty, w_margin, w_rank)
    weights = checks.weights(op, weights, checks.WIDEST_COSINE)
    max_score = checks.max_score(op, max_score)
    head = max(1, candidates.shape[0]) if head is None else checks.count(op, "head", head, 1)
    arguments = (query, candidates, target, candidate_ids, max_score, head, weights, backend)
    if is_watched(query, candidates):
        return RankingReward(*registered.differentiable_in_batch_ranking_reward(*arguments)[:5])
    return RankingReward(*registered.in_batch_ranking_reward(*arguments)[:5])


@overload
def info_nce(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    symmetric: bool = False,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    reduction: str = "mean",
    return_statistics: Literal[False] = False,
    workspace_mb: int = 256,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    symmetric: bool = False,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    reduction: str = "mean",
    return_statistics: Literal[True],
    workspace_mb: int = 256,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, RankStatistics]: ...


def info_nce(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    symmetric: bool = False,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    reduction: str = "mean",
    return_statistics: bool = False,
    workspace_mb: int = 256,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RankStatistics]:
    """The InfoNCE loss of each query against the candidates of a batch, in bounded memory.

    With the cosine similarities s_ij, t_i the target and L_i the negatives of query i (van den Oord
    et al., arXiv:1807.03748, eq. 4)::

        loss_i = log(sum_{t_i and L_i} exp(s_ij / T)) - s_it / T

    and with `symmetric` half of that and half of its twin, in which candidate t_i looks for query i
    among the other queries (CLIP, arXiv:2103.00020): all queries but those that have t_i, or a
    candidate of its id, as target, or score above `max_score`.

    Args:
        query, candidates, target, candidate_ids, max_score, check_finite, backend: as in
            `rank_statistics`. More candidates than queries are fine: hard negatives, say.
        temperature: T, a number of at least 1e-6, or a floating tensor of one element, which then
            gets its gradient. A tensor's value is not looked at: T <= 0 gives a NaN loss.
        symmetric: both directions, out of one matrix of scores.
        reduction: "mean" or "sum" over the queries, or "none" for the loss of each.
        return_statistics: also return what `rank_statistics` gives for k = 0 and this temperature.
        workspace_mb: >= 1, megabytes of scores held at once; more is faster up to all of them,
            ``4 B M`` bytes. A few rows are held whatever it says; the reference holds all.

    Returns:
        The loss, [] or [B], in float32, or float64 for float64 inputs; with `return_statistics`
        a tuple of it and the RankStatistics. A NaN or inf row makes NaN of the loss of its own pair
        and of its own gradient; it is nobody else's negative. "mean" over no query is NaN.

    Raises:
        As `rank_statistics`.

    Differentiable: the loss, once, in query, candidates and temperature (closed form; gradients in
    the input's dtype, rounded once; 0 for zero rows). The statistics are detached.

    Equivalent to::

        scores = torch.cosine_similarity(query[:, None], candidates, dim=-1)
        loss = torch.nn.functional.cross_entropy(scores / temperature, target)
        # symmetric: also of scores.T, and half of the sum
    """
    op = "info_nce"
    checks.batch(op, query, candidates, target, candidate_ids, check_finite)
    checks.known_backend(op, backend)
    checks.reduction(op, reduction)
    t = checks.temperature(op, temperature, query)
    arguments = (
        query,
        candidates,
        target,
        candidate_ids,
        t,
        checks.max_score(op, max_score),
        bool(symmetric),
        checks.count(op, "workspace_mb", workspace_mb, 1),
        backend,
    )
    if is_watched(query, candidates, t):
        loss, *found = registered.differentiable_info_nce(reduction, *arguments)
    else:
        loss, *found = registered.info_nce(*arguments)
        loss = registered.reduced(loss, reduction)
    return (loss, RankStatistics(*found)) if return_statistics else loss
