"""The grouped reward and its relatives, as users call them."""

from collections.abc import Sequence

from torch import Tensor

from elva_kernels import checks
from elva_kernels.backends.launcher import Groups
from elva_kernels.reference import RankingReward, Weights
from elva_kernels.registered import reward as registered
from elva_kernels.registered.library import is_watched, requires_grad


def ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    negative_index: Tensor | None = None,
    mask: Tensor | None = None,
    relevance: Tensor | None = None,
    margin: float = 0.1,
    rank_penalty: float = 0.01,
    w_margin: float = 0.4,
    w_rank: float = 0.6,
    rank_temperature: float = 0.0,
    check_finite: bool = False,
    backend: str = "auto",
) -> RankingReward:
    """Reward a query's embedding for ranking its positive above its negatives.

    With the cosine similarities s_0 (positive) and s_i (negatives), and r_i the 1-based rank of
    candidate i among all N + 1 (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4)::

        margin_reward = max(0, s_0 - max_i s_i - margin)
        rank_reward   = s_0 / (1 + log r_0) - rank_penalty * sum_i s_i (log r_i - 1)
        reward        = w_margin * margin_reward + w_rank * rank_reward

    Differs from the paper: it prints neither its margin nor its rank penalty, so both defaults are
    ours, after what they do to 3,177 groups of 101 on a trained model
    (`benchmarks/results/reward-defaults-emoji.json`): margin 0.1 is kept by 31 % of the groups
    whose positive is first (0.05: 66 %, 0.2: 1 %), so the hinge tells them apart; with
    rank_penalty 0.01 the better of two ranks has the higher rank reward in 98 % of pairs (0.03:
    92 %, 0.1: 81 %). `log` is read as the natural one; the positive loses every tie, since
    otherwise a collapsed model, whose scores are all equal, would earn the best rank.

    With a `relevance` g_i in [0, 1] each negative is a positive by g_i, a negative by the rest::

        margin_reward = max(0, s_0 - max_i (s_i - margin * g_i) - margin)
        rank_reward   = s_0 / (1 + log r_0) + sum_i g_i s_i / (1 + log r_i)
                        - rank_penalty * sum_i (1 - g_i) s_i (log r_i - 1)

    Differs from the paper: its abstract treats negatives by their similarity to the positive and
    gives no formula. This one is ours: a graded DCG with the paper's discount, and a margin of
    ``margin * (1 - g_i)`` to negative i. The op does not normalise in secret: the gain of an ideal
    order, all scores 1, is ``1 + sum_j g_(j) / (1 + log(j + 1))``, g sorted downwards and j from 1.

    Args:
        query: [*, D], bfloat16, float16, float32 or float64, of any finite magnitude and any
            strides. The leading dimensions `*` of all tensors broadcast against each other.
        positive: [*, D], as `query`.
        negatives: [*, N, D], as `query`; N may be 0. With `negative_index` a bank [M, D].
        negative_index: integers [*, N]: a group's negative i is row ``negative_index[..., i]`` of
            the bank, in [0, M), or none where it is -1, as if it were masked. Rows are read where
            they lie, never gathered, and may be named any number of times; rows that nobody names
            are not read. On a GPU, where nobody looks, an entry out of range makes its group's
            reward NaN.
        mask: bool [*, N], True where a negative is live. A masked row is never read: whatever it
            holds, its score is -inf and its gradient 0.
        relevance: [*, N], bfloat16, float16, float32 or float64 (rounded to the reward's dtype), in
            [0, 1]: how relevant negative i is itself, 1 as the positive and 0 not at all; None is 0
            everywhere. Not differentiable: a constant. `rank` and `scores` do not depend on it;
            what it holds of a masked negative is not looked at. On a GPU, which is not waited for,
            a value out of range makes its group's reward and gradients NaN.
        margin: cosine difference in [-2, 2]; a negative one keeps the hinge open.
        rank_penalty: >= 0. Its weights sum to log((N + 1)!) - N (268 at N = 100), so a fixed value
            weighs more with more negatives. To hold its total at g whatever N is, pass
            ``g / (math.lgamma(N + 2) - N)``; the op does not rescale in secret.
        w_margin: weight >= 0 of the margin reward; the paper's alpha.
        w_rank: weight >= 0 of the rank reward; the paper's epsilon.
        rank_temperature: 0 for the paper's integer ranks, constants to the gradient. Above 0 (at
            least 1e-6) every rank in `rank_reward` becomes
            ``1 + sum_j sigmoid((s_j - s_i) / rank_temperature)``, so that the gradient sees the
            ranks; ours, not the paper's. `rank` stays the integer.
        check_finite: raise on NaN and inf rows, with their indices. Waits for the device.
        backend: "auto", or a name out of `available_backends()`, which is used or raises.

    Returns:
        RankingReward: `reward`, `margin_reward`, `rank_reward` [*] and `scores` [*, N + 1] (the
        positive first) in float32, or float64 for float64 inputs; `rank` [*] int32, equal to
        ``1 + (scores[..., 1:] >= scores[..., :1]).sum(-1)``. A zero row scores 0. A NaN or inf row
        makes its own group's reward and gradients NaN, ranks last, and touches no other group.

    Raises:
        ValueError: a shape, device, layout or number out of its range; a row under `check_finite`;
            on a CPU an entry of `negative_index` that is no row of the bank, or of `relevance`
            that is not in [0, 1], with its position.
        TypeError: a dtype, or an argument of another type.
        BackendUnavailable: the named backend cannot run here.

    Differentiable: `reward`, once, in query, positive and negatives (closed form; gradients in the
    input's dtype, rounded once; 0 for zero rows). The gradient of a row that groups share, or that
    an index names several times, is a sum in the order of the groups, scaled and rounded once; a
    bank's is [M, D], 0 where nobody names a row. What requires no gradient costs none: a frozen
    bank is read once. The other results are detached. torch.func: `grad`, `vjp`, `jacrev` and
    `vmap` in any order, a `vmap` as one launch; forward mode raises.

    With an index `negatives` is below ``negatives[negative_index]``, masked where the index is -1.

    Equivalent to::

        candidates = torch.cat([positive.unsqueeze(-2), negatives], -2)
        scores = torch.cosine_similarity(query.unsqueeze(-2), candidates, dim=-1)
        rank = 1 + (scores[..., 1:] >= scores[..., :1]).sum(-1)
        ranked = scores[..., 1:].sort(descending=True).values
        k = torch.arange(1, N + 1)
        k = k + (k >= rank.unsqueeze(-1))  # the positive's rank is left out
        margin_reward = (scores[..., 0] - ranked[..., 0] - margin).relu()  # 0 where N is 0
        rank_reward = scores[..., 0] / (1 + rank.log())
        rank_reward = rank_reward - rank_penalty * (ranked * (k.log() - 1)).sum(-1)
        reward = w_margin * margin_reward + w_rank * rank_reward
    """
    op = "ranking_reward"
    groups = Groups(query, positive, negatives, mask, negative_index, relevance)
    groups = checks.groups(op, groups)
    checks.known_backend(op, backend)
    weights = Weights(margin, rank_penalty, w_margin, w_rank, rank_temperature)
    weights = checks.weights(op, weights, checks.WIDEST_COSINE)
    if checks.flag(op, "check_finite", check_finite):
        checks.finite_rows(op, groups)
    if is_watched(query, positive, negatives):
        wrt = tuple(requires_grad(x) for x in (query, positive, negatives))
        results = registered.differentiable_ranking_reward(*groups, weights, wrt, backend)
        return RankingReward(*results[:5])
    return RankingReward(*registered.ranking_reward(*groups, weights, backend))


