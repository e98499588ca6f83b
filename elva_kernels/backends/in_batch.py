"""The in-batch launchers of a backend that has the steps, whichever it is."""

from collections.abc import Callable

import torch
from torch import Tensor

from elva_kernels.backends.head import reward_of_head
from elva_kernels.backends.launcher import Contrast, Gradients, Tensors
from elva_kernels.backends.steps import Steps
from elva_kernels.reference import Batch, RankStatistics, Weights


def rank_statistics(
    steps: type[Steps],
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    *,
    k: int,
    temperature: Tensor | None,
) -> Tensors:
    return all_statistics(steps(query, candidates, batch, k, temperature).rank_statistics())


def in_batch_ranking_reward(
    steps: type[Steps],
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    head: int,
    weights: Weights,
) -> Tensors:
    found = steps(query, candidates, batch, head).rank_statistics()
    return reward_of_statistics(found, batch, head, weights, steps.reward_of_head)


def in_batch_ranking_reward_backward(
    steps: type[Steps],
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
    slopes = steps.slopes_of_head(scores, rank, head, grad_reward, weights)
    batch = Batch(index[:, : rank.shape[1]].contiguous(), diagonal=diagonal)
    dtypes = (query.dtype, candidates.dtype)
    call = steps(query, candidates, batch, wrt=wrt, scored=False)
    return call.gradients_of_slopes(index, slopes, dtypes)


def info_nce(steps: type[Steps], contrast: Contrast) -> Tensors:
    query, candidates, batch, temperature, symmetric, workspace_mb = contrast
    call = steps(query, candidates, batch, 0, temperature, workspace_mb)
    loss, found = call.info_nce(symmetric=symmetric)
    return loss, *all_statistics(found)


def info_nce_and_grad(
    steps: type[Steps], contrast: Contrast, weight: Tensor, wrt: tuple[bool, bool], rounded: bool
) -> Gradients:
    query, candidates, batch, temperature, symmetric, workspace_mb = contrast
    call = steps(query, candidates, batch, 0, temperature, workspace_mb, wrt)
    dtypes = (query.dtype, candidates.dtype) if rounded else (call.dtype, call.dtype)
    loss, found, *gradients, grad_temperature = call.info_nce_and_gradients(
        weight, symmetric=symmetric, dtypes=dtypes
    )
    if rounded:
        grad_temperature = grad_temperature.to(temperature.dtype)
    return loss, *all_statistics(found), *gradients, grad_temperature


def all_statistics(found: RankStatistics) -> Tensors:
    """As the registered op gives them: a logsumexp that nobody asked for is empty."""
    logsumexp = found.target_score.new_empty(0) if found.logsumexp is None else found.logsumexp
    return *found[:-1], logsumexp


def reward_of_statistics(
    found: RankStatistics,
    batch: Batch,
    head: int,
    weights: Weights,
    reward: Callable[..., Tensors] = reward_of_head,
) -> Tensors:
    """The rewards of each query's positives and hardest negatives, and their indices [B, P + h]."""
    scores = torch.cat([found.target_score, found.topk_scores], dim=1)
    index = torch.cat([batch.target, found.topk_index], dim=1)
    values = reward(scores, found.rank, head, weights)
    return *values, found.rank, scores, index
