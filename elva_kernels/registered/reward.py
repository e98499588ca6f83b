"""The grouped reward and its relatives as torch knows them.

Every tensor has been checked by `checks`. Here leading dimensions are expanded to their common
shape, as views; negatives that groups share become a bank, whose rows an index names; and gradients
are summed back to the shape that the caller passed.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Gradients, Tensors, saved_shape
from elva_kernels.reference import Wanted, Weights, compute_dtype, scaled, times_power
from elva_kernels.registered import batched
from elva_kernels.registered.library import (
    Registered,
    gradient_op,
    in_reverse,
    refuse_forward_mode,
    register,
)

_POSITIONS_NAMED = 8


# Query, positive, negatives, mask and index as a launcher takes them, on one leading shape.
_Groups = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class _Shared(NamedTuple):
    """An input of which groups share rows: in range, since sums of their gradients are to be."""

    rows: Tensor  # times 2^-exponent
    exponent: Tensor | None  # None for 0

    def summed(self, gradient: Tensor, like: Tensor) -> Tensor:
        """A gradient on each group's `rows` as that on `like`, what the caller passed."""
        total = gradient.sum_to_size(like.shape)
        if self.exponent is not None:
            total = times_power(total, -self.exponent)
        return total.to(like.dtype)


def _ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Sequence[float],
    backend: str,
) -> Tensors:
    launch = launcher("ranking_reward", backend, query.device, query.dtype)
    negatives, mask, index = _merged("ranking_reward", negatives, mask, index)
    leading = _leading(query, positive, negatives, mask, index)
    if index is None:
        negatives = _expand(negatives, leading, 2)
    groups = _groups(leading, query, positive, negatives, mask, index)
    values: Tensors = launch(*groups, Weights(*weights))
    return values


def _ranking_reward_saved(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    weights: Sequence[float],
    backend: str,
) -> Tensors:
    launch = launcher("ranking_reward_saved", backend, query.device, query.dtype)
    negatives, mask, index = _merged("ranking_reward", negatives, mask, index)
    leading = _leading(query, positive, negatives, mask, index)
    rows = [_in_range(x, leading).rows for x in (query, positive)]
    groups = _groups(leading, rows[0], rows[1], negatives, mask, index)
    values: Tensors = launch(*groups, Weights(*weights))
    return values


def _ranking_reward_backward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    saved: Tensor,
    grad_reward: Tensor,
    weights: Sequence[float],
    wrt: Sequence[bool],
    backend: str,
) -> Tensors:
    launch = launcher("ranking_reward_backward", backend, query.device, query.dtype)
    bank, mask, index = _merged("ranking_reward", negatives, mask, index)
    leading = _leading(query, positive, bank, mask, index)
    shared = [_in_range(x, leading) for x in (query, positive)]
    groups = _groups(leading, shared[0].rows, shared[1].rows, bank, mask, index)
    rest = (saved.contiguous(), grad_reward, Weights(*weights))
    summed = _summed(leading, query, positive, wrt)
    # Of half rows a sum over groups takes float32 terms, to be rounded once.
    halves = any(summed) and compute_dtype(query.dtype) != query.dtype
    at_once = tuple(x and not (halves and s) for x, s in zip(wrt, summed, strict=True))
    found: list[Any] = [None, None, None]
    if any(at_once):
        found[:] = launch(*groups, *rest, at_once)
    if halves:
        terms = launch(*_exact(groups), *rest, summed)
        found = [y if s else x for x, y, s in zip(found, terms, summed, strict=True)]
    for i, (x, rows) in enumerate(zip((query, positive), shared, strict=True)):
        if summed[i]:
            found[i] = rows.summed(found[i], x)
    return _filled(tuple(found), (query, positive, negatives))


def _ranking_reward_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    upstream: Tensor | None,
    weights: Sequence[float],
    wrt: Sequence[bool],
    backend: str,
) -> Tensors:
    bank, mask, index = _merged("ranking_reward_and_grad", negatives, mask, index)
    leading = _leading(query, positive, bank, mask, index)
    if upstream is not None:
        upstream = upstream.expand(leading)
    if not any(_summed(leading, query, positive, wrt)):
        launch = launcher("ranking_reward_and_grad", backend, query.device, query.dtype)
        groups = _groups(leading, query, positive, bank, mask, index)
        results = launch(*groups, upstream, Weights(*weights), tuple(wrt))
        return *results[:5], *_filled(results[5:], (query, positive, negatives))
    # In two passes: the gradients' float32 terms must not change a bit of the half inputs' values.
    inputs = (query, positive, bank, mask, index)
    *values, saved = _ranking_reward_saved(*inputs, weights, backend)
    if upstream is None:
        upstream = torch.ones_like(values[0])
    gradients = _ranking_reward_backward(*inputs, saved, upstream, weights, wrt, backend)
    return *values, *gradients[:2], gradients[2].view(negatives.shape if wrt[2] else 0)


