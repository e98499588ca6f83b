"""The rows of a batch that lies on the processes of a group: who holds what, and their exchange.

Nothing travels but rows, once, and a few numbers a row; each process receives them in the order of
ranks. Where all hold as many, in one collective, else each from its own process, so that nothing is
padded.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from elva_kernels.backends.shares import Exchange
from elva_kernels.reference import NO_CANDIDATE, NO_POSITIVE, Batch
from elva_kernels.registered.batch import Given, batch_of, per_positive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# By its name since torch 2.13, else by the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Sizes(NamedTuple):
    """Of what each process holds, by its rank."""

    queries: list[int]
    candidates: list[int]
    positives: list[int]  # a query
    pairs: list[int]  # that are excluded


class Gathering:
    """Rows of all processes under way."""

    def __init__(self, own: Tensor, counts: Sequence[int], group: ProcessGroup) -> None:
        own = own.detach().contiguous()
        self._whole = own.new_empty((sum(counts), *own.shape[1:]))
        self._works: list[Any] = []
        if own.dim() > 1 and 0 in own.shape[1:]:
            return
        whole, sent = (_bytes(x) for x in (self._whole, own))
        if len(set(counts)) == 1:
            if counts[0] > 0:
                self._works.append(_all_gather(whole, sent, group=group, async_op=True))
            return
        for rank, part in enumerate(whole.split(list(counts))):
            if len(part) == 0:
                continue
            if rank == dist.get_rank(group):
                part.copy_(sent)
            source = dist.get_global_rank(group, rank)
            self._works.append(dist.broadcast(part, source, group=group, async_op=True))

    def whole(self) -> Tensor:
        """[sum of counts, ...]; waits for what has not come yet."""
        while self._works:
            self._works.pop().wait()
        return self._whole


def _bytes(rows: Tensor) -> Tensor:
    """[R, .] uint8: a collective takes these of every dtype."""
    return (rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)).view(torch.uint8)


class Processes(Exchange):
    """A checked call's batch over a group: its candidates are on their way, its batch is here.

    Attributes:
        batch: of all queries, in rows of all candidates.
        own: of its own queries, in rows of all candidates.
        wrt: whether any process wants the gradients on queries, and on candidates.

    Raises:
        ValueError: on every process, where the arguments of one are refused, or where the
            processes do not make the same call.
    """

    def __init__(
        self,
        op: str,
        group: ProcessGroup,
        query: Tensor,
        candidates: Tensor,
        given: Given,
        wrt: Sequence[bool],
        spec: str,
    ) -> None:
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        self.sizes, self.wrt = self._agree(op, query, candidates, given, wrt, spec)
        self._query = query
        self._queries: Gathering | None = None
        self.rows, self.columns = (
            slice(sum(x[: self.rank]), sum(x[: self.rank + 1]))
            for x in (self.sizes.queries, self.sizes.candidates)
        )
        shift = 0 if given.global_target else self.columns.start
        counts = self.sizes.candidates
        # Candidates that a target or a pair may name.
        self._nameable = sum(counts) if given.global_target else counts[self.rank]
        own = self._checked(op, query, given)
        self._candidates = Gathering(candidates, self.sizes.candidates, group)
        self.batch = self._batch_of_all(own, shift)
        pairs = None if own.excluded is None else self._pairs(own.excluded, 0, shift)
        target = self.batch.target[self.rows].contiguous()
        self.own = self.batch._replace(target=target, excluded=pairs)

    def candidates(self) -> Tensor:
        """[M, D] of all processes."""
        return self._candidates.whole()

    def ask_for_queries(self) -> None:
        """Sends them on their way."""
        if self._queries is None:
            self._queries = Gathering(self._query, self.sizes.queries, self.group)

    def queries(self) -> Tensor:
        self.ask_for_queries()
        assert self._queries is not None
        return self._queries.whole()

    def of_rows(self, own: Tensor) -> Tensor:
        return Gathering(own, self.sizes.queries, self.group).whole()

    def of_columns(self, own: Tensor) -> Tensor:
        return Gathering(own, self.sizes.candidates, self.group).whole()

    def _exchanged(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """The numbers of each process; a GPU is waited for."""
        own = torch.tensor([numbers], dtype=torch.int64, device=device)
        found = Gathering(own, [1] * self.world, self.group).whole()
        return [[int(x) for x in row] for row in found.tolist()]

    def _agree(
        self,
        op: str,
        query: Tensor,
        candidates: Tensor,
        given: Given,
        wrt: Sequence[bool],
        spec: str,
    ) -> tuple[Sizes, tuple[bool, bool]]:
        """Everybody's sizes and wishes; the rest must be everybody's alike."""
        positives = 1 if given.target is None else per_positive(given.target).shape[1]
        pairs = 0 if given.excluded is None else len(given.excluded)
        ids = given.candidate_ids is not None
        alike = f"{op}, D = {query.shape[1]}, {query.dtype}, candidate_ids {ids}, {spec}"
        own = (len(query), len(candidates), positives, pairs, *map(int, wrt))
        found = self._exchanged((*own, zlib.crc32(alike.encode())), query.device)
        *columns, of_query, of_candidates, words = (list(x) for x in zip(*found, strict=True))
        for rank, word in enumerate(words):
            if word != words[0]:
                raise ValueError(
                    f"{op}: group must make the same call on every process, got other arguments "
                    f"on process {rank} than on process 0; this one, {self.rank}, was called "
                    f"with {alike}"
                )
        return Sizes(*columns), (any(of_query), any(of_candidates))

    def _checked(self, op: str, query: Tensor, given: Given) -> Batch:
        """Its own batch as it was passed; on a CPU all processes learn whether each can be."""
        own: Batch | ValueError
        try:
            own = batch_of(op, query, self._nameable, *given.named)
        except ValueError as error:
            own = error
        if query.device.type == "cpu":  # elsewhere no value is looked at
            refused = [int(isinstance(own, ValueError))]
            failed = [rank for rank, (x,) in enumerate(self._exchanged(refused, query.device)) if x]
            if failed and isinstance(own, Batch):
                raise ValueError(
                    f"{op}: group must be given arguments that hold on every process, got an error "
                    f"on process {failed[0]}"
                )
        if isinstance(own, ValueError):
            raise own
        return own

    def _pairs(self, excluded: Tensor, row: int, column: int) -> Tensor:
        """Its own pairs, shifted; what is out of its range, on a GPU, must not name another's."""
        rows, columns = excluded.unbind(1)
        queries = self.sizes.queries[self.rank]
        there = (rows >= 0) & (rows < queries) & (columns >= 0) & (columns < self._nameable)
        rows = rows.clamp(0, max(0, queries - 1)) + row  # still in order
        return torch.stack([rows, torch.where(there, columns + column, NO_CANDIDATE)], dim=1)

    def _batch_of_all(self, own: Batch, shift: int) -> Batch:
        missing = max(self.sizes.positives) - own.target.shape[1]
        target = torch.where(own.target < 0, own.target, own.target + shift)
        target = torch.nn.functional.pad(target, (0, missing), value=NO_POSITIVE)
        excluded = None
        if any(self.sizes.pairs):
            pairs = own.target.new_empty(0, 2) if own.excluded is None else own.excluded
            pairs = self._pairs(pairs, self.rows.start, shift)
            excluded = Gathering(pairs, self.sizes.pairs, self.group).whole()
        ids = None if own.candidate_ids is None else self.of_columns(own.candidate_ids)
        return Batch(self.of_rows(target), excluded, ids, own.max_score)
