"""The ops as torch knows them: schemas, kernels, shapes for tracing, gradients.

Every tensor has been checked by `ops`. Here leading dimensions are expanded to their common shape,
as views, and gradients are summed back to the shape that the caller passed. Registered by
`Library.define`, which costs a few microseconds a call (`custom_op` costs several times that), and
opaque to `torch.compile`, so a compiled program runs the same kernels and gets the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from elva_kernels import dispatch
from elva_kernels.reference import compute_dtype

Tensors = tuple[Tensor, ...]
Kernels = tuple[Callable[..., Any], Callable[..., Any]]  # what computes an op, what traces it

_WEIGHTS = (
    "float margin, float rank_penalty, float w_margin, float w_rank, float rank_temperature, "
    "str backend"
)
_SCHEMAS = {
    "ranking_reward": "(Tensor query, Tensor positive, Tensor negatives, Tensor? mask, "
    f"{_WEIGHTS}) -> (Tensor reward, Tensor margin_reward, Tensor rank_reward, Tensor rank, "
    "Tensor scores)",
    # `saved` [*, 2 N + 3] float64 is the backend's own, for its backward.
    "ranking_reward_saved": "(Tensor query, Tensor positive, Tensor negatives, Tensor? mask, "
    f"{_WEIGHTS}) -> (Tensor reward, Tensor margin_reward, Tensor rank_reward, Tensor rank, "
    "Tensor scores, Tensor saved)",
    "ranking_reward_backward": "(Tensor query, Tensor positive, Tensor negatives, Tensor? mask, "
    f"Tensor saved, Tensor grad_reward, {_WEIGHTS}) "
    "-> (Tensor grad_query, Tensor grad_positive, Tensor grad_negatives)",
    "ranking_reward_and_grad": "(Tensor query, Tensor positive, Tensor negatives, Tensor? mask, "
    f"Tensor? weight, {_WEIGHTS}) -> (Tensor reward, Tensor margin_reward, Tensor rank_reward, "
    "Tensor rank, Tensor scores, Tensor grad_query, Tensor grad_positive, Tensor grad_negatives)",
    "reward_from_scores": f"(Tensor scores, Tensor? mask, {_WEIGHTS}) -> (Tensor reward, "
    "Tensor margin_reward, Tensor rank_reward, Tensor rank, Tensor live_scores)",
    "reward_from_scores_backward": "(Tensor scores, Tensor? mask, Tensor grad_reward, "
    f"{_WEIGHTS}) -> Tensor grad_scores",
    "group_advantages": "(Tensor reward, str scale, float std_eps, str backend) -> "
    "Tensor advantages",
    "topk": "(Tensor query, Tensor corpus, SymInt k, str metric, str backend) "
    "-> (Tensor scores, Tensor index)",
}


def _launcher(op: str, like: Tensor, weights: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """The launcher for a call, and its weights by name."""
    margin, rank_penalty, w_margin, w_rank, rank_temperature, backend = weights
    named = {
        "margin": margin,
        "rank_penalty": rank_penalty,
        "w_margin": w_margin,
        "w_rank": w_rank,
        "rank_temperature": rank_temperature,
    }
    return dispatch.launcher(op, backend, like.device, like.dtype), named


def _ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    *weights: Any,
    op: str = "ranking_reward",
) -> Tensors:
    launch, named = _launcher(op, query, weights)
    leading, shared = _leading(query, positive, negatives, mask)
    inputs: Any = (query, positive, negatives, _expand(mask, leading, 1))
    if shared:
        inputs = _expand_inputs(inputs, leading)
    return cast(Tensors, launch(*inputs, **named))


_ranking_reward_saved = functools.partial(_ranking_reward, op="ranking_reward_saved")


def _ranking_reward_backward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    grad_reward: Tensor,
    *weights: Any,
) -> Tensors:
    launch, named = _launcher("ranking_reward_backward", query, weights)
    leading, shared = _leading(query, positive, negatives, mask)
    inputs: Any = (query, positive, negatives, _expand(mask, leading, 1))
    if not shared:
        return cast(Tensors, launch(*inputs, saved, grad_reward, **named))
    # A shared tensor's gradient is a sum over groups: of float32 terms, to be rounded once.
    exact = [x.to(compute_dtype(x.dtype)) for x in inputs[:3]]
    expanded = _expand_inputs((*exact, inputs[3]), leading)
    return _reduce(launch(*expanded, saved, grad_reward, **named), (query, positive, negatives))


def _ranking_reward_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    *weights: Any,
) -> Tensors:
    leading, shared = _leading(query, positive, negatives, mask)
    if weight is not None:
        weight = weight.expand(leading)
    inputs: Any = (query, positive, negatives, _expand(mask, leading, 1))
    if not shared:
        launch, named = _launcher("ranking_reward_and_grad", query, weights)
        return cast(Tensors, launch(*inputs, weight, **named))
    # In two passes: the gradients' float32 terms must not change a bit of the half inputs' values.
    *values, saved = _ranking_reward_saved(*inputs, *weights)
    upstream = torch.ones_like(values[0]) if weight is None else weight
    return *values, *_ranking_reward_backward(*inputs, saved, upstream, *weights)


def _reward_from_scores(scores: Tensor, mask: Tensor | None, *weights: Any) -> Tensors:
    launch, named = _launcher("reward_from_scores", scores, weights)
    leading = _leading_of_scores(scores, mask)
    return cast(Tensors, launch(_expand(scores, leading, 1), _expand(mask, leading, 1), **named))


def _reward_from_scores_backward(
    scores: Tensor, mask: Tensor | None, grad_reward: Tensor, *weights: Any
) -> Tensor:
    launch, named = _launcher("reward_from_scores_backward", scores, weights)
    leading = _leading_of_scores(scores, mask)
    exact = scores if scores.shape[:-1] == leading else scores.to(compute_dtype(scores.dtype))
    inputs = (_expand(exact, leading, 1), _expand(mask, leading, 1))
    return _reduce(launch(*inputs, grad_reward, **named), (scores,))[0]


def _group_advantages(reward: Tensor, scale: str, std_eps: float, backend: str) -> Tensor:
    launch = dispatch.launcher("group_advantages", backend, reward.device, reward.dtype)
    (advantages,) = launch(reward, scale=scale, std_eps=std_eps)
    return advantages


def _topk(query: Tensor, corpus: Tensor, k: int, metric: str, backend: str) -> Tensors:
    launch = dispatch.launcher("topk", backend, query.device, query.dtype)
    return launch(query, corpus, k, metric=metric)


def _leading(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None
) -> tuple[torch.Size, bool]:
    """The common leading shape `*`, and whether groups share an embedding, which then lacks it."""
    leading = query.shape[:-1]
    if (
        positive.shape[:-1] == leading
        and negatives.shape[:-2] == leading
        and (mask is None or mask.shape[:-1] == leading)
    ):
        return leading, False
    masks = () if mask is None else (mask.shape[:-1],)
    shapes = (leading, positive.shape[:-1], negatives.shape[:-2])
    common = torch.Size(torch.broadcast_shapes(*shapes, *masks))
    return common, any(shape != common for shape in shapes)


def _leading_of_scores(scores: Tensor, mask: Tensor | None) -> torch.Size:
    leading = scores.shape[:-1]
    if mask is None or mask.shape[:-1] == leading:
        return leading
    return torch.Size(torch.broadcast_shapes(leading, mask.shape[:-1]))


def _expand(tensor: Any, leading: torch.Size, kept: int) -> Any:
    """`tensor` (or None) as a view whose dimensions before the last `kept` are `leading`."""
    if tensor is None or tensor.shape[: tensor.dim() - kept] == leading:
        return tensor
    return tensor.expand(*leading, *tensor.shape[tensor.dim() - kept :])


def _expand_inputs(inputs: tuple[Any, ...], leading: torch.Size) -> tuple[Any, ...]:
    """(query, positive, negatives, mask) over one leading shape."""
    return tuple(_expand(x, leading, kept) for x, kept in zip(inputs, (1, 1, 2, 1), strict=True))


def _reduce(gradients: Tensors, inputs: Tensors) -> Tensors:
    """Each gradient summed over the groups that share its input, in the input's dtype."""
    return tuple(
        gradient.sum_to_size(x.shape).to(x.dtype)
        for gradient, x in zip(gradients, inputs, strict=True)
    )


