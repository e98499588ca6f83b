"""InfoNCE over the candidates of a batch."""

from typing import Literal, overload

from torch import Tensor

from elva_kernels import checks, library_batch
from elva_kernels.library import is_watched
from elva_kernels.reference_batch import RankStatistics


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
    heat = checks.temperature(op, temperature, query)
    arguments = (
        query,
        candidates,
        target,
        candidate_ids,
        heat,
        checks.max_score(op, max_score),
        bool(symmetric),
        checks.count(op, "workspace_mb", workspace_mb, 1),
        backend,
    )
    if is_watched(query, candidates, heat):
        loss, *found = library_batch.differentiable_info_nce(reduction, *arguments)
    else:
        loss, *found = library_batch.info_nce(*arguments)
        loss = library_batch.reduced(loss, reduction)
    return (loss, RankStatistics(*found)) if return_statistics else loss
