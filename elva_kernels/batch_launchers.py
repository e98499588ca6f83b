"""The in-batch ops as `library_batch` calls them: of the reference, and of a backend's steps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from elva_kernels import in_batch, reference_batch
from elva_kernels.reference_batch import Batch, RankStatistics

Tensors = tuple[Tensor, ...]
Steps = Callable[..., in_batch.Run]


def reference_statistics(
    query: Tensor, candidates: Tensor, batch: Batch, **options: Any
) -> Tensors:
    found = reference_batch.rank_statistics(query, candidates, batch, **options)
    return _all_statistics(found)


def _all_statistics(found: RankStatistics) -> Tensors:
    """As the registered op gives them: a logsumexp that nobody asked for is empty."""
    logsumexp = found.target_score.new_empty(0) if found.logsumexp is None else found.logsumexp
    return own((*found[:-1], logsumexp))


def reference_in_batch_reward(
    query: Tensor, candidates: Tensor, batch: Batch, head: int, **weights: float
) -> Tensors:
    found = reference_batch.rank_statistics(query, candidates, batch, k=head, temperature=None)
    return _reward_of_statistics(found, batch, head, **weights)


def _reward_of_statistics(
    found: RankStatistics, batch: Batch, head: int, **weights: float
) -> Tensors:
    scores = torch.cat([found.target_score.unsqueeze(1), found.topk_scores], dim=1)
    index = torch.cat([batch.target.unsqueeze(1), found.topk_index], dim=1)
    return own((*reference_batch.reward_of_head(scores, found.rank, head, **weights), index))


def reference_in_batch_backward(*tensors: Any, **weights: float) -> Tensors:
    query, candidates, index, scores, rank, grad_reward, head = tensors
    slopes = reference_batch.head_slopes(scores, rank, head, grad_reward, **weights)
    return own(reference_batch.in_batch_gradients(query, candidates, index, slopes))


def reference_info_nce(*tensors: Any, symmetric: bool, workspace_mb: int) -> Tensors:
    loss, found = reference_batch.info_nce(*tensors, symmetric=symmetric)
    return *own([loss]), *_all_statistics(found)


def reference_info_nce_saved(
    *tensors: Any, mean: bool, symmetric: bool, workspace_mb: int
) -> Tensors:
    query, candidates, batch, temperature = tensors
    results = reference_info_nce(*tensors, symmetric=symmetric, workspace_mb=workspace_mb)
    query, candidates = (x.to(results[0].dtype) for x in (query, candidates))  # no rounding yet
    weight = torch.full_like(results[0], _weight(query, mean))
    gradients = reference_batch.info_nce_gradients(
        query, candidates, batch, temperature.double(), weight, symmetric=symmetric
    )
    return *results, *own(gradients)


def _weight(query: Tensor, mean: bool) -> float:
    """A query's weight in the reduced loss."""
    return 1 / max(1, len(query)) if mean else 1.0


def reference_info_nce_backward(*tensors: Any, symmetric: bool, workspace_mb: int) -> Tensors:
    return own(reference_batch.info_nce_gradients(*tensors, symmetric=symmetric))


def stepped_statistics(
    run: Steps,
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    *,
    k: int,
    temperature: Tensor | None,
) -> Tensors:
    return _all_statistics(run(query, candidates, batch, k, temperature).rank_statistics())


def stepped_in_batch_reward(
    run: Steps,
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    head: int,
    **weights: float,
) -> Tensors:
    found = run(query, candidates, batch, head).rank_statistics()
    return _reward_of_statistics(found, batch, head, **weights)


def stepped_in_batch_backward(run: Steps, *tensors: Any, **weights: float) -> Tensors:
    query, candidates, index, scores, rank, grad_reward, head = tensors
    slopes = reference_batch.head_slopes(scores, rank, head, grad_reward, **weights)
    batch = Batch(index[:, 0].contiguous(), None, None)
    dtypes = (query.dtype, candidates.dtype)
    return run(query, candidates, batch).gradients_of_slopes(index, slopes, dtypes)


def stepped_info_nce(run: Steps, *tensors: Any, symmetric: bool, workspace_mb: int) -> Tensors:
    query, candidates, batch, temperature = tensors
    call = run(query, candidates, batch, 0, temperature, workspace_mb)
    loss, found = call.info_nce(symmetric=symmetric)
    return loss, *_all_statistics(found)


def stepped_info_nce_saved(
    run: Steps,
    *tensors: Any,
    mean: bool,
    symmetric: bool,
    workspace_mb: int,
) -> Tensors:
    query, candidates, batch, temperature = tensors
    call = run(query, candidates, batch, 0, temperature, workspace_mb)
    weight = query.new_full((len(query),), _weight(query, mean), dtype=torch.float64)
    loss, found, *gradients = call.info_nce_and_gradients(
        weight, symmetric=symmetric, dtypes=(call.dtype, call.dtype)
    )
    return loss, *_all_statistics(found), *gradients


def stepped_info_nce_backward(
    run: Steps, *tensors: Any, symmetric: bool, workspace_mb: int
) -> Tensors:
    query, candidates, batch, temperature, weight = tensors
    call = run(query, candidates, batch, 0, temperature, workspace_mb)
    dtypes = (query.dtype, candidates.dtype)
    *_, grad_query, grad_candidates, heat = call.info_nce_and_gradients(
        weight, symmetric=symmetric, dtypes=dtypes
    )
    return grad_query, grad_candidates, heat.to(temperature.dtype)


def own(results: Iterable[Tensor]) -> Tensors:
    """Results as every backend returns them: contiguous and without a graph."""
    return tuple(tensor.detach().contiguous() for tensor in results)