def _like_reward(scores_dtype: Tensor, leading: torch.Size, n_candidates: int) -> Tensors:
    """Empty reward, margin_reward, rank_reward, rank and scores, for tracing."""
    dtype = compute_dtype(scores_dtype.dtype)
    rewards = [scores_dtype.new_empty(leading, dtype=dtype) for _ in range(3)]
    rank = scores_dtype.new_empty(leading, dtype=torch.int32)
    return *rewards, rank, scores_dtype.new_empty((*leading, n_candidates), dtype=dtype)


def _fake_ranking_reward(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None, *_: Any
) -> Tensors:
    leading = _leading(query, positive, negatives, mask)[0]
    return _like_reward(query, leading, negatives.shape[-2] + 1)


def _fake_ranking_reward_saved(*arguments: Any) -> Tensors:
    results = _fake_ranking_reward(*arguments)
    *leading, n_candidates = results[-1].shape
    saved = results[-1].new_empty((*leading, 2 * n_candidates + 1), dtype=torch.float64)
    return *results, saved


def _fake_gradients(query: Tensor, positive: Tensor, negatives: Tensor, *_: Any) -> Tensors:
    return tuple(x.new_empty(x.shape) for x in (query, positive, negatives))


def _fake_reward_and_grad(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None, *_: Any
) -> Tensors:
    values = _fake_ranking_reward(query, positive, negatives, mask)
    return *values, *_fake_gradients(query, positive, negatives)