def _groups(
    leading: torch.Size,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
) -> _Groups:
    """The inputs over the leading shape; negatives that groups share as a bank."""
    query, positive = _expand(query, leading, 1), _expand(positive, leading, 1)
    if index is None and negatives.shape[:-2] != leading:
        negatives, place = _bank_of(negatives)
        mask, index = None, place if mask is None else torch.where(mask, place, -1)
    mask, index = _expand(mask, leading, 1), _expand(index, leading, 1)
    return query, positive, negatives, mask, index


def _merged(
    op: str, negatives: Tensor, mask: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Negatives and the mask; or a bank and an index alone, -1 where the mask hides a row of it."""
    if index is None:
        return negatives, mask, None
    if mask is not None:
        index = torch.where(mask, index, -1)
    index = _within(op, index, negatives.shape[-2])
    if negatives.dim() > 2:
        negatives, index = _joined(negatives, index)
    return negatives, None, index


def _joined(banks: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The banks [*members, M, D] of a `torch.vmap` as one, and each member's index into it."""
    *members, rows, _ = banks.shape
    count = torch.Size(members).numel()
    first = torch.arange(count, device=index.device).mul(rows)
    first = first.view(*members, *(1 for _ in range(index.dim() - len(members))))
    return banks.reshape(count * rows, banks.shape[-1]), torch.where(
        index < 0, index, index + first
    )


def _bank_of(negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Negatives [*, N, D] that groups share as a bank, and where in it they lie: [*, N]."""
    shape = negatives.shape[:-1]
    place = torch.arange(shape.numel(), device=negatives.device).view(shape)
    return negatives.reshape(shape.numel(), negatives.shape[-1]), place


def _within(op: str, index: Tensor, rows: int) -> Tensor:
    """`index` with each entry in [0, rows), -1 or, on a device that is not waited for, -2.

    Raises:
        ValueError: on a CPU, another entry.
    """
    if index.device.type != "cpu":
        return torch.where((index < -1) | (index >= rows), -2, index)
    if index.numel() == 0:
        return index
    low, high = (int(x) for x in index.aminmax())
    if low >= -1 and high < rows:
        return index
    found = ((index < -1) | (index >= rows)).nonzero().tolist()
    named = ", ".join(f"{index[tuple(at)]} at {at}" for at in found[:_POSITIONS_NAMED])
    more = f" and {len(found) - _POSITIONS_NAMED} more" if len(found) > _POSITIONS_NAMED else ""
    raise ValueError(
        f"{op}: negative_index must hold rows of negatives, in [0, {rows}), or -1 for "
        f"none, got {named}{more}"
    )


def _in_range(rows: Tensor, leading: torch.Size) -> _Shared:
    """A query or positive, scaled where groups share it.

    A power of two changes no bit of the values. Scaling could lose some of float16's own
    subnormals, whose gradients are in float32's range as they are.
    """
    if not _is_shared(rows, leading) or rows.dtype == torch.float16:
        return _Shared(rows, None)
    unscaled, exponent = scaled(rows)
    return _Shared(unscaled.to(rows.dtype), exponent)


def _is_shared(rows: Tensor, leading: torch.Size) -> bool:
    """Whether groups share rows; a dimension of size 1 that is lacking shares nothing."""
    return rows.shape[:-1] != leading and rows.shape[:-1].numel() != leading.numel()


def _summed(leading: torch.Size, query: Tensor, positive: Tensor, wrt: Sequence[bool]) -> Wanted:
    """Of which gradients terms of several groups are wanted, to be summed here."""
    return wrt[0] and _is_shared(query, leading), wrt[1] and _is_shared(positive, leading), False


def _exact(groups: _Groups) -> _Groups:
    """The same in the compute dtype; of a large bank the rows that are named."""
    query, positive, negatives, mask, index = groups
    if index is not None and len(negatives) > index.numel():
        negatives = negatives[index.clamp(min=0).flatten()]
        place = torch.arange(index.numel(), device=index.device).view(index.shape)
        index = torch.where(index < 0, index, place)
    dtype = compute_dtype(query.dtype)
    return query.to(dtype), positive.to(dtype), negatives.to(dtype), mask, index


def _filled(gradients: Gradients, inputs: Tensors) -> Tensors:
    """Gradients in the shapes of the inputs; [0] for one that is not wanted, as ops return it."""
    return tuple(
        x.new_empty(0) if gradient is None else gradient.view(x.shape)
        for gradient, x in zip(gradients, inputs, strict=True)
    )


def _reward_from_scores(
    scores: Tensor, mask: Tensor | None, weights: Sequence[float], backend: str
) -> Tensors:
    launch = launcher("reward_from_scores", backend, scores.device, scores.dtype)
    leading = _leading_of_scores(scores, mask)
    inputs = (_expand(scores, leading, 1), _expand(mask, leading, 1))
    values: Tensors = launch(*inputs, Weights(*weights))
    return values


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
    (gradient,) = cast(Tensors, launch(*inputs, grad_reward, Weights(*weights)))
    return gradient.sum_to_size(scores.shape).to(scores.dtype)


def _group_advantages(reward: Tensor, scale: str, std_eps: float, backend: str) -> Tensor:
    launch = launcher("group_advantages", backend, reward.device, reward.dtype)
    (advantages,) = cast(Tensors, launch(reward, scale=scale, std_eps=std_eps))
    return advantages


def _leading(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None, index: Tensor | None
) -> torch.Size:
    """The common leading shape `*`."""
    leading = query.shape[:-1]
    of_negatives = negatives.shape[:-2] if index is None else index.shape[:-1]
    if (
        positive.shape[:-1] == leading
        and of_negatives == leading
        and (mask is None or mask.shape[:-1] == leading)
    ):
        return leading
    masks = () if mask is None else (mask.shape[:-1],)
    return torch.Size(torch.broadcast_shapes(leading, positive.shape[:-1], of_negatives, *masks))


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


def _like_reward(like: Tensor, leading: torch.Size, n_candidates: int) -> Tensors:
    """Empty reward, margin_reward, rank_reward, rank and scores, for tracing."""
    dtype = compute_dtype(like.dtype)
    rewards = [like.new_empty(leading, dtype=dtype) for _ in range(3)]
    rank = like.new_empty(leading, dtype=torch.int32)
    return *rewards, rank, like.new_empty((*leading, n_candidates), dtype=dtype)


def _trace_ranking_reward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    *_: Any,
) -> Tensors:
    leading = _leading(query, positive, negatives, mask, index)
    n = negatives.shape[-2] if index is None else index.shape[-1]
    return _like_reward(query, leading, n + 1)


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


def _trace_from_scores(scores: Tensor, mask: Tensor | None, *_: Any) -> Tensors:
    return _like_reward(scores, _leading_of_scores(scores, mask), scores.shape[-1])


def _trace_grad_scores(scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _trace_advantages(reward: Tensor, *_: Any) -> Tensor:
    return reward.new_empty(reward.shape, dtype=compute_dtype(reward.dtype))


_INPUTS = "Tensor query, Tensor positive, Tensor negatives, Tensor? mask, Tensor? negative_index"
_WEIGHTS = "float[] weights, str backend"
_VALUES = "Tensor reward, Tensor margin_reward, Tensor rank_reward, Tensor rank, Tensor scores"
_WRT = "float[] weights, bool[] wrt, str backend"
_GRADIENTS = "Tensor grad_query, Tensor grad_positive, Tensor grad_negatives"

register(
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
            f"(Tensor scores, Tensor? mask, {_WEIGHTS}) -> ({_VALUES})",
            _reward_from_scores,
            _trace_from_scores,
            batched.scores,
        ),
        "reward_from_scores_backward": Registered(
            f"(Tensor scores, Tensor? mask, Tensor grad_reward, {_WEIGHTS}) -> Tensor grad_scores",
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

_OPS = torch.ops.elva_kernels
ranking_reward = _OPS.ranking_reward.default
ranking_reward_and_grad = _OPS.ranking_reward_and_grad.default
reward_from_scores = _OPS.reward_from_scores.default
group_advantages = _OPS.group_advantages.default


class _RankingReward(torch.autograd.Function):
    """(query, positive, negatives, mask, negative_index, weights, wrt, backend) -> the five results
    and what is saved; the gradients in `wrt` of the first."""

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

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return batched.groups(differentiable_ranking_reward, info, in_dims, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = _OPS.ranking_reward_backward.default
        gradients = gradient_op(op, *ctx.saved_tensors, grads[0], *ctx.rest)
        _, wrt, _ = ctx.rest
        wanted = (x if kept else None for x, kept in zip(gradients, wrt, strict=True))
        return *wanted, None, None, None, None, None


class _RewardFromScores(torch.autograd.Function):
    """(scores, mask, weights, backend) -> the five results; gradient of the first."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        return cast(Tensors, reward_from_scores(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.rest = inputs[2:]
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return batched.scores(differentiable_reward_from_scores, info, in_dims, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = _OPS.reward_from_scores_backward.default
        grad_scores = gradient_op(op, *ctx.saved_tensors, grads[0], *ctx.rest)
        return grad_scores, None, None, None


differentiable_ranking_reward = in_reverse(
    _RankingReward, functools.partial(refuse_forward_mode, "ranking_reward", "reward")
)
differentiable_reward_from_scores = in_reverse(
    _RewardFromScores, functools.partial(refuse_forward_mode, "reward_from_scores", "reward")
)
