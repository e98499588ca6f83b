"""The reference as a backend: `elva_kernels.reference` behind the launchers' signatures."""

from collections.abc import Iterable

import torch
from torch import Tensor

from elva_kernels import reference
from elva_kernels.backends.head import slopes_of_head
from elva_kernels.backends.in_batch import all_statistics, reward_of_statistics
from elva_kernels.backends.launcher import Contrast, Gradients, Groups, Tensors, detached
from elva_kernels.backends.shares import Exchange
from elva_kernels.reference import Batch, FineCodes, RowCodes, Wanted, Weights

_CODED_ELEMENTS = 2**23  # at once; ours


def ranking_reward(groups: Groups, weights: Weights) -> Tensors:
    query, positive, negatives, mask, index, relevance = groups
    inputs = (query, positive, negatives, mask)
    return detached(reference.ranking_reward(*inputs, weights, index, relevance))


def ranking_reward_saved(groups: Groups, weights: Weights) -> Tensors:
    """Saves nothing that counts: the backward starts from the inputs again."""
    return *ranking_reward(groups, weights), groups.empty_saved().zero_()


def ranking_reward_backward(
    groups: Groups,
    saved: Tensor,
    grad_reward: Tensor,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    return ranking_reward_and_grad(groups, grad_reward, weights, wrt)[5:]


def ranking_reward_and_grad(
    groups: Groups,
    upstream: Tensor | None,
    weights: Weights,
    wrt: Wanted,
) -> Gradients:
    query, positive, negatives, mask, index, relevance = groups
    result, *gradients = reference.ranking_reward_and_grad(
        query, positive, negatives, mask, upstream, weights, index, wrt, relevance
    )
    found = (None if x is None else x.contiguous() for x in gradients)
    return *detached(result), *found


def reward_from_scores(
    scores: Tensor, mask: Tensor | None, relevance: Tensor | None, weights: Weights
) -> Tensors:
    return detached(reference.reward_from_scores(scores, mask, weights, relevance))


def reward_from_scores_backward(
    scores: Tensor,
    mask: Tensor | None,
    relevance: Tensor | None,
    grad_reward: Tensor,
    weights: Weights,
) -> Tensors:
    inputs = (scores, mask, grad_reward, weights, relevance)
    return detached([reference.reward_from_scores_backward(*inputs)])


def group_advantages(reward: Tensor, *, scale: str, std_eps: float) -> Tensors:
    return (reference.group_advantages(reward, scale=scale, std_eps=std_eps),)


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> Tensors:
    return detached(reference.topk(query, corpus, k, metric=metric))


def rank_statistics(
    query: Tensor, candidates: Tensor, batch: Batch, *, k: int, temperature: Tensor | None
) -> Tensors:
    found = reference.rank_statistics(query, candidates, batch, k=k, temperature=temperature)
    return all_statistics(found)


def in_batch_ranking_reward(
    query: Tensor, candidates: Tensor, batch: Batch, head: int, weights: Weights
) -> Tensors:
    found = reference.rank_statistics(query, candidates, batch, k=head, temperature=None)
    return reward_of_statistics(found, batch, head, weights)


def in_batch_ranking_reward_backward(
    query: Tensor,
    candidates: Tensor,
    index: Tensor,
    scores: Tensor,
    rank: Tensor,
    grad_reward: Tensor,
    head: int,
    weights: Weights,
    wrt: tuple[bool, bool],
    *,
    diagonal: bool = False,
) -> Gradients:
    slopes = slopes_of_head(scores, rank, head, grad_reward, weights)
    positives = rank.shape[1]
    gradients = reference.in_batch_gradients(query, candidates, index, slopes, positives)
    return _wanted(gradients, wrt)


def info_nce(contrast: Contrast) -> Tensors:
    """Holds all scores, whatever `workspace_mb` says."""
    loss, found = reference.info_nce(*contrast[:4], symmetric=contrast.symmetric)
    return *detached([loss]), *all_statistics(found)


def info_nce_and_grad(
    contrast: Contrast, weight: Tensor, wrt: tuple[bool, bool], rounded: bool
) -> Gradients:
    results = info_nce(contrast)
    query, candidates, batch, temperature, symmetric, _ = contrast
    if not rounded:
        query, candidates = (x.to(results[0].dtype) for x in (query, candidates))
        temperature = temperature.double()
    gradients = reference.info_nce_gradients(
        query, candidates, batch, temperature, weight, symmetric=symmetric
    )
    return *results, *_wanted(gradients, (*wrt, True))


def info_nce_share(
    contrast: Contrast, weight: Tensor, wrt: tuple[bool, bool], rounded: bool, exchange: Exchange
) -> Gradients:
    """The share of what one process computes of the whole batch; holds all of its scores."""
    rows, columns = exchange.rows, exchange.columns
    whole = contrast._replace(query=exchange.queries())
    *values, grad_query, grad_candidates, _ = info_nce_and_grad(whole, weight, wrt, rounded)
    own = torch.zeros_like(weight)
    own[rows] = weight[rows]
    return (
        *(None if x is None else x[rows] for x in values),
        None if grad_query is None else grad_query[rows],
        None if grad_candidates is None else grad_candidates[columns],
        info_nce_and_grad(whole, own, (False, False), rounded)[-1],
    )


def _wanted(gradients: Iterable[Tensor], wrt: Iterable[bool]) -> Gradients:
    """The gradients that are asked for, as every launcher returns them."""
    return tuple(
        gradient if wanted else None
        for gradient, wanted in zip(detached(gradients), wrt, strict=True)
    )


def row_codes(rows: Tensor, fine: bool) -> Tensors:
    """Of GPUs too. In blocks: its steps in float64 are many times the rows."""
    blocks = [
        _row_codes(some, fine) for some in rows.split(max(1, _CODED_ELEMENTS // rows.shape[1]))
    ]
    return blocks[0] if len(blocks) == 1 else tuple(map(torch.cat, zip(*blocks, strict=True)))


def _row_codes(rows: Tensor, fine: bool) -> Tensors:
    if fine:
        return detached(reference.fine_codes(rows))
    code, scale, lost = detached(reference.row_codes(rows))
    return code, code.new_empty((len(code), 0)), scale, lost


def nearest_codes(
    query: FineCodes, rows: RowCodes, depth: int, *, mask: Tensor | None, floor: Tensor | None
) -> Tensors:
    return detached(reference.nearest_codes(query, rows, depth, mask=mask, floor=floor))