def _fake_from_scores(scores: Tensor, mask: Tensor | None, *_: Any) -> Tensors:
    return _like_reward(scores, _leading_of_scores(scores, mask), scores.shape[-1])


def _fake_grad_scores(scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _fake_advantages(reward: Tensor, *_: Any) -> Tensor:
    return reward.new_empty(reward.shape, dtype=compute_dtype(reward.dtype))


def _fake_topk(query: Tensor, corpus: Tensor, k: int, *_: Any) -> Tensors:
    shape = (query.shape[0], torch.sym_min(k, corpus.shape[0]))
    scores = query.new_empty(shape, dtype=compute_dtype(query.dtype))
    return scores, query.new_empty(shape, dtype=torch.int64)


_KERNELS: dict[str, Kernels] = {
    "ranking_reward": (_ranking_reward, _fake_ranking_reward),
    "ranking_reward_saved": (_ranking_reward_saved, _fake_ranking_reward_saved),
    "ranking_reward_backward": (_ranking_reward_backward, _fake_gradients),
    "ranking_reward_and_grad": (_ranking_reward_and_grad, _fake_reward_and_grad),
    "reward_from_scores": (_reward_from_scores, _fake_from_scores),
    "reward_from_scores_backward": (_reward_from_scores_backward, _fake_grad_scores),
    "group_advantages": (_group_advantages, _fake_advantages),
    "topk": (_topk, _fake_topk),
}


def register(
    library: torch.library.Library, schemas: dict[str, str], kernels: dict[str, Kernels]
) -> None:
    """Define every op of `schemas` with what computes it and what traces it."""
    for name, (kernel, fake) in kernels.items():
        library.define(name + schemas[name])
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"elva_kernels::{name}", fake, lib=library)


_LIBRARY = torch.library.Library("elva_kernels", "DEF")
register(_LIBRARY, _SCHEMAS, _KERNELS)

_OPS = torch.ops.elva_kernels
ranking_reward = _OPS.ranking_reward.default
ranking_reward_and_grad = _OPS.ranking_reward_and_grad.default
reward_from_scores = _OPS.reward_from_scores.default
group_advantages = _OPS.group_advantages.default
topk = _OPS.topk.default


class _DifferentiatedOnce(torch.autograd.Function):
    """Runs a backward op while a graph is being made of it, and refuses to be its gradient."""

    @staticmethod
    def forward(ctx: Any, op: Any, *arguments: Any) -> Any:
        ctx.name = op.name().split("::")[1].removesuffix("_backward")
        return op(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second_derivative(ctx.name, "loss" if ctx.name == "info_nce" else "reward")


def refuse_second_derivative(op: str, result: str) -> NoReturn:
    """What every backward's backward does."""
    raise RuntimeError(
        f"{op}: the {result} must be differentiated once, got a second derivative; its backward "
        "is a closed form without a gradient of its own"
    )


_differentiated_once: Callable[..., Any] = _DifferentiatedOnce.apply


def is_watched(*tensors: Tensor) -> bool:
    """Whether autograd follows `tensors`; forward mode too, which the functions below refuse."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in tensors:  # a generator would double the time
            if x.requires_grad:
                return True
    return False


def gradient_op(op: Any, *arguments: Any) -> Any:
    """The backward op `op` of these arguments, as a backward has to call it."""
    if torch.is_grad_enabled():
        return _differentiated_once(op, *arguments)
    return op(*arguments)


class _RankingReward(torch.autograd.Function):
    """(query, positive, negatives, mask, *weights) -> the five results; gradient of the first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        *results, saved = _OPS.ranking_reward_saved.default(*arguments)
        ctx.save_for_backward(*arguments[:4], saved)
        ctx.weights = arguments[4:]
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = ctx.saved_tensors
        op = _OPS.ranking_reward_backward.default
        gradients = gradient_op(op, *inputs, grads[0], *ctx.weights)
        return *gradients, None, *(None for _ in ctx.weights)


class _RewardFromScores(torch.autograd.Function):
    """(scores, mask, *weights) -> the five results; gradient of the first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        results = reward_from_scores(*arguments)
        ctx.save_for_backward(*arguments[:2])
        ctx.weights = arguments[2:]
        ctx.mark_non_differentiable(*results[1:])
        return cast(Tensors, results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = _OPS.reward_from_scores_backward.default
        grad_scores = gradient_op(op, *ctx.saved_tensors, grads[0], *ctx.weights)
        return grad_scores, None, *(None for _ in ctx.weights)


differentiable_ranking_reward: Callable[..., Tensors] = _RankingReward.apply
differentiable_reward_from_scores: Callable[..., Tensors] = _RewardFromScores.apply
