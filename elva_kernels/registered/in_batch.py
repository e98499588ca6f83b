"""The in-batch ops as torch knows them.

Every op takes checked arguments with `target`, `excluded` and `candidate_ids` as they were passed.
`torch.vmap` calls an op for one member of its batch after the other and stacks the results: a
launch is of one set of candidates.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from elva_kernels.backends.boundary import empty_on_cpu, in_default_float_mode
from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Contrast, Gradients, Tensors
from elva_kernels.reference import Weights, compute_dtype
from elva_kernels.registered.batch import (
    batch_of,
    counted,
    like_target,
    per_positive,
    statistics_like,
)
from elva_kernels.registered.batched import looped
from elva_kernels.registered.library import (
    Registered,
    gradient_op,
    in_reverse,
    no_gradients,
    present,
    refuse_forward_mode,
    refuse_second_derivative,
    register,
    wanted,
)


def _rank_statistics(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None,
    excluded: Tensor | None,
    candidate_ids: Tensor | None,
    temperature: Tensor | None,
    max_score: float | None,
    k: int,
    backend: str,
) -> Tensors:
    op = "rank_statistics"
    batch = batch_of(op, query, len(candidates), target, excluded, candidate_ids, max_score)
    launch = launcher(op, backend, query.device, query.dtype)
    return statistics_like(launch(query, candidates, batch, k=k, temperature=temperature), target)


def _in_batch_ranking_reward(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None,
    excluded: Tensor | None,
    candidate_ids: Tensor | None,
    max_score: float | None,
    head: int,
    weights: Sequence[float],
    op: str,
    backend: str,
) -> Tensors:
    batch = batch_of(op, query, len(candidates), target, excluded, candidate_ids, max_score)
    launch = launcher("in_batch_ranking_reward", backend, query.device, query.dtype, op)
    *rewards, rank, scores, index = launch(query, candidates, batch, head, Weights(*weights))
    return *rewards, like_target(rank, target), scores, index


def _in_batch_ranking_reward_backward(
    query: Tensor,
    candidates: Tensor,
    index: Tensor,
    scores: Tensor,
    rank: Tensor,
    grad_reward: Tensor,
    head: int,
    weights: Sequence[float],
    wrt: Sequence[bool],
    backend: str,
    diagonal: bool = False,
) -> Tensors:
    op = "in_batch_ranking_reward_backward"
    launch = launcher(op, backend, query.device, query.dtype)
    head_of = (index, scores, per_positive(rank), grad_reward, head, Weights(*weights))
    return present(launch(query, candidates, *head_of, tuple(wrt), diagonal=diagonal), query)


def _info_nce(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None,
    excluded: Tensor | None,
    candidate_ids: Tensor | None,
    temperature: Tensor,
    max_score: float | None,
    symmetric: bool,
    workspace_mb: int,
    backend: str,
) -> Tensors:
    op = "info_nce"
    batch = batch_of(op, query, len(candidates), target, excluded, candidate_ids, max_score)
    launch = launcher(op, backend, query.device, query.dtype)
    contrast = Contrast(query, candidates, batch, temperature, symmetric, workspace_mb)
    loss, *statistics = launch(contrast)
    return loss, *statistics_like(statistics, target)


def _info_nce_and_grad(
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None,
    excluded: Tensor | None,
    candidate_ids: Tensor | None,
    temperature: Tensor,
    max_score: float | None,
    symmetric: bool,
    workspace_mb: int,
    backend: str,
    weight: Tensor | None,
    mean: bool,
    wrt: Sequence[bool],
    rounded: bool,
) -> Tensors:
    op = "info_nce_and_grad" if rounded else "info_nce"  # that was called: autograd scales later
    batch = batch_of(op, query, len(candidates), target, excluded, candidate_ids, max_score)
    if weight is None:
        one = target is None or target.dim() == 1
        each = 1 / max(1, len(query)) if mean and one else 1.0
        weight = torch.full((len(query),), each, dtype=torch.float64, device=query.device)
        if mean and not one:  # over those that have a positive
            weight /= counted(batch.target).clamp(min=1)
    launch = launcher("info_nce_and_grad", backend, query.device, query.dtype, op)
    contrast = Contrast(query, candidates, batch, temperature, symmetric, workspace_mb)
    results = launch(contrast, weight, tuple(wrt), rounded)
    return results[0], *statistics_like(results[1:-3], target), *present(results[-3:], query)


def _info_nce_backward(*arguments: Any) -> Tensors:
    *given, wrt = arguments
    every = (*given, False, wrt, True)  # no mean: they end in a weight; rounded
    return _info_nce_and_grad(*every)[-3:]


def _like_statistics(query: Tensor, candidates: Tensor, k: int, *rest: Any) -> Tensors:
    """Empty statistics, for tracing."""
    target, with_lse = rest
    b, m = query.shape[0], candidates.shape[0]
    each = (b,) if target is None else target.shape
    dtype = compute_dtype(query.dtype)
    columns = min(k, m)
    return (
        *(query.new_empty(each, dtype=torch.int32) for _ in range(3)),
        query.new_empty(each, dtype=dtype),
        query.new_empty(b, dtype=dtype),
        query.new_empty(b, dtype=torch.int64),
        query.new_empty((b, columns), dtype=dtype),
        query.new_empty((b, columns), dtype=torch.int64),
        query.new_empty(b if with_lse else 0, dtype=dtype),
    )


def _trace_statistics(
    query: Tensor, candidates: Tensor, target: Tensor | None, *rest: Any
) -> Tensors:
    _excluded, _ids, temperature, _max_score, k, _backend = rest
    return _like_statistics(query, candidates, k, target, temperature is not None)


def _trace_reward(query: Tensor, candidates: Tensor, target: Tensor | None, *rest: Any) -> Tensors:
    head = rest[3]
    b, dtype = query.shape[0], compute_dtype(query.dtype)
    each = (b,) if target is None else target.shape
    columns = (1 if len(each) == 1 else each[1]) + min(head, candidates.shape[0])
    return (
        *(query.new_empty(b, dtype=dtype) for _ in range(3)),
        query.new_empty(each, dtype=torch.int32),
        query.new_empty((b, columns), dtype=dtype),
        query.new_empty((b, columns), dtype=torch.int64),
    )


def _like_gradients(
    inputs: Sequence[Tensor], wrt: Sequence[bool], dtype: torch.dtype | None = None
) -> Tensors:
    return tuple(
        x.new_empty(x.shape, dtype=dtype) if is_wanted else x.new_empty(0)
        for x, is_wanted in zip(inputs, wrt, strict=True)
    )


def _trace_reward_backward(query: Tensor, candidates: Tensor, *rest: Any) -> Tensors:
    return _like_gradients((query, candidates), rest[6])


def _trace_nce(query: Tensor, candidates: Tensor, target: Tensor | None, *_: Any) -> Tensors:
    loss = query.new_empty(query.shape[0], dtype=compute_dtype(query.dtype))
    return loss, *_like_statistics(query, candidates, 0, target, True)


def _trace_nce_and_grad(
    query: Tensor, candidates: Tensor, target: Tensor | None, *rest: Any
) -> Tensors:
    dtype, wrt, rounded = compute_dtype(query.dtype), rest[-2], rest[-1]
    gradients = _like_gradients((query, candidates), wrt, query.dtype if rounded else dtype)
    grad_temperature = rest[2].new_empty((), dtype=rest[2].dtype if rounded else torch.float64)
    return *_trace_nce(query, candidates, target), *gradients, grad_temperature


def _trace_nce_backward(query: Tensor, candidates: Tensor, *rest: Any) -> Tensors:
    return *_like_gradients((query, candidates), rest[-1]), rest[3].new_empty(())


_PAIRS = "Tensor query, Tensor candidates, Tensor? target, Tensor? excluded, Tensor? candidate_ids"
_STATISTICS = (
    "Tensor rank, Tensor n_greater, Tensor n_equal, Tensor target_score, Tensor hardest_score, "
    "Tensor hardest_index, Tensor topk_scores, Tensor topk_index, Tensor logsumexp"
)
_NCE = (
    f"{_PAIRS}, Tensor temperature, float? max_score, bool symmetric, int workspace_mb, str backend"
)
_GRADIENTS = "Tensor grad_query, Tensor grad_candidates"

_OPS = register(
    {
        # logsumexp is [0] without a temperature; as a gradient is that is not in `wrt`.
        "rank_statistics": Registered(
            f"({_PAIRS}, Tensor? temperature, float? max_score, int k, str backend) "
            f"-> ({_STATISTICS})",
            _rank_statistics,
            _trace_statistics,
        ),
        # index [B, P + h]: the candidates that `scores` are of; op: the one that was called.
        "in_batch_ranking_reward": Registered(
            f"({_PAIRS}, float? max_score, int head, float[] weights, str op, str backend) -> "
            "(Tensor reward, Tensor margin_reward, Tensor rank_reward, Tensor rank, Tensor scores, "
            "Tensor index)",
            _in_batch_ranking_reward,
            _trace_reward,
        ),
        "in_batch_ranking_reward_backward": Registered(
            "(Tensor query, Tensor candidates, Tensor index, Tensor scores, Tensor rank, Tensor "
            "grad_reward, int head, float[] weights, bool[] wrt, str backend, "
            f"bool diagonal=False) -> ({_GRADIENTS})",
            _in_batch_ranking_reward_backward,
            _trace_reward_backward,
        ),
        "info_nce": Registered(f"({_NCE}) -> (Tensor loss, {_STATISTICS})", _info_nce, _trace_nce),
        # The gradients of sum(weight * loss), or of the losses' mean or sum; in the inputs' dtypes
        # where they are rounded, else in that of the scores.
        "info_nce_and_grad": Registered(
            f"({_NCE}, Tensor? weight, bool mean, bool[] wrt, bool rounded) -> "
            f"(Tensor loss, {_STATISTICS}, {_GRADIENTS}, Tensor grad_temperature)",
            _info_nce_and_grad,
            _trace_nce_and_grad,
        ),
        "info_nce_backward": Registered(
            f"({_NCE}, Tensor weight, bool[] wrt) -> ({_GRADIENTS}, Tensor grad_temperature)",
            _info_nce_backward,
            _trace_nce_backward,
        ),
    }
)

rank_statistics = _OPS.rank_statistics.default
in_batch_ranking_reward = _OPS.in_batch_ranking_reward.default
in_batch_ranking_reward_backward = _OPS.in_batch_ranking_reward_backward.default
info_nce = _OPS.info_nce.default
info_nce_and_grad = _OPS.info_nce_and_grad.default

_N_TENSORS = 6  # of what `info_nce` takes
_OF_TEMPERATURE = 2 + _N_TENSORS - 1  # where it is among the inputs of `_InfoNCE`


@in_default_float_mode
def reduced(loss: Tensor, reduction: str, target: Tensor | None) -> Tensor:
    """The losses [B] as `reduction` says."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if target is None or target.dim() == 1 else _mean(loss, target)


