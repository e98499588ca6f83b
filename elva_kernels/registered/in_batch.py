"""The in-batch ops as torch knows them.

Every op takes checked arguments with `target` and `candidate_ids` as they were passed; here they
become int64 tensors whose values lie in range (on a CPU; a GPU has to be trusted or waited for).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from elva_kernels.backends.boundary import in_default_float_mode
from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import Batch, Weights, compute_dtype
from elva_kernels.registered.library import (
    Registered,
    gradient_op,
    refuse_second_derivative,
    register,
)


def _batch(
    op: str,
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None,
    candidate_ids: Tensor | None,
    max_score: float | None,
) -> Batch:
    m = len(candidates)
    if target is None:
        target = torch.arange(len(query), device=query.device)
    elif target.device.type == "cpu" and target.numel() > 0:
        low, high = (int(x) for x in target.aminmax())
        if low < 0 or high >= m:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{op}: target must hold indices of candidates, in [0, {m}), got {wrong}; "
                "give each query the row of its positive"
            )
    if candidate_ids is not None:
        candidate_ids = candidate_ids.to(torch.int64).contiguous()
    return Batch(target.to(torch.int64).contiguous(), candidate_ids, max_score)


def _rank_statistics(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None,
    candidate_ids: Tensor | None,
    temperature: Tensor | None,
    max_score: float | None,
    k: int,
    backend: str,
) -> Tensors:
    op = "rank_statistics"
    batch = _batch(op, query, candidates, target, candidate_ids, max_score)
    launch = launcher(op, backend, query.device, query.dtype)
    return launch(query, candidates, batch, k=k, temperature=temperature)


def _in_batch_ranking_reward(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None,
    candidate_ids: Tensor | None,
    max_score: float | None,
    head: int,
    weights: Sequence[float],
    backend: str,
) -> Tensors:
    op = "in_batch_ranking_reward"
    batch = _batch(op, query, candidates, target, candidate_ids, max_score)
    launch = launcher(op, backend, query.device, query.dtype)
    return launch(query, candidates, batch, head, Weights(*weights))


def _in_batch_ranking_reward_backward(
    query: Tensor,
    candidates: Tensor,
    index: Tensor,
    scores: Tensor,
    rank: Tensor,
    grad_reward: Tensor,
    head: int,
    weights: Sequence[float],
    backend: str,
) -> Tensors:
    op = "in_batch_ranking_reward_backward"
    launch = launcher(op, backend, query.device, query.dtype)
    return launch(query, candidates, index, scores, rank, grad_reward, head, Weights(*weights))


def _nce(op: str) -> Callable[..., Tensors]:
    """The kernel of `op`, one of the three that take what `info_nce` takes."""

    def kernel(
        query: Tensor,
        candidates: Tensor,
        target: Tensor | None,
        candidate_ids: Tensor | None,
        temperature: Tensor,
        max_score: float | None,
        symmetric: bool,
        workspace_mb: int,
        backend: str,
        *more: Any,
    ) -> Tensors:
        batch = _batch("info_nce", query, candidates, target, candidate_ids, max_score)
        launch = launcher(op, backend, query.device, query.dtype)
        options = {"symmetric": symmetric, "workspace_mb": workspace_mb}
        if op == "info_nce_saved":
            (options["mean"],) = more
            more = ()
        return launch(query, candidates, batch, temperature, *more, **options)

    return kernel


def _like_statistics(query: Tensor, candidates: Tensor, k: int, with_lse: bool) -> Tensors:
    """Empty statistics, for tracing."""
    b, m = query.shape[0], candidates.shape[0]
    dtype = compute_dtype(query.dtype)
    columns = min(k, m)
    return (
        *(query.new_empty(b, dtype=torch.int32) for _ in range(3)),
        *(query.new_empty(b, dtype=dtype) for _ in range(2)),
        query.new_empty(b, dtype=torch.int64),
        query.new_empty((b, columns), dtype=dtype),
        query.new_empty((b, columns), dtype=torch.int64),
        query.new_empty(b if with_lse else 0, dtype=dtype),
    )


def _trace_statistics(query: Tensor, candidates: Tensor, *rest: Any) -> Tensors:
    _target, _ids, temperature, _max_score, k, _backend = rest
    return _like_statistics(query, candidates, k, temperature is not None)


def _trace_reward(query: Tensor, candidates: Tensor, *rest: Any) -> Tensors:
    head = rest[3]
    b, dtype = query.shape[0], compute_dtype(query.dtype)
    columns = 1 + min(head, candidates.shape[0])
    return (
        *(query.new_empty(b, dtype=dtype) for _ in range(3)),
        query.new_empty(b, dtype=torch.int32),
        query.new_empty((b, columns), dtype=dtype),
        query.new_empty((b, columns), dtype=torch.int64),
    )


def _trace_reward_backward(query: Tensor, candidates: Tensor, *_: Any) -> Tensors:
    return query.new_empty(query.shape), candidates.new_empty(candidates.shape)


def _trace_nce(query: Tensor, candidates: Tensor, *_: Any) -> Tensors:
    loss = query.new_empty(query.shape[0], dtype=compute_dtype(query.dtype))
    return loss, *_like_statistics(query, candidates, 0, with_lse=True)


def _trace_nce_saved(query: Tensor, candidates: Tensor, *rest: Any) -> Tensors:
    dtype = compute_dtype(query.dtype)
    gradients = (x.new_empty(x.shape, dtype=dtype) for x in (query, candidates))
    return *_trace_nce(query, candidates), *gradients, rest[2].new_empty((), dtype=torch.float64)


def _trace_nce_backward(query: Tensor, candidates: Tensor, *rest: Any) -> Tensors:
    return tuple(x.new_empty(x.shape) for x in (query, candidates, rest[2]))


_PAIRS = "Tensor query, Tensor candidates, Tensor? target, Tensor? candidate_ids"
_WEIGHTS = "float[] weights, str backend"
_STATISTICS = (
    "Tensor rank, Tensor n_greater, Tensor n_equal, Tensor target_score, Tensor hardest_score, "
    "Tensor hardest_index, Tensor topk_scores, Tensor topk_index, Tensor logsumexp"
)
_NCE = (
    f"{_PAIRS}, Tensor temperature, float? max_score, bool symmetric, int workspace_mb, str backend"
)
_GRADIENTS = "Tensor grad_query, Tensor grad_candidates"

register(
    {
        # logsumexp is [0] without a temperature.
        "rank_statistics": Registered(
            f"({_PAIRS}, Tensor? temperature, float? max_score, int k, str backend) "
            f"-> ({_STATISTICS})",
            _rank_statistics,
            _trace_statistics,
        ),
        # index [B, 1 + h]: the candidates that `scores` are of.
        "in_batch_ranking_reward": Registered(
            f"({_PAIRS}, float? max_score, int head, {_WEIGHTS}) -> (Tensor reward, "
            "Tensor margin_reward, Tensor rank_reward, Tensor rank, Tensor scores, Tensor index)",
            _in_batch_ranking_reward,
            _trace_reward,
        ),
        "in_batch_ranking_reward_backward": Registered(
            "(Tensor query, Tensor candidates, Tensor index, Tensor scores, Tensor rank, "
            f"Tensor grad_reward, int head, {_WEIGHTS}) -> ({_GRADIENTS})",
            _in_batch_ranking_reward_backward,
            _trace_reward_backward,
        ),
        "info_nce": Registered(
            f"({_NCE}) -> (Tensor loss, {_STATISTICS})", _nce("info_nce"), _trace_nce
        ),
        # Also the gradients of the losses' mean or sum, in the dtype of the scores.
        "info_nce_saved": Registered(
            f"({_NCE}, bool mean) -> (Tensor loss, {_STATISTICS}, {_GRADIENTS}, "
            "Tensor grad_temperature)",
            _nce("info_nce_saved"),
            _trace_nce_saved,
        ),
        "info_nce_backward": Registered(
            f"({_NCE}, Tensor weight) -> ({_GRADIENTS}, Tensor grad_temperature)",
            _nce("info_nce_backward"),
            _trace_nce_backward,
        ),
    }
)

_OPS = torch.ops.elva_kernels
rank_statistics = _OPS.rank_statistics.default
in_batch_ranking_reward = _OPS.in_batch_ranking_reward.default
info_nce = _OPS.info_nce.default


@in_default_float_mode
def reduced(loss: Tensor, reduction: str) -> Tensor:
    """The losses [B] as `reduction` says."""
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


class _ScaledOnce(torch.autograd.Function):
    """Gradients times a scalar while a graph is being made of them; refuses to be its gradient."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, *tensors: Tensor) -> Tensors:
        return _scaled(scale, *tensors)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second_derivative("info_nce", "loss")


