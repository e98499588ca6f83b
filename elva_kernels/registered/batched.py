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

Rule = Callable[..., tuple[Any, Any]]


def looped(call: Callable[..., Any], info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    """An op of a whole batch of queries: called for one member after the other."""
    given = [*zip(arguments, in_dims, strict=True)]
    if info.batch_size == 0:  # the shapes are those of any member
        given = [(_zeros(x, dim) if isinstance(dim, int) else x, dim) for x, dim in given]
    results = [
        call(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in given))
        for i in range(max(1, info.batch_size))
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[: info.batch_size], 0
    stacked = (torch.stack(x)[: info.batch_size] for x in zip(*results, strict=True))
    return tuple(stacked), (0,) * len(results[0])


def leading_rank(tensors: Sequence[Any], in_dims: Sequence[Any], kept: Sequence[int]) -> int:
    """The most leading dimensions that a member has, before the last `kept` of each tensor."""
    return max(
        x.dim() - (dim is not None) - n
        for x, dim, n in zip(tensors, in_dims, kept, strict=True)
        if x is not None
    )


def in_front(x: Any, dim: int | None, rank: int, kept: int, copies: int | None = None) -> Any:
    """A tensor (or None) with its members in front, then `rank` leading dimensions, then `kept`.

    One that the members share stays as it is, or is expanded to so many `copies`, as a view.
    """
    if x is None or (dim is None and copies is None):
        return x
    x = x.expand(copies, *x.shape) if dim is None else x.movedim(dim, 0)
    for _ in range(rank + kept + 1 - x.dim()):
        x = x.unsqueeze(1)
    return x


def member_shape(x: Tensor, dim: int | None) -> list[int]:
    """The shape of one member's tensor."""
    return [size for i, size in enumerate(x.shape) if dim is None or i != dim % x.dim()]


def _zeros(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = 1
    return x.new_zeros(shape)