def ranking_reward_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    negative_index: Tensor | None = None,
    mask: Tensor | None = None,
    relevance: Tensor | None = None,
    weight: Tensor | None = None,
    wrt: Sequence[str] = checks.EMBEDDINGS,
    margin: float = 0.1,
    rank_penalty: float = 0.01,
    w_margin: float = 0.4,
    w_rank: float = 0.6,
    rank_temperature: float = 0.0,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[RankingReward, Tensor | None, Tensor | None, Tensor | None]:
    """`ranking_reward` and its gradients at once: each input read once, each gradient written once.

    For trainers that know the upstream gradient beforehand, as policy gradients and plain reward
    maximisation do.

    Args:
        query, positive, negatives, negative_index, mask, relevance, margin, rank_penalty, w_margin,
            w_rank, rank_temperature, check_finite, backend: as in `ranking_reward`.
        weight: the upstream gradient of each reward, broadcastable to [*], of any floating dtype
            (computed in the reward's); None is 1.
        wrt: names out of "query", "positive" and "negatives": the gradients that are wanted. The
            others are neither computed nor written: without "negatives" a bank is read once.

    Returns:
        The RankingReward, then the gradients of ``sum(weight * reward)`` on query, positive and
        negatives: in the input's shape and dtype, rounded once, contiguous; None for one that is
        not in `wrt`.

    Raises:
        As `ranking_reward`; ValueError: a name in `wrt` that is none of the three.

    Differentiable: nothing; all results are detached.

    Equivalent to::

        result = ranking_reward(query, positive, negatives, ...)
        grads = torch.autograd.grad(result.reward, [query, positive, negatives], weight)

    with None in the places that `wrt` does not name.
    """
    op = "ranking_reward_and_grad"
    groups = Groups(query, positive, negatives, mask, negative_index, relevance)
    groups = checks.groups(op, groups)
    wanted = checks.wrt(op, wrt, checks.EMBEDDINGS)
    checks.known_backend(op, backend)
    weights = Weights(margin, rank_penalty, w_margin, w_rank, rank_temperature)
    weights = checks.weights(op, weights, checks.WIDEST_COSINE)
    if weight is not None:
        weight = checks.upstream(op, weight, groups)
    if checks.flag(op, "check_finite", check_finite):
        checks.finite_rows(op, groups)
    inputs = (query, positive, negatives)
    if is_watched(*inputs):
        inputs = (query.detach(), positive.detach(), negatives.detach())
    results = registered.ranking_reward_and_grad(
        *inputs, *groups[3:], weight, weights, wanted, backend
    )
    grads = (x if kept else None for x, kept in zip(results[5:], wanted, strict=True))
    grad_query, grad_positive, grad_negatives = grads
    return RankingReward(*results[:5]), grad_query, grad_positive, grad_negatives


