"""InfoNCE over the candidates of a batch, as users call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from elva_kernels import checks
from elva_kernels.reference import RankStatistics
from elva_kernels.registered import in_batch as registered
from elva_kernels.registered import shares
from elva_kernels.registered.batch import Given
from elva_kernels.registered.library import is_watched, requires_grad, wanted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def info_nce(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    symmetric: bool = False,
    excluded: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    group: ProcessGroup | None = None,
    global_target: bool = False,
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
    excluded: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    group: ProcessGroup | None = None,
    global_target: bool = False,
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
    excluded: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    group: ProcessGroup | None = None,
    global_target: bool = False,
    reduction: str = "mean",
    return_statistics: bool = False,
    workspace_mb: int = 256,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RankStatistics]:
    """The InfoNCE loss of each query against the candidates of a batch, in bounded memory.

    With the cosine similarities s_ij, T_i the positives and L_i the negatives of query i (van den
    Oord et al., arXiv:1807.03748, eq. 4)::

        loss_i = mean_{t in T_i} log(exp(s_it / T) + sum_{j in L_i} exp(s_ij / T)) - s_it / T

    and with `symmetric` half of that and half of its twin, in which candidate t looks for query i
    among the other queries (CLIP, arXiv:2103.00020): all queries that have t among their
    negatives and a positive of their own. A query without a positive has loss 0 and gradient 0 and
    does not count in a mean.

    Args:
        query, candidates, target, excluded, candidate_ids, max_score, group, global_target,
            check_finite, backend: as in `rank_statistics`. More candidates than queries are fine:
            hard negatives, say.
        temperature: T, a number of at least 1e-6, or a floating tensor of one element, which then
            gets its gradient. A tensor's value is not looked at: T <= 0 gives a NaN loss.
        symmetric: both directions, out of one matrix of scores.
        reduction: "mean" over the queries that have a positive, "sum" over all, or "none" for the
            loss of each.
        return_statistics: also return what `rank_statistics` gives for k = 0 and this temperature.
        workspace_mb: >= 1, megabytes of scores held at once; more is faster up to all of them,
            ``4 B M`` bytes. A few rows are held whatever it says; the reference holds all.

    Returns:
        The loss, [] or [B], in float32, or float64 for float64 inputs; with `return_statistics`
        a tuple of it and the RankStatistics. A NaN or inf row makes NaN of the losses of those
        queries whose pair it is in, and of its own gradient; it is nobody else's negative. "mean"
        over no query is NaN.

    Raises:
        As `rank_statistics`.

    Differentiable: the loss, once, in query, candidates and temperature (closed form; gradients in
    the input's dtype, rounded once; 0 for zero rows). Those of a "mean" or a "sum" are held in the
    loss's dtype until the factor that reaches it is known. The statistics are detached.
    torch.func: `grad`, `vjp`, `jacrev` and `vmap` in any order, a `vmap` as one call after the
    other; forward mode raises, and so does a transform of a call with a group.

    With a group of W processes a "mean" is W times the sum of its own queries' losses over the
    number of all queries, a "sum" W times their sum: the mean over processes of either is what one
    process has of the whole batch, and so are the parameters' gradients after the mean over
    processes that DistributedDataParallel and FSDP2 take, however the rows are shared out. The
    factor that reaches the loss in the backward (a gradient scaler's, say) must be the same on all
    processes; with "none" each loss has its own, and the backward exchanges them.

    Equivalent to::

        scores = torch.cosine_similarity(query[:, None], candidates, dim=-1)
        loss = torch.nn.functional.cross_entropy(scores / temperature, target)
        # symmetric: also of scores.T, and half of the sum
        # several positives: the mean over them, each beside the negatives alone
    """
    op = "info_nce"
    given = Given(target, excluded, candidate_ids, max_score, global_target)
    given = checks.batch(op, query, candidates, given, group, check_finite)
    checks.known_backend(op, backend)
    checks.reduction(op, reduction)
    t = checks.temperature(op, temperature, query)
    symmetric = checks.flag(op, "symmetric", symmetric)
    return_statistics = checks.flag(op, "return_statistics", return_statistics)
    workspace_mb = checks.count(op, "workspace_mb", workspace_mb, 1)
    if group is not None:
        of_group = (t, symmetric, workspace_mb, reduction, backend)
        loss, *found = shares.info_nce(query, candidates, given, group, *of_group)
        return (loss, RankStatistics(*found)) if return_statistics else loss
    scalars = (t, given.max_score, symmetric, workspace_mb, backend)
    arguments = (query, candidates, *given[:3], *scalars)
    if is_watched(query, candidates, t):
        wrt = [requires_grad(query), requires_grad(candidates)]
        loss, *found = registered.differentiable_info_nce(reduction, wrt, *arguments)
    else:
        loss, *found = registered.info_nce(*arguments)
        loss = registered.reduced(loss, reduction, target)
    return (loss, RankStatistics(*found[:9])) if return_statistics else loss


def info_nce_and_grad(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None = None,
    *,
    wrt: Sequence[str] = ("query", "candidates"),
    temperature: float | Tensor = 0.05,
    symmetric: bool = False,
    excluded: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    max_score: float | None = None,
    group: ProcessGroup | None = None,
    global_target: bool = False,
    reduction: str = "mean",
    workspace_mb: int = 256,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`info_nce` and its gradients in one call, from scores that are computed once.

    For trainers that hold embeddings without a graph (GradCache: embed without one, take the
    gradients of the embeddings here, embed again with it).

    Args:
        wrt: the gradients that are wanted, of "query" and "candidates"; the others are neither
            computed nor written: a frozen side saves a product.
        reduction: of the loss that is differentiated: "mean" or "sum"; with "none" the losses come
            one by one and the gradients are of their sum.
        query, candidates, target, temperature, symmetric, excluded, candidate_ids, max_score,
            group, global_target, workspace_mb, check_finite, backend: as in `info_nce`.

    Returns:
        (loss, grad_query [B, D], grad_candidates [M, D], grad_temperature []): as `info_nce` and
        its backward give them, in the inputs' dtypes, rounded once; None for a gradient that is not
        in `wrt`, and for that of a temperature that is a number.

    Raises:
        As `info_nce`.

    Differentiable: no; the results are detached.

    Equivalent to::

        loss = info_nce(query, candidates, target, temperature=temperature)
        gradients = torch.autograd.grad(loss, (query, candidates, temperature))
    """
    op = "info_nce_and_grad"
    given = Given(target, excluded, candidate_ids, max_score, global_target)
    given = checks.batch(op, query, candidates, given, group, check_finite)
    checks.known_backend(op, backend)
    checks.reduction(op, reduction)
    asked = checks.wrt(op, wrt, ("query", "candidates"))
    t = checks.temperature(op, temperature, query).detach()
    symmetric = checks.flag(op, "symmetric", symmetric)
    workspace_mb = checks.count(op, "workspace_mb", workspace_mb, 1)
    query, candidates = query.detach(), candidates.detach()
    if group is not None:
        of_group = (t, symmetric, workspace_mb, reduction, backend, asked)
        loss, gradients = shares.info_nce_and_grad(query, candidates, given, group, *of_group)
    else:
        scalars = (t, given.max_score, symmetric, workspace_mb, backend)
        of_loss = (None, reduction == "mean", asked, True)
        loss, *found = registered.info_nce_and_grad(
            query, candidates, *given[:3], *scalars, *of_loss
        )
        loss, gradients = registered.reduced(loss, reduction, target), tuple(found[-3:])
    grads = wanted(gradients, (*asked, isinstance(temperature, Tensor)))
    return loss, grads[0], grads[1], grads[2]