@in_default_float_mode
def _scaled(scale: Tensor, *tensors: Tensor) -> Tensors:
    """Of three inputs and their three gradients: the gradients scaled, in the inputs' dtypes."""
    inputs, gradients = tensors[:3], tensors[3:]
    return tuple(
        torch.mul(gradient, scale.to(gradient.dtype), out=torch.empty_like(gradient, dtype=x.dtype))
        for x, gradient in zip(inputs, gradients, strict=True)
    )


_scaled_once: Callable[..., Tensors] = _ScaledOnce.apply


class _InBatchRankingReward(torch.autograd.Function):
    """What the op takes -> its six results; gradient of the first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        results = in_batch_ranking_reward(*arguments)
        rank, scores, index = results[3:]
        ctx.save_for_backward(*arguments[:2], index, scores, rank)
        ctx.rest = arguments[5:]
        ctx.n_arguments = len(arguments)
        ctx.mark_non_differentiable(*results[1:])
        return cast(Tensors, results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = _OPS.in_batch_ranking_reward_backward.default
        gradients = gradient_op(op, *ctx.saved_tensors, grads[0], *ctx.rest)
        return *gradients, *(None for _ in range(ctx.n_arguments - 2))


class _InfoNCE(torch.autograd.Function):
    """(reduction, what the op takes) -> the reduced loss and the statistics; gradient of the loss.

    A loss that is reduced to a number has gradients known up to a factor, so they come with the
    forward, from the scores at hand. One loss a query needs the scores once more in the backward.
    """

    @staticmethod
    def forward(ctx: Any, reduction: str, *arguments: Any) -> Tensors:
        tensors, rest = arguments[:5], arguments[5:]
        ctx.reduction, ctx.rest = reduction, rest
        if reduction == "none":
            results = info_nce(*arguments)
            ctx.save_for_backward(*tensors)
        else:
            results = _OPS.info_nce_saved.default(*arguments, reduction == "mean")
            results, gradients = results[:-3], results[-3:]
            ctx.save_for_backward(*tensors[:2], tensors[4], *gradients)
        ctx.mark_non_differentiable(*results[1:])
        return reduced(results[0], reduction), *results[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        upstream = grads[0]
        if ctx.reduction == "none":
            gradients = gradient_op(
                _OPS.info_nce_backward.default, *ctx.saved_tensors, *ctx.rest, upstream
            )
        else:
            scale = _scaled_once if torch.is_grad_enabled() else _scaled
            gradients = scale(upstream, *ctx.saved_tensors)
        grad_query, grad_candidates, grad_temperature = gradients
        nothing = (None for _ in ctx.rest)
        return None, grad_query, grad_candidates, None, None, grad_temperature, *nothing


differentiable_in_batch_ranking_reward: Callable[..., Tensors] = _InBatchRankingReward.apply
differentiable_info_nce: Callable[..., Tensors] = _InfoNCE.apply
