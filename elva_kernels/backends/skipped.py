"""The candidates that are no negatives of a query beside its positives, as kernels take them."""

from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.reference import Batch


class Skipped(NamedTuple):
    """Segments of one list: query i skips `candidate[first[i, s] : last[i, s]]` for each s."""

    candidate: Tensor  # int64 [X]; kernels ignore what is none
    first: Tensor  # int64 [B, S]
    last: Tensor  # int64 [B, S]


def skipped_of(batch: Batch) -> Skipped | None:
    """What ids and excluded pairs say, without looking at a value: a GPU is not waited for.

    Of equal ids the candidates lie side by side once they are sorted, as do a query's pairs.
    """
    parts = [_of_ids(batch.candidate_ids, batch.target)] if batch.candidate_ids is not None else []
    if batch.excluded is not None:
        parts.append(_of_pairs(batch.excluded, len(batch.target)))
    if len(parts) < 2:
        return parts[0] if parts else None
    ids, pairs = parts
    shift = len(ids.candidate)
    return Skipped(
        torch.cat([ids.candidate, pairs.candidate]),
        torch.cat([ids.first, pairs.first + shift], dim=1),
        torch.cat([ids.last, pairs.last + shift], dim=1),
    )


def _of_ids(ids: Tensor, target: Tensor) -> Skipped:
    """A segment for each positive: the candidates of its id, itself among them."""
    if len(ids) == 0:
        return Skipped(ids, torch.zeros_like(target), torch.zeros_like(target))
    ordered, candidate = ids.sort(stable=True)
    own = ids[target.clamp(min=0)]
    first, last = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
    return Skipped(candidate, first, torch.where(target < 0, first, last))


def _of_pairs(excluded: Tensor, queries: int) -> Skipped:
    """One segment: the candidates of the query's pairs, which are sorted by query."""
    row, candidate = (x.contiguous() for x in excluded.unbind(1))
    each = torch.arange(queries, device=row.device).unsqueeze(1)
    first, last = (torch.searchsorted(row, each, right=right) for right in (False, True))
    return Skipped(candidate, first, last)
