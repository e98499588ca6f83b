"""The in-batch launchers of a backend that has the steps, whichever it is."""

import torch
from torch import Tensor

from elva_kernels import reference
from elva_kernels.backends.launcher import Tensors, detached
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
    return reward_of_statistics(found, batch, head, weights)


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
) -> Tensors:
    slopes = reference.head_slopes(scores, rank, head, grad_reward, weights)
    batch = Batch(index[:, 0].contiguous(), None, None)
    dtypes = (query.dtype, candidates.dtype)
    return steps(query, candidates, batch).gradients_of_slopes(index, slopes, dtypes)


def info_nce(
    steps: type[Steps],
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    temperature: Tensor,
    *,
    symmetric: bool,
    workspace_mb: int,
) -> Tensors:
    call = steps(query, candidates, batch, 0, temperature, workspace_mb)
    loss, found = call.info_nce(symmetric=symmetric)
    return loss, *all_statistics(found)


def info_nce_saved(
    steps: type[Steps],
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    temperature: Tensor,
    *,
    mean: bool,
    symmetric: bool,
    workspace_mb: int,
) -> Tensors:
    call = steps(query, candidates, batch, 0, temperature, workspace_mb)
    weight = query.new_full((len(query),), weight_in_loss(query, mean), dtype=torch.float64)
    loss, found, *gradients = call.info_nce_and_gradients(
        weight, symmetric=symmetric, dtypes=(call.dtype, call.dtype)
    )
    return loss, *all_statistics(found), *gradients


def info_nce_backward(
    steps: type[Steps],
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    temperature: Tensor,
    weight: Tensor,
    *,
    symmetric: bool,
    workspace_mb: int,
) -> Tensors:
    call = steps(query, candidates, batch, 0, temperature, workspace_mb)
    dtypes = (query.dtype, candidates.dtype)
    *_, grad_query, grad_candidates, grad_temperature = call.info_nce_and_gradients(
        weight, symmetric=symmetric, dtypes=dtypes
    )
    return grad_query, grad_candidates, grad_temperature.to(temperature.dtype)


def all_statistics(found: RankStatistics) -> Tensors:
    """As the registered op gives them: a logsumexp that nobody asked for is empty."""
    logsumexp = found.target_score.new_empty(0) if found.logsumexp is None else found.logsumexp
    return detached((*found[:-1], logsumexp))


def reward_of_statistics(
    found: RankStatistics, batch: Batch, head: int, weights: Weights
) -> Tensors:
    """The reward of each query's target and hardest negatives, and their indices [B, 1 + h]."""
    scores = torch.cat([found.target_score.unsqueeze(1), found.topk_scores], dim=1)
    index = torch.cat([batch.target.unsqueeze(1), found.topk_index], dim=1)
    return detached((*reference.reward_of_head(scores, found.rank, head, weights), index))


def weight_in_loss(query: Tensor, mean: bool) -> float:
    """A query's weight in the reduced loss."""
    return 1 / max(1, len(query)) if mean else 1.0
