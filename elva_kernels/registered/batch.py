"""What a query is compared with, from what a user passed to the form in which kernels take it.

Here values are looked at, on a CPU: a GPU has to be trusted, or waited for. There an index out of
its range is no candidate: the pair's results are NaN, and nothing is read for it.
"""

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from elva_kernels.reference import NO_CANDIDATE, NO_POSITIVE, Batch


class Given(NamedTuple):
    """What says which candidates a query is compared with, as it was passed."""

    target: Tensor | None
    excluded: Tensor | None
    candidate_ids: Tensor | None
    max_score: float | None
    global_target: bool  # with a group: whether rows are of all candidates, or of its own

    @property
    def named(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, float | None]:
        """What a registered op takes."""
        return self.target, self.excluded, self.candidate_ids, self.max_score


def batch_of(
    op: str,
    query: Tensor,
    m: int,
    target: Tensor | None,
    excluded: Tensor | None,
    candidate_ids: Tensor | None,
    max_score: float | None,
) -> Batch:
    """The checked arguments as a `Batch`: int64, dense, in [0, m), pairs ascending in the query."""
    targets = _targets(op, target, query, m)
    if excluded is not None:
        excluded = excluded.to(torch.int64)
        if excluded.device.type == "cpu":
            _check_excluded(op, excluded, targets, m)
        excluded = _ascending(excluded, len(targets))
    if candidate_ids is not None:
        candidate_ids = candidate_ids.to(torch.int64).contiguous()
    padded = target is not None and target.dim() == 2
    return Batch(targets, excluded, candidate_ids, max_score, padded, diagonal=target is None)


def counted(target: Tensor) -> Tensor:
    """[] the queries that a mean is over: those that have a positive, of targets [B, P]."""
    return (target != NO_POSITIVE).any(1).sum()


def per_positive(tensor: Tensor) -> Tensor:
    """[B, P] of [B] or [B, P]."""
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(1)


def like_target(result: Tensor, target: Tensor | None) -> Tensor:
    """A result per positive [B, P or more] in the shape in which the targets were passed."""
    if target is None or target.dim() == 1:
        return result[:, 0].contiguous() if result.shape[1] > 1 else result.squeeze(1)
    width = target.shape[1]
    return result if result.shape[1] == width else result[:, :width].contiguous()


def statistics_like(statistics: Sequence[Tensor], target: Tensor | None) -> tuple[Tensor, ...]:
    """The fields of `reference.RankStatistics`, per positive as the targets were passed."""
    return *(like_target(x, target) for x in statistics[:4]), *statistics[4:]


def _targets(op: str, target: Tensor | None, query: Tensor, m: int) -> Tensor:
    """[B, P]."""
    if target is None:
        return torch.arange(len(query), device=query.device).unsqueeze(1)
    least = 0 if target.dim() == 1 else NO_POSITIVE
    target = target.to(torch.int64)
    if target.device.type == "cpu":
        if target.numel() > 0:
            low, high = (int(x) for x in target.aminmax())
            if low < least or high >= m:
                _refuse_target(op, target, least, m)
    else:
        target = torch.where((target < least) | (target >= m), NO_CANDIDATE, target)
    return per_positive(target).contiguous()


def _refuse_target(op: str, target: Tensor, least: int, m: int) -> NoReturn:
    place = [int(x) for x in ((target < least) | (target >= m)).nonzero()[0]]
    padding = " or -1 for none" if least < 0 else ""
    raise ValueError(
        f"{op}: target must hold indices of candidates, in [0, {m}){padding}, "
        f"got {int(target[tuple(place)])} at {place}; give each query the rows of its positives"
    )


def _ascending(excluded: Tensor, queries: int) -> Tensor:
    """The pairs sorted by query; as they are where a CPU sees that they are sorted."""
    row = excluded[:, 0]
    if row.device.type != "cpu":
        return excluded[row.argsort(stable=True)]
    if bool((row[1:] >= row[:-1]).all()):
        return excluded
    # They are in range. Measured: 167,000 rows sort in 8 ms as int64, in 2 as int16.
    narrow = torch.int16 if queries <= 2**15 else torch.int32 if queries <= 2**31 else torch.int64
    return excluded.index_select(0, row.to(narrow).argsort(stable=True))


def _check_excluded(op: str, excluded: Tensor, target: Tensor, m: int) -> None:
    """Pairs of a query and a candidate, none of which is its positive."""
    if len(excluded) == 0:
        return
    row, column = excluded.unbind(1)
    for index, size, what in ((row, len(target), "queries"), (column, m, "candidates")):
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= size:
            pair = excluded[((index < 0) | (index >= size)).nonzero()[0, 0]].tolist()
            raise ValueError(
                f"{op}: excluded must hold pairs of a query and a candidate, the {what} in "
                f"[0, {size}), got {pair}"
            )
    own = torch.zeros(len(excluded), dtype=torch.bool)
    for positive in target.unbind(1):
        own |= positive[row] == column
    if bool(own.any()):
        pair = excluded[own.nonzero()[0, 0]].tolist()
        raise ValueError(
            f"{op}: excluded must name no positive, got {pair}; "
            "drop the pair, or the candidate from the query's targets"
        )
