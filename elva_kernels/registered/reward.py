"""The grouped reward and its relatives as torch knows them.

Every tensor has been checked by `checks`. Here the inputs become a launcher's (`groups`), and
gradients are summed back to the shape that the caller passed.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Gradients, Groups, Launcher, Tensors, saved_shape
from elva_kernels.reference import Weights, compute_dtype
from elva_kernels.registered import batched
from elva_kernels.registered.groups import (
    check_relevance,
    common_leading,
    exact,
    expanded,
    graded,
    groups_of,
    in_range,
    leading_of,
    merged,
    summed_of,
)
from elva_kernels.registered.library import (
    Registered,
    gradient_op,
    in_reverse,
    no_gradients,
    refuse_forward_mode,
    register,
)


def _launcher(op: str, backend: str, like: Tensor) -> Launcher:
    return launcher(op, backend, like.device, like.dtype)


def _checked(op: str, groups: Groups) -> Groups:
    """What the values of index and relevance must hold; index and mask as one."""
    groups = merged(op, groups)
    index = groups.negative_index
    check_relevance(op, groups.relevance, groups.mask if index is None else index != -1)
    return groups


def _ranking_reward(*arguments: Any) -> Tensors:
    *inputs, weights, backend = arguments
    groups = Groups(*inputs)
    launch = _launcher("ranking_reward", backend, groups.query)
    groups = _checked("ranking_reward", groups)
    leading = leading_of(groups)
    if groups.negative_index is None:
        groups = groups._replace(negatives=expanded(groups.negatives, leading, 2))
    return launch(groups_of(leading, groups), Weights(*weights))


def _ranking_reward_saved(*arguments: Any) -> Tensors:
    *inputs, weights, backend = arguments
    groups = Groups(*inputs)
    launch = _launcher("ranking_reward_saved", backend, groups.query)
    groups = _checked("ranking_reward", groups)
    leading = leading_of(groups)
    query, positive = (in_range(x, leading).rows for x in groups[:2])
    groups = groups._replace(query=query, positive=positive)
    return launch(groups_of(leading, groups), Weights(*weights))


def _ranking_reward_backward(*arguments: Any) -> Tensors:
    *inputs, saved, grad_reward, weights, wrt, backend = arguments
    given = Groups(*inputs)
    query, positive = given[:2]
    launch = _launcher("ranking_reward_backward", backend, query)
    groups = merged("ranking_reward", given)
    leading = leading_of(groups)
    shared = [in_range(x, leading) for x in (query, positive)]
    groups = groups._replace(query=shared[0].rows, positive=shared[1].rows)
    groups = groups_of(leading, groups)
    rest = (saved.contiguous(), grad_reward, Weights(*weights))
    summed = summed_of(leading, query, positive, wrt)
    # Of half rows a sum over groups takes float32 terms, to be rounded once.
    halves = any(summed) and compute_dtype(query.dtype) != query.dtype
    at_once = tuple(x and not (halves and s) for x, s in zip(wrt, summed, strict=True))
    found: list[Any] = [None, None, None]
    if any(at_once):
        found[:] = launch(groups, *rest, at_once)
    if halves:
        terms = launch(exact(groups), *rest, summed)
        found = [y if s else x for x, y, s in zip(found, terms, summed, strict=True)]
    for i, (x, rows) in enumerate(zip((query, positive), shared, strict=True)):
        if summed[i]:
            found[i] = rows.summed(found[i], x)
    return _filled(tuple(found), given[:3])


def _ranking_reward_and_grad(*arguments: Any) -> Tensors:
    *inputs, upstream, weights, wrt, backend = arguments
    given = Groups(*inputs)
    groups = _checked("ranking_reward_and_grad", given)
    query, positive = given[:2]
    leading = leading_of(groups)
    if upstream is not None:
        upstream = upstream.expand(leading)
    if not any(summed_of(leading, query, positive, wrt)):
        launch = _launcher("ranking_reward_and_grad", backend, query)
        results = launch(groups_of(leading, groups), upstream, Weights(*weights), tuple(wrt))
        return *results[:5], *_filled(results[5:], given[:3])
    # In two passes: the gradients' float32 terms must not change a bit of the half inputs' values.
    *values, saved = _ranking_reward_saved(*groups, weights, backend)
    if upstream is None:
        upstream = torch.ones_like(values[0])
    gradients = _ranking_reward_backward(*groups, saved, upstream, weights, wrt, backend)
    return *values, *gradients[:2], gradients[2].view(given.negatives.shape if wrt[2] else 0)


def _filled(gradients: Gradients, inputs: Tensors) -> Tensors:
    """Gradients in the shapes of the inputs; [0] for one that is not wanted, as ops return it."""
    found = list(gradients)
    for i, (gradient, x) in enumerate(zip(gradients, inputs, strict=True)):
        if gradient is None:
            found[i] = x.new_empty(0)
        elif gradient.shape != x.shape:
            found[i] = gradient.view(x.shape)
    return tuple(found)


def _reward_from_scores(
    scores: Tensor,
    mask: Tensor | None,
    relevance: Tensor | None,
    weights: Sequence[float],
    backend: str,
) -> Tensors:
    launch = _launcher("reward_from_scores", backend, scores)
    check_relevance("reward_from_scores", relevance, mask)
    leading = common_leading(scores.shape[:-1], mask, relevance)
    inputs = (expanded(scores, leading, 1), expanded(mask, leading, 1), graded(relevance, leading))
    return launch(*inputs, Weights(*weights))


def _reward_from_scores_backward(
    scores: Tensor,
    mask: Tensor | None,
    relevance: Tensor | None,
    grad_reward: Tensor,
    weights: Sequence[float],
    backend: str,
) -> Tensor:
    launch = _launcher("reward_from_scores_backward", backend, scores)
    leading = common_leading(scores.shape[:-1], mask, relevance)
    exact = scores if scores.shape[:-1] == leading else scores.to(compute_dtype(scores.dtype))
    inputs = (expanded(exact, leading, 1), expanded(mask, leading, 1), graded(relevance, leading))
    gradient: Tensor
    (gradient,) = launch(*inputs, grad_reward, Weights(*weights))
    return gradient.sum_to_size(scores.shape).to(scores.dtype)


def _group_advantages(reward: Tensor, scale: str, std_eps: float, backend: str) -> Tensor:
    launch = _launcher("group_advantages", backend, reward)
    advantages: Tensor
    (advantages,) = launch(reward, scale=scale, std_eps=std_eps)
    return advantages


def _like_reward(like: Tensor, leading: torch.Size, n_candidates: int) -> Tensors:
    """Empty reward, margin_reward, rank_reward, rank and scores, for tracing."""
    dtype = compute_dtype(like.dtype)
    rewards = [like.new_empty(leading, dtype=dtype) for _ in range(3)]
    rank = like.new_empty(leading, dtype=torch.int32)
    return *rewards, rank, like.new_empty((*leading, n_candidates), dtype=dtype)


def _trace_ranking_reward(*arguments: Any) -> Tensors:
    groups = Groups(*arguments[:6])
    return _like_reward(groups.query, leading_of(groups), groups.n + 1)


def _trace_ranking_reward_saved(*arguments: Any) -> Tensors:
    results = _trace_ranking_reward(*arguments)
    scores = results[-1]
    saved = scores.new_empty(saved_shape(scores.shape), dtype=torch.float64)
    return *results, saved


def _trace_gradients(query: Tensor, positive: Tensor, negatives: Tensor, *rest: Any) -> Tensors:
    *_, wrt, _backend = rest
    inputs = (query, positive, negatives)
    return tuple(
        x.new_empty(x.shape if wanted else 0) for x, wanted in zip(inputs, wrt, strict=True)
    )


def _trace_reward_and_grad(*arguments: Any) -> Tensors:
    return *_trace_ranking_reward(*arguments), *_trace_gradients(*arguments)


def _trace_from_scores(
    scores: Tensor, mask: Tensor | None, relevance: Tensor | None, *_: Any
) -> Tensors:
    return _like_reward(
        scores, common_leading(scores.shape[:-1], mask, relevance), scores.shape[-1]
    )


def _trace_grad_scores(scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _trace_advantages(reward: Tensor, *_: Any) -> Tensor:
    return reward.new_empty(reward.shape, dtype=compute_dtype(reward.dtype))


_INPUTS = (
    "Tensor query, Tensor positive, Tensor negatives, Tensor? mask, Tensor? negative_index, "
    "Tensor? relevance"
)
_SCORES = "Tensor scores, Tensor? mask, Tensor? relevance"
_WEIGHTS = "float[] weights, str backend"
_VALUES = "Tensor reward, Tensor margin_reward, Tensor rank_reward, Tensor rank, Tensor scores"
_WRT = "float[] weights, bool[] wrt, str backend"
_GRADIENTS = "Tensor grad_query, Tensor grad_positive, Tensor grad_negatives"

_OPS = register(
    {
        "ranking_reward": Registered(
            f"({_INPUTS}, {_WEIGHTS}) -> ({_VALUES})",
            _ranking_reward,
            _trace_ranking_reward,
            batched.groups,
        ),
        # `saved` float64 is the backend's own, for its backward.
        "ranking_reward_saved": Registered(
            f"({_INPUTS}, {_WEIGHTS}) -> ({_VALUES}, Tensor saved)",
            _ranking_reward_saved,
            _trace_ranking_reward_saved,
            batched.groups,
        ),
        "ranking_reward_backward": Registered(
            f"({_INPUTS}, Tensor saved, Tensor grad_reward, {_WRT}) -> ({_GRADIENTS})",
            _ranking_reward_backward,
            _trace_gradients,
            functools.partial(batched.gradients_of_groups, (1, 0)),
        ),
        "ranking_reward_and_grad": Registered(
            f"({_INPUTS}, Tensor? upstream, {_WRT}) -> ({_VALUES}, {_GRADIENTS})",
            _ranking_reward_and_grad,
            _trace_reward_and_grad,
            functools.partial(batched.gradients_of_groups, (0,)),
        ),
        "reward_from_scores": Registered(
            f"({_SCORES}, {_WEIGHTS}) -> ({_VALUES})",
            _reward_from_scores,
            _trace_from_scores,
            batched.scores,
        ),
        "reward_from_scores_backward": Registered(
            f"({_SCORES}, Tensor grad_reward, {_WEIGHTS}) -> Tensor grad_scores",
            _reward_from_scores_backward,
            _trace_grad_scores,
            batched.gradient_of_scores,
        ),
        "group_advantages": Registered(
            "(Tensor reward, str scale, float std_eps, str backend) -> Tensor advantages",
            _group_advantages,
            _trace_advantages,
            batched.advantages,
        ),
    }
)

ranking_reward = _OPS.ranking_reward.default
ranking_reward_and_grad = _OPS.ranking_reward_and_grad.default
reward_from_scores = _OPS.reward_from_scores.default
group_advantages = _OPS.group_advantages.default


class _RankingReward(torch.autograd.Function):
    """(query, positive, negatives, mask, negative_index, relevance, weights, wrt, backend) -> the
    five results and what is saved; the gradients in `wrt` of the first."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        *inputs, _wrt, backend = arguments
        return cast(Tensors, _OPS.ranking_reward_saved.default(*inputs, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, weights, wrt, backend = inputs
        ctx.save_for_backward(*tensors, output[-1])
        ctx.rest = (weights, wrt, backend)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return batched.groups(differentiable_ranking_reward, info, in_dims, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return no_gradients(ctx)
        op = _OPS.ranking_reward_backward.default
        gradients = gradient_op(op, *ctx.saved_tensors, grads[0], *ctx.rest)
        _, wrt, _ = ctx.rest
        wanted = (x if kept else None for x, kept in zip(gradients, wrt, strict=True))
        return *wanted, None, None, None, None, None, None


class _RewardFromScores(torch.autograd.Function):
    """(scores, mask, relevance, weights, backend) -> the five results; gradient of the first."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        return cast(Tensors, reward_from_scores(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.rest = inputs[3:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return batched.scores(differentiable_reward_from_scores, info, in_dims, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return no_gradients(ctx)
        op = _OPS.reward_from_scores_backward.default
        grad_scores = gradient_op(op, *ctx.saved_tensors, grads[0], *ctx.rest)
        return grad_scores, None, None, None, None


differentiable_ranking_reward = in_reverse(
    _RankingReward, functools.partial(refuse_forward_mode, "ranking_reward", "reward")
)
differentiable_reward_from_scores = in_reverse(
    _RewardFromScores, functools.partial(refuse_forward_mode, "reward_from_scores", "reward")
)
