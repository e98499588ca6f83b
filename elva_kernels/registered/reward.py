"""The grouped reward and its relatives as torch knows them.

Every tensor has been checked by `checks`. Here leading dimensions are expanded to their common
shape, as views, and gradients are summed back to the shape that the caller passed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Tensors, saved_shape
from elva_kernels.reference import Weights, compute_dtype
from elva_kernels.registered.library import Registered, gradient_op, register


def _forward(
    op: str,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    weights: Sequence[float],
    backend: str,
) -> Tensors:
    launch = launcher(op, backend, query.device, query.dtype)
    leading, shared = _leading(query, positive, negatives, mask)
    inputs: Any = (query, positive, negatives, _expand(mask, leading, 1))
    if shared:
        inputs = _expand_inputs(inputs, leading)
    return launch(*inputs, Weights(*weights))


_ranking_reward = functools.partial(_forward, "ranking_reward")
_ranking_reward_saved = functools.partial(_forward, "ranking_reward_saved")


def _ranking_reward_backward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    saved: Tensor,
    grad_reward: Tensor,
    weights: Sequence[float],
    backend: str,
) -> Tensors:
    launch = launcher("ranking_reward_backward", backend, query.device, query.dtype)
    leading, shared = _leading(query, positive, negatives, mask)
    inputs: Any = (query, positive, negatives, _expand(mask, leading, 1))
    if not shared:
        return launch(*inputs, saved, grad_reward, Weights(*weights))
    # A shared tensor's gradient is a sum over groups: of float32 terms, to be rounded once.
    exact = [x.to(compute_dtype(x.dtype)) for x in inputs[:3]]
    expanded = _expand_inputs((*exact, inputs[3]), leading)
    gradients = launch(*expanded, saved, grad_reward, Weights(*weights))
    return _reduce(gradients, (query, positive, negatives))


def _ranking_reward_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    upstream: Tensor | None,
    weights: Sequence[float],
    backend: str,
) -> Tensors:
    leading, shared = _leading(query, positive, negatives, mask)
    if upstream is not None:
        upstream = upstream.expand(leading)
    mask = _expand(mask, leading, 1)
    if not shared:
        launch = launcher("ranking_reward_and_grad", backend, query.device, query.dtype)
        return launch(query, positive, negatives, mask, upstream, Weights(*weights))
    # In two passes: the gradients' float32 terms must not change a bit of the half inputs' values.
    inputs = (query, positive, negatives, mask)
    *values, saved = _ranking_reward_saved(*inputs, weights, backend)
    if upstream is None:
        upstream = torch.ones_like(values[0])
    return *values, *_ranking_reward_backward(*inputs, saved, upstream, weights, backend)


def _reward_from_scores(
    scores: Tensor, mask: Tensor | None, weights: Sequence[float], backend: str
) -> Tensors:
    launch = launcher("reward_from_scores", backend, scores.device, scores.dtype)
    leading = _leading_of_scores(scores, mask)
    inputs = (_expand(scores, leading, 1), _expand(mask, leading, 1))
    return launch(*inputs, Weights(*weights))


def _reward_from_scores_backward(
    scores: Tensor,
    mask: Tensor | None,
    grad_reward: Tensor,
    weights: Sequence[float],
    backend: str,
) -> Tensor:
    launch = launcher("reward_from_scores_backward", backend, scores.device, scores.dtype)
    leading = _leading_of_scores(scores, mask)
    exact = scores if scores.shape[:-1] == leading else scores.to(compute_dtype(scores.dtype))
    inputs = (_expand(exact, leading, 1), _expand(mask, leading, 1))
    return _reduce(launch(*inputs, grad_reward, Weights(*weights)), (scores,))[0]


def _group_advantages(reward: Tensor, scale: str, std_eps: float, backend: str) -> Tensor:
    launch = launcher("group_advantages", backend, reward.device, reward.dtype)
    (advantages,) = launch(reward, scale=scale, std_eps=std_eps)
    return advantages


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


def _like_reward(like: Tensor, leading: torch.Size, n_candidates: int) -> Tensors:
    """Empty reward, margin_reward, rank_reward, rank and scores, for tracing."""
    dtype = compute_dtype(like.dtype)
    rewards = [like.new_empty(leading, dtype=dtype) for _ in range(3)]
    rank = like.new_empty(leading, dtype=torch.int32)
    return *rewards, rank, like.new_empty((*leading, n_candidates), dtype=dtype)


def _trace_ranking_reward(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None, *_: Any
) -> Tensors:
    leading = _leading(query, positive, negatives, mask)[0]
    return _like_reward(query, leading, negatives.shape[-2] + 1)


def _trace_ranking_reward_saved(*arguments: Any) -> Tensors:
    results = _trace_ranking_reward(*arguments)
    scores = results[-1]
    saved = scores.new_empty(saved_shape(scores.shape), dtype=torch.float64)
    return *results, saved


def _trace_gradients(query: Tensor, positive: Tensor, negatives: Tensor, *_: Any) -> Tensors:
    return tuple(x.new_empty(x.shape) for x in (query, positive, negatives))


def _trace_reward_and_grad(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None, *_: Any
) -> Tensors:
    values = _trace_ranking_reward(query, positive, negatives, mask)
    return *values, *_trace_gradients(query, positive, negatives)


def _trace_from_scores(scores: Tensor, mask: Tensor | None, *_: Any) -> Tensors:
    return _like_reward(scores, _leading_of_scores(scores, mask), scores.shape[-1])


def _trace_grad_scores(scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _trace_advantages(reward: Tensor, *_: Any) -> Tensor:
    return reward.new_empty(reward.shape, dtype=compute_dtype(reward.dtype))


_INPUTS = "Tensor query, Tensor positive, Tensor negatives, Tensor? mask"
_WEIGHTS = "float[] weights, str backend"
_VALUES = "Tensor reward, Tensor margin_reward, Tensor rank_reward, Tensor rank, Tensor scores"
_GRADIENTS = "Tensor grad_query, Tensor grad_positive, Tensor grad_negatives"

register(
    {
        "ranking_reward": Registered(
            f"({_INPUTS}, {_WEIGHTS}) -> ({_VALUES})",
            _ranking_reward,
            _trace_ranking_reward,
        ),
        # `saved` float64 is the backend's own, for its backward.
        "ranking_reward_saved": Registered(
            f"({_INPUTS}, {_WEIGHTS}) -> ({_VALUES}, Tensor saved)",
            _ranking_reward_saved,
            _trace_ranking_reward_saved,
        ),
        "ranking_reward_backward": Registered(
            f"({_INPUTS}, Tensor saved, Tensor grad_reward, {_WEIGHTS}) -> ({_GRADIENTS})",
            _ranking_reward_backward,
            _trace_gradients,
        ),
        "ranking_reward_and_grad": Registered(
            f"({_INPUTS}, Tensor? upstream, {_WEIGHTS}) -> ({_VALUES}, {_GRADIENTS})",
            _ranking_reward_and_grad,
            _trace_reward_and_grad,
        ),
        "reward_from_scores": Registered(
            f"(Tensor scores, Tensor? mask, {_WEIGHTS}) -> ({_VALUES})",
            _reward_from_scores,
            _trace_from_scores,
        ),
        "reward_from_scores_backward": Registered(
            f"(Tensor scores, Tensor? mask, Tensor grad_reward, {_WEIGHTS}) -> Tensor grad_scores",
            _reward_from_scores_backward,
            _trace_grad_scores,
        ),
        "group_advantages": Registered(
            "(Tensor reward, str scale, float std_eps, str backend) -> Tensor advantages",
            _group_advantages,
            _trace_advantages,
        ),
    }
)

_OPS = torch.ops.elva_kernels
ranking_reward = _OPS.ranking_reward.default
ranking_reward_and_grad = _OPS.ranking_reward_and_grad.default
reward_from_scores = _OPS.reward_from_scores.default
group_advantages = _OPS.group_advantages.default


class _RankingReward(torch.autograd.Function):
    """(query, positive, negatives, mask, weights, backend) -> results; gradient of the first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        *results, saved = _OPS.ranking_reward_saved.default(*arguments)
        ctx.save_for_backward(*arguments[:4], saved)
        ctx.rest = arguments[4:]
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = ctx.saved_tensors
        op = _OPS.ranking_reward_backward.default
        gradients = gradient_op(op, *inputs, grads[0], *ctx.rest)
        return *gradients, None, None, None


class _RewardFromScores(torch.autograd.Function):
    """(scores, mask, weights, backend) -> the five results; gradient of the first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        results = reward_from_scores(*arguments)
        ctx.save_for_backward(*arguments[:2])
        ctx.rest = arguments[2:]
        ctx.mark_non_differentiable(*results[1:])
        return cast(Tensors, results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = _OPS.reward_from_scores_backward.default
        grad_scores = gradient_op(op, *ctx.saved_tensors, grads[0], *ctx.rest)
        return grad_scores, None, None, None


differentiable_ranking_reward: Callable[..., Tensors] = _RankingReward.apply
differentiable_reward_from_scores: Callable[..., Tensors] = _RewardFromScores.apply
