"""What `torch.vmap` makes of an op: one launch with one more leading dimension, or a loop.

A rule takes what to call, torch's `info`, for each argument the dimension that counts the members
of the batch (None where they share it), and the arguments; it returns the results and which
dimension of each counts the members. Values are not looked at: in a nested `vmap` the arguments
are batches of a level further out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]
Rule = Callable[..., tuple[Any, Any]]

_EMBEDDINGS = 3  # of the arguments of a grouped op: query, positive, negatives


def looped(call: Call, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """An op of whole batches of queries: called for one member after the other."""
    given = [*zip(arguments, in_dims, strict=True)]
    if info.batch_size == 0:  # the shapes are those of any member
        given = [(_one_of_zeros(x, dim) if isinstance(dim, int) else x, dim) for x, dim in given]
    results = [
        call(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in given))
        for i in range(max(1, info.batch_size))
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[: info.batch_size], 0
    return _in_front(tuple(torch.stack(x)[: info.batch_size] for x in zip(*results, strict=True)))


def search(call: Call, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """Search (query, corpus, ...): called once where the members share a corpus."""
    query, corpus, *rest = arguments
    if in_dims[1] is not None:
        return looped(call, info, in_dims, *arguments)
    query = query.movedim(in_dims[0], 0)
    found = call(query.flatten(0, 1), corpus, *rest)
    return _in_front(tuple(x.unflatten(0, query.shape[:2]) for x in found))


def advantages(call: Call, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """Advantages (reward, scale, ...): called once, but where all rewards have one scale."""
    reward, scale, *rest = arguments
    if scale == "batch":
        return looped(call, info, in_dims, *arguments)
    return call(reward.movedim(in_dims[0], 0), scale, *rest), 0


def scores(call: Call, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """An op of (scores, mask, relevance, ...): called once."""
    rank = _leading_rank(arguments, in_dims, (1, 1, 1))
    batch = (_led(x, dim, rank, 1) for x, dim in zip(arguments[:3], in_dims, strict=False))
    return _in_front(call(*batch, *arguments[3:]))


def gradient_of_scores(
    call: Call, info: Any, in_dims: Sequence[Any], *arguments: Any
) -> tuple[Any, Any]:
    """The gradient on scores (scores, mask, relevance, grad_reward, ...): called once."""
    rank = _leading_rank(arguments, in_dims, (1, 1, 1))
    kept = (1, 1, 1, 0)
    batch = (
        _led(x, dim, rank, n, info.batch_size)
        for x, dim, n in zip(arguments, in_dims, kept, strict=False)
    )
    gradient = call(*batch, *arguments[len(kept) :])
    return gradient.reshape(info.batch_size, *_member(arguments[0], in_dims[0])), 0


def groups(call: Call, info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """An op of (query, positive, negatives, mask, index, relevance, ...): called once."""
    batch, _ = _groups(info.batch_size, in_dims, arguments, negatives_wanted=False)
    return _in_front(call(*batch, *arguments[len(batch) :]))


def gradients_of_groups(
    kept: Sequence[int], call: Call, info: Any, in_dims: Sequence[Any], *arguments: Any
) -> tuple[Any, Any]:
    """The same with more tensors behind and (..., wrt, backend) at the end: called once.

    Of each of these tensors `kept` dimensions are behind the leading ones. The last three results
    are the gradients in `wrt`: of each member, though all may share the input.
    """
    size, wrt = info.batch_size, arguments[-2]
    batch, rank = _groups(size, in_dims, arguments, negatives_wanted=wrt[2])
    more = zip(arguments[len(batch) :], in_dims[len(batch) :], kept, strict=False)
    batch += [_led(x, dim, rank, n, size) for x, dim, n in more]
    results = call(*batch, *arguments[len(batch) :])
    values, gradients = results[:-_EMBEDDINGS], results[-_EMBEDDINGS:]
    inputs = zip(gradients, arguments, in_dims, wrt, strict=False)
    found = (
        gradient.reshape(size, *_member(x, dim)) if wanted else gradient
        for gradient, x, dim, wanted in inputs
    )
    return (*values, *found), (*(0 for _ in values), *(0 if x else None for x in wrt))


def _groups(
    size: int, in_dims: Sequence[Any], arguments: Sequence[Any], *, negatives_wanted: bool
) -> tuple[list[Any], int]:
    """Query, positive, negatives, mask, index and relevance of all members, and their leading
    dimensions.

    A query or positive that members share is expanded whether its gradient is wanted or not: that
    is as each member has it, and `saved` is of the same rows in the forward and in the backward.
    """
    copies = size if negatives_wanted else None
    query, positive, negatives, mask, index, relevance = arguments[:6]
    of_others = (*in_dims[:2], in_dims[3], in_dims[5])
    others = (query, positive, mask, relevance)
    if index is None:
        given = ((*others, negatives), (*of_others, in_dims[2]))
        rank = _leading_rank(*given, (1, 1, 1, 1, 2))
        negatives = _led(negatives, in_dims[2], rank, 2, copies)
    else:
        rank = _leading_rank((*others, index), (*of_others, in_dims[4]), (1, 1, 1, 1, 1))
        negatives = _bank(negatives, in_dims[2], copies)
        index = _led(index, in_dims[4], rank, 1, size if negatives.dim() > 2 else None)
    rows = (_led(x, dim, rank, 1, size) for x, dim in ((query, in_dims[0]), (positive, in_dims[1])))
    mask, relevance = _led(mask, in_dims[3], rank, 1), _led(relevance, in_dims[5], rank, 1)
    return [*rows, negatives, mask, index, relevance], rank


def _bank(bank: Tensor, dim: int | None, copies: int | None) -> Tensor:
    """A bank [M, D] that all share, or [*members, M, D], one for each of the first in the index."""
    if dim is not None:
        return bank.movedim(dim, 0)
    if copies is not None:
        return bank.expand(copies, *bank.shape)
    return bank if bank.dim() == 2 else bank.unsqueeze(0)


def _leading_rank(tensors: Sequence[Any], in_dims: Sequence[Any], kept: Sequence[int]) -> int:
    """The most leading dimensions, those before the last `kept`, that one member has."""
    given = zip(tensors, in_dims, kept, strict=False)
    ranks: list[int] = [x.dim() - (dim is not None) - n for x, dim, n in given if x is not None]
    return max(ranks)


def _led(x: Any, dim: int | None, rank: int, kept: int, copies: int | None = None) -> Any:
    """A tensor (or None) as [members, `rank` leading dimensions, `kept` others].

    One that the members share stays as it is, or is expanded to so many `copies`, as a view.
    """
    if x is None or (dim is None and copies is None):
        return x
    x = x.expand(copies, *x.shape) if dim is None else x.movedim(dim, 0)
    for _ in range(rank + kept + 1 - x.dim()):
        x = x.unsqueeze(1)
    return x


def _member(x: Tensor, dim: int | None) -> torch.Size:
    """The shape of one member's tensor."""
    return x.shape if dim is None else x.movedim(dim, 0).shape[1:]


def _one_of_zeros(x: Tensor, dim: int) -> Tensor:
    return x.new_zeros([1 if i == dim else size for i, size in enumerate(x.shape)])


def _in_front(results: Sequence[Tensor]) -> tuple[Any, Any]:
    """Results of which each counts the members in its first dimension."""
    return tuple(results), (0,) * len(results)