def reward_from_scores(
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    relevance: Tensor | None = None,
    margin: float = 0.1,
    rank_penalty: float = 0.01,
    w_margin: float = 0.4,
    w_rank: float = 0.6,
    rank_temperature: float = 0.0,
    check_finite: bool = False,
    backend: str = "auto",
) -> RankingReward:
    """`ranking_reward` of given scores: of a re-ranker, a cross-encoder, or any other similarity.

    The equations are `ranking_reward`'s (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4) with s_i
    read from `scores` as they are: not normalised, not clamped. Half scores are ranked as given, so
    pass float32 where there is a choice: rounding alone makes ties.

    Args:
        scores: [*, C], C = N + 1, the positive's first; bfloat16, float16, float32 or float64.
        mask: bool [*, N] over the negatives ``scores[..., 1:]``, True where one is live.
        relevance: [*, N] in [0, 1], how relevant each negative is itself; as in `ranking_reward`.
        margin: difference of scores, any finite number.
        rank_penalty, w_margin, w_rank, rank_temperature, check_finite, backend: as in
            `ranking_reward`; `rank_temperature` is in units of the scores.

    Returns:
        RankingReward; `scores` are the given ones in float32 (float64 for float64), -inf where
        masked. A live NaN or inf score makes its own group's reward and gradient NaN.

    Raises:
        As `ranking_reward`.

    Differentiable: `reward`, once, in scores. The other results are detached. torch.func: as
    `ranking_reward`.

    Equivalent to: `ranking_reward`'s equivalent, from its second line on.
    """
    op = "reward_from_scores"
    relevance = checks.scores(op, scores, mask, relevance)
    checks.known_backend(op, backend)
    weights = Weights(margin, rank_penalty, w_margin, w_rank, rank_temperature)
    weights = checks.weights(op, weights, checks.LARGEST)
    if checks.flag(op, "check_finite", check_finite):
        checks.finite_scores(op, scores, mask)
    inputs = (scores, mask, relevance, weights, backend)
    if is_watched(scores):
        return RankingReward(*registered.differentiable_reward_from_scores(*inputs))
    return RankingReward(*registered.reward_from_scores(*inputs))


def group_advantages(reward: Tensor, *, scale: str = "std", std_eps: float = 1e-4) -> Tensor:
    """Advantage of each rollout over its group: ``(reward - mean) / (std + std_eps)``.

    GRPO (DeepSeekMath, arXiv:2402.03300, sec. 4.1), with the unbiased standard deviation, as TRL.

    Args:
        reward: [*, G], floating; G rollouts a group.
        scale: the divisor. "std": the group's own (TRL's "group"); "batch": the one over all
            rewards given, groups with NaN or inf left out (TRL's "batch"); "none": 1.
        std_eps: >= 0, in units of the reward. With 1e-8 a rounding difference of 1e-7 would become
            an advantage of one, so the default is larger: ours.

    Returns:
        [*, G] in float32 (float64 for float64). All 0 for G = 1 and for a group whose rewards
        differ by less than 1e-6. A NaN or inf reward makes its own group's advantages NaN, no
        other's.

    Raises:
        ValueError: a shape or number out of its range, an unknown scale.
        TypeError: a dtype, or an argument of another type.

    Differentiable: no; advantages are weights, and come detached.

    Equivalent to::

        (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + std_eps)
    """
    op = "group_advantages"
    std_eps = checks.rewards(op, reward, scale, std_eps)
    advantages: Tensor = registered.group_advantages(reward.detach(), scale, std_eps, "auto")
    return advantages
