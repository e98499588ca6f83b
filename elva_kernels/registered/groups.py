"""The grouped ops' inputs as their launchers take them.

Leading dimensions are expanded to their common shape, as views; negatives that groups share become
a bank, whose rows an index names; queries and positives that groups share are brought in range,
since their gradients are to be summed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elva_kernels.backends.launcher import Groups
from elva_kernels.reference import Wanted, compute_dtype, scaled, times_power

_POSITIONS_NAMED = 8


class Shared(NamedTuple):
    """An input of which groups share rows: in range, since sums of their gradients are to be."""

    rows: Tensor  # times 2^-exponent
    exponent: Tensor | None  # None for 0

    def summed(self, gradient: Tensor, like: Tensor) -> Tensor:
        """A gradient on each group's `rows` as that on `like`, what the caller passed."""
        total = gradient.sum_to_size(like.shape)
        if self.exponent is not None:
            total = times_power(total, -self.exponent)
        return total.to(like.dtype)


def leading_of(groups: Groups) -> torch.Size:
    """The common leading shape `*`."""
    query, positive, negatives, mask, index, relevance = groups
    of_negatives = negatives.shape[:-2] if index is None else index.shape[:-1]
    return common_leading(of_negatives, query, positive, mask, relevance)


def common_leading(leading: torch.Size, *others: Tensor | None) -> torch.Size:
    """`leading`, broadcast with all but the last dimension of each of `others`."""
    shapes = [x.shape[:-1] for x in others if x is not None]
    if all(x == leading for x in shapes):
        return leading
    return torch.Size(torch.broadcast_shapes(leading, *shapes))


def groups_of(leading: torch.Size, groups: Groups) -> Groups:
    """The inputs over the leading shape; negatives that groups share as a bank."""
    query, positive, negatives, mask, index, relevance = groups
    query, positive = expanded(query, leading, 1), expanded(positive, leading, 1)
    if index is None and negatives.shape[:-2] != leading:
        negatives, place = _bank_of(negatives)
        mask, index = None, place if mask is None else torch.where(mask, place, -1)
    mask, index = expanded(mask, leading, 1), expanded(index, leading, 1)
    return Groups(query, positive, negatives, mask, index, graded(relevance, leading))


def graded(relevance: Tensor | None, leading: torch.Size) -> Tensor | None:
    """The relevance as a launcher takes it."""
    return None if relevance is None else expanded(relevance, leading, 1).contiguous()


def merged(op: str, groups: Groups) -> Groups:
    """With a bank an index alone, -1 where the mask hides a row of it."""
    _, _, negatives, mask, index, _ = groups
    if index is None:
        return groups
    if mask is not None:
        index = torch.where(mask, index, -1)
    index = _within(op, index, negatives.shape[-2])
    if negatives.dim() > 2:
        negatives, index = _joined(negatives, index)
    return groups._replace(negatives=negatives, mask=None, negative_index=index)


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


def check_relevance(op: str, relevance: Tensor | None, live: Tensor | None) -> None:
    """Each in [0, 1] where `live` holds, or everywhere; a GPU is not waited for: its kernels look.

    Raises:
        ValueError: on a CPU, another one.
    """
    if relevance is None or relevance.device.type != "cpu" or relevance.numel() == 0:
        return
    low, high = (float(x) for x in relevance.aminmax())
    if low >= 0 and high <= 1:  # not where either is NaN
        return
    wrong = ~((relevance >= 0) & (relevance <= 1))
    if live is not None:
        wrong = (wrong & live).int().sum_to_size(relevance.shape) > 0
    found = wrong.nonzero().tolist()
    if found:
        named = ", ".join(f"{relevance[tuple(at)]:g} at {at}" for at in found[:_POSITIONS_NAMED])
        more = f" and {len(found) - _POSITIONS_NAMED} more" if len(found) > _POSITIONS_NAMED else ""
        raise ValueError(f"{op}: relevance must be in [0, 1], got {named}{more}")


def in_range(rows: Tensor, leading: torch.Size) -> Shared:
    """A query or positive, scaled where groups share it.

    A power of two changes no bit of the values. Scaling could lose some of float16's own
    subnormals, whose gradients are in float32's range as they are.
    """
    if not _is_shared(rows, leading) or rows.dtype == torch.float16:
        return Shared(rows, None)
    unscaled, exponent = scaled(rows)
    return Shared(unscaled.to(rows.dtype), exponent)


def _is_shared(rows: Tensor, leading: torch.Size) -> bool:
    """Whether groups share rows; a dimension of size 1 that is lacking shares nothing."""
    return rows.shape[:-1] != leading and rows.shape[:-1].numel() != leading.numel()


def summed_of(leading: torch.Size, query: Tensor, positive: Tensor, wrt: Sequence[bool]) -> Wanted:
    """Of which gradients terms of several groups are wanted, to be summed here."""
    return wrt[0] and _is_shared(query, leading), wrt[1] and _is_shared(positive, leading), False


def exact(groups: Groups) -> Groups:
    """The same in the compute dtype; of a large bank the rows that are named."""
    query, positive, negatives, mask, index, relevance = groups
    if index is not None and len(negatives) > index.numel():
        negatives = negatives[index.clamp(min=0).flatten()]
        place = torch.arange(index.numel(), device=index.device).view(index.shape)
        index = torch.where(index < 0, index, place)
    dtype = compute_dtype(query.dtype)
    return Groups(query.to(dtype), positive.to(dtype), negatives.to(dtype), mask, index, relevance)


def expanded(tensor: Any, leading: torch.Size, kept: int) -> Any:
    """`tensor` (or None) as a view whose dimensions before the last `kept` are `leading`."""
    if tensor is None or tensor.shape[: tensor.dim() - kept] == leading:
        return tensor
    return tensor.expand(*leading, *tensor.shape[tensor.dim() - kept :])