def _mean(loss: Tensor, target: Tensor) -> Tensor:
    """Over the queries that have a positive; the others' losses are 0."""
    return loss.sum() / counted(target)


class _ScaledOnce(torch.autograd.Function):
    """As `_scaled`, while a graph is being made of it; refuses to be its gradient.

    It is a function of the inputs too, though not of their values: else there would be no graph.
    """

    @staticmethod
    def forward(scale: Tensor, *tensors: Tensor) -> Tensors:
        return tuple(
            (gradient * scale.to(gradient.dtype)).to(x.dtype)
            for x, gradient in zip(tensors[:3], tensors[3:], strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return looped(_scaled_once, info, in_dims, *tensors)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second_derivative("info_nce", "loss")


_scaled_once = in_reverse(_ScaledOnce, _ScaledOnce.backward)


@in_default_float_mode
def _scaled(wrt: Sequence[bool], scale: Tensor, *tensors: Tensor) -> Gradients:
    """Of three inputs and their gradients: those in `wrt` times a scalar, rounded once."""
    return tuple(
        _product(gradient, scale.to(gradient.dtype), x.dtype) if is_wanted else None
        for x, gradient, is_wanted in zip(tensors[:3], tensors[3:], wrt, strict=True)
    )


def _product(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
    exact = torch.mul(gradient, scale, out=empty_on_cpu(gradient.shape, gradient.dtype))
    return exact if exact.dtype == dtype else empty_on_cpu(exact.shape, dtype).copy_(exact)


def _is_batched(x: Tensor) -> bool:
    """Whether a `vmap` runs, torch's own of batches of upstream gradients too."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch._C._are_functorch_transforms_active()
    functorch: Any = torch._C._functorch
    return cast(bool, functorch.is_legacy_batchedtensor(x))


class _InBatchRankingReward(torch.autograd.Function):
    """(wrt, what the op takes) -> its six results; gradient of the first."""

    @staticmethod
    def forward(wrt: Sequence[bool], *arguments: Any) -> Tensors:
        return cast(Tensors, in_batch_ranking_reward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.wrt, query, candidates, target, *_ = inputs
        ctx.diagonal = target is None
        rank, scores, index = output[3:]
        ctx.save_for_backward(query, candidates, index, scores, rank)
        *ctx.rest, _op, ctx.backend = inputs[7:]
        ctx.n_inputs = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return looped(differentiable_in_batch_ranking_reward, info, in_dims, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return no_gradients(ctx)
        more = (*ctx.rest, ctx.wrt, ctx.backend, ctx.diagonal)
        op = in_batch_ranking_reward_backward
        gradients = gradient_op(op, *ctx.saved_tensors, grads[0], *more)
        return None, *wanted(gradients, ctx.wrt), *(None for _ in range(ctx.n_inputs - 3))


class _InfoNCE(torch.autograd.Function):
    """(reduction, wrt, what the op takes) -> the reduced loss, the statistics; the loss's gradient.

    A loss that is reduced to a number has gradients known up to a factor, so they come with the
    forward, from the scores at hand. One loss a query needs the scores once more in the backward.
    """

    @staticmethod
    def forward(reduction: str, wrt: Sequence[bool], *arguments: Any) -> Tensors:
        if reduction == "none":
            return cast(Tensors, info_nce(*arguments))
        loss, *rest = info_nce_and_grad(*arguments, None, reduction == "mean", wrt, False)
        return reduced(loss, reduction, arguments[2]), *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reduction, ctx.wrt, *arguments = inputs
        tensors, ctx.rest = arguments[:_N_TENSORS], arguments[_N_TENSORS:]
        of_number = (*tensors[:2], tensors[5], *output[-3:])
        ctx.save_for_backward(*(tensors if ctx.reduction == "none" else of_number))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return looped(differentiable_info_nce, info, in_dims, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        upstream = grads[0]
        if upstream is None:
            return no_gradients(ctx)
        wrt = (*ctx.wrt, ctx.needs_input_grad[_OF_TEMPERATURE])
        if ctx.reduction == "none":
            op = _OPS.info_nce_backward.default
            gradients = gradient_op(op, *ctx.saved_tensors, *ctx.rest, upstream, ctx.wrt)
        else:
            # `_scaled` writes where it is told to, which a batch cannot.
            in_place = not (torch.is_grad_enabled() or _is_batched(upstream))
            scaled = functools.partial(_scaled, wrt) if in_place else _scaled_once
            gradients = scaled(upstream, *ctx.saved_tensors)
        grad_query, grad_candidates, grad_temperature = wanted(gradients, wrt)
        nothing = (None for _ in ctx.rest)
        of_tensors = (grad_query, grad_candidates, None, None, None, grad_temperature)
        return None, None, *of_tensors, *nothing


differentiable_in_batch_ranking_reward = in_reverse(
    _InBatchRankingReward,
    functools.partial(refuse_forward_mode, "in_batch_ranking_reward", "reward"),
)
differentiable_info_nce = in_reverse(
    _InfoNCE, functools.partial(refuse_forward_mode, "info_nce", "loss")
)
