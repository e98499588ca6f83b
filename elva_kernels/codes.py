"""Exact search that reads a quarter or a half of the bytes: codes of rows, as users call them."""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels import checks
from elva_kernels.reference import FineCodes, RowCodes, TopK, compute_dtype
from elva_kernels.registered import codes as registered
from elva_kernels.registered.library import outside_graphs
from elva_kernels.registered.topk import topk as registered_topk

# Ours, measured on 1,000,000 x 1536: so many rows a query are proposed, the better ones of them
# read first, and where that proves nothing, so many times more before all rows are read.
_PROPOSED, _PROPOSED_A_RESULT = 256, 4
_READ, _READ_A_RESULT = 32, 2
_MORE = 8
_MOST = 1 << 20  # proposals that are held at once


class _Pace(NamedTuple):
    """How much is done at once; ours."""

    tried: int  # queries that show whether the codes prove anything
    at_once: int  # queries that are proposed rows at once
    together: int  # queries whose rows are read together
    alike: int  # queries in a batch of which a score has the same bits as alone
    block_bytes: int  # of rows that are copied at a time
    in_two: bool  # the better proposals are read first, and others only as far as they matter


# A CPU keeps the rows of some queries in its cache. On a GPU, reading a few hundred rows takes less
# time than waiting to know how many matter; products of more than 128 queries are torch's.
_ON_A_CPU = _Pace(64, 256, 16, sys.maxsize, 16 << 20, in_two=True)
_ON_A_GPU = _Pace(1024, 1024, 128, 128, 256 << 20, in_two=False)


class CodedTopK(NamedTuple):
    """The best corpus rows of each query, best first, and what it took to know them.

    Attributes:
        scores: [Q, min(k, rows that may be found)] float32, or float64 for float64 inputs.
        index: int64, as `scores`: rows of the corpus.
        proven: bool [Q], True where codes show that no other row is better; False: all rows do.
        rows_read: rows of the corpus that were read; one that several queries of a batch want
            counts once.
    """

    scores: Tensor
    index: Tensor  # type: ignore[assignment]  # a method of tuples that nobody misses
    proven: Tensor
    rows_read: int


def row_codes(corpus: Tensor, *, backend: str = "auto") -> RowCodes:
    """8-bit codes of rows, by which `coded_topk` finds the best without reading the others.

    Each unit row, under a rotation that is the same for all, is rounded to ``scale * code``; what
    rounding lost is kept as its length (eq. 16). A row takes D + 8 bytes.

    Args:
        corpus: [P, D], bfloat16, float16, float32 or float64, of any strides; D at most 65,536.
        backend: "auto", or a name out of `available_backends()`, which is used or raises.

    Returns:
        RowCodes: `code` int8 [P, D], `scale` and `lost` float32 [P]. They hold for these rows as
        they are: rows that are rounded to another dtype afterwards need codes of their own. A row
        of NaN or inf has lost inf.

    Raises:
        ValueError: a shape, device or layout.
        TypeError: a dtype, or an argument of another type.
        BackendUnavailable: the named backend cannot run here.

    Differentiable: no.
    """
    checks.coded_rows("row_codes", corpus, backend)
    with torch.no_grad():
        code, _, scale, lost = registered.row_codes(corpus, False, backend)
        return RowCodes(code, scale, lost)


@outside_graphs
def coded_topk(
    query: Tensor,
    corpus: Tensor | Sequence[Tensor],
    codes: RowCodes | Sequence[RowCodes],
    k: int,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> CodedTopK:
    """`topk` by cosine, to the bit, of a corpus whose codes are read in its place.

    A bound on every row's score comes from its codes alone (eq. 17, by Cauchy and Schwarz); rows
    whose bound reaches the k-th best score that is known are read and scored, the others cannot be
    among the answers. Where too many rows lie too close (copies, a collapsed model), all are read.

    Args:
        query: [Q, D], of corpus's dtype, or float32 or float64 with a corpus of fewer bits, whose
            rows are then scored as wide as the query.
        corpus: [P, D], of any strides, or several such, counted on from one to the next. Only rows
            that may be among the answers are read: it may be a memory map.
        codes: `row_codes` of each. Nothing tells codes of other rows: with them answers are wrong.
        k: >= 0, rows a query; more than there are gives those that there are.
        mask: bool [P], True for rows that may be found; the others are not read. All for None.
        backend: as in `topk`.

    Returns:
        CodedTopK: `scores` and `index` as `topk(query, corpus.to(query.dtype), k)` gives them, of
        the rows that `mask` allows (on a GPU, as it gives them of at most 128 queries); `proven`
        [Q]; `rows_read`.

    Raises:
        ValueError: a shape, device, layout or number out of its range.
        TypeError: a dtype, or an argument of another type.
        BackendUnavailable: the named backend cannot run here.

    Differentiable: no; the results are detached. How much is read depends on what was found, so
    that a call breaks the graph of `torch.compile`.
    """
    parts, coded, k = checks.coded_search("coded_topk", query, corpus, codes, k, mask, backend)
    with torch.no_grad():
        return _Search(query.detach(), parts, coded, mask, backend).best(k)


class _Answers(NamedTuple):
    """Of some queries, as `CodedTopK` has them."""

    scores: Tensor
    index: Tensor  # type: ignore[assignment]
    proven: Tensor


class _Search:
    """Some queries, and the corpus that they look through."""

    def __init__(
        self,
        query: Tensor,
        parts: Sequence[Tensor],
        codes: Sequence[RowCodes],
        mask: Tensor | None,
        backend: str,
    ) -> None:
        self.query, self.mask, self.backend = query, mask, backend
        self.parts, self.codes, self.starts = [], [], [0]
        for part, coded in zip(parts, codes, strict=True):
            if len(part):
                self.parts.append(part)
                self.codes.append(coded)
                self.starts.append(self.starts[-1] + len(part))
        self.edges = torch.tensor(self.starts, device=query.device)
        self.total = self.starts[-1]
        self.pace = _ON_A_CPU if query.device.type == "cpu" else _ON_A_GPU
        self.read = 0

    def best(self, k: int) -> CodedTopK:
        device, count = self.query.device, len(self.query)
        self.live = self.total if self.mask is None else int(self.mask.sum())
        k = min(k, self.live)
        found = _Answers(
            torch.empty((count, k), dtype=compute_dtype(self.query.dtype), device=device),
            torch.empty((count, k), dtype=torch.int64, device=device),
            torch.ones(count, dtype=torch.bool, device=device),
        )
        if count and k:
            found.proven[:] = False
            coded = FineCodes(*registered.row_codes(self.query, True, self.backend))
            pending = []
            for some in self._batches(count, k):
                left = self._by_codes(some, coded, k, found)
                pending.append(left)
                if len(left) == len(some):  # rows lie too close; so they do for the others
                    pending.append(torch.arange(int(some[-1]) + 1, count, device=device))
                    break
            rest = torch.cat(pending)
            if len(rest):
                found.scores[rest], found.index[rest] = self._plain(rest, k)
        return CodedTopK(*found, self.read)

    def _batches(self, count: int, k: int) -> Iterator[Tensor]:
        """The queries: at first a few, and as many at once as the memory of proposals allows."""
        size = self.pace.tried
        most = max(self.pace.together, min(self.pace.at_once, _MOST // self._depths(k)[-1]))
        first = 0
        while first < count:
            size = min(size, most, count - first)
            yield torch.arange(first, first + size, device=self.query.device)
            first, size = first + size, most

    def _depths(self, k: int) -> list[int]:
        """How many rows a query are proposed at first, and then where that proves nothing."""
        depth = max(_PROPOSED, _PROPOSED_A_RESULT * k)
        return sorted({min(depth, self.live), min(_MORE * depth, self.live)})

    def _by_codes(self, some: Tensor, coded: FineCodes, k: int, found: _Answers) -> Tensor:
        """Write the answers of some queries into `found`; those of which nothing is proven."""
        for depth in self._depths(k):
            bounds, index = self._nearest(FineCodes(*(x[some] for x in coded)), depth)
            batches = (x.split(self.pace.together) for x in (some, bounds, index))
            for rows, high, at in zip(*batches, strict=True):
                if bool((at[:, k - 1] < 0).any()):
                    continue  # no such proposals: codes that are no numbers
                answer = self._verified(rows, high, at, k)
                # What is not proven is found again; a GPU need not wait to know it.
                found.scores[rows], found.index[rows] = answer.scores, answer.index
                found.proven[rows] = answer.proven
            some = some[~found.proven[some]]
            if not len(some):
                break
        return some

    def _nearest(self, coded: FineCodes, depth: int) -> TopK:
        """The `depth` rows with the largest bounds, over all parts."""
        best = None
        for part, start in zip(self.codes, self.starts, strict=False):
            mask = None if self.mask is None else self.mask[start : start + len(part.scale)]
            kept = min(depth, len(part.scale))
            floor = None if best is None or best.scores.shape[1] < depth else best.scores[:, -1]
            bounds, index = registered.nearest_codes(*coded, *part, mask, floor, kept, self.backend)
            index = torch.where(index < 0, index, index + start)
            best = _merged(best, TopK(bounds, index), depth)
        assert best is not None
        return best

    def _verified(self, pending: Tensor, bounds: Tensor, index: Tensor, k: int) -> _Answers:
        """Scores of the proposals as far as they matter.

        `proven` is where nothing else can be among the k best: all rows were proposed, or the least
        bound does not reach the k-th best score.
        """
        query, first = self.query[pending], index.shape[1]
        if self.pace.in_two:
            first = max(_READ, _READ_A_RESULT * k)
        near = index[:, :first].unique()
        found, read = self._scored(query, near, k)
        if first < index.shape[1]:
            reach = bounds >= found.scores[:, -1:]
            more = torch.cat([near, index[:, first:][reach[:, first:]]]).unique()
            if len(more) > len(near):
                found, read = self._scored(query, more, k)
        self.read += read
        last = bounds[:, -1]
        whole = index.shape[1] == self.live
        proven = (index[:, -1] >= 0) & ((last < found.scores[:, -1]) | whole)
        return _Answers(*found, proven)

    def _scored(self, query: Tensor, rows: Tensor, k: int) -> tuple[TopK, int]:
        """The k best of some rows, which come ascending behind -1 for none; how many were read."""
        best, read = None, 0
        for block in rows.split(self._block_rows()):
            taken, there = self._take(block)
            best = _merged(best, self._best(query, taken, there, k), k)
            read += len(there)
        assert best is not None
        return best, read

    def _best(self, query: Tensor, taken: Tensor, rows: Tensor, k: int) -> TopK:
        """The k best of what was taken: `rows` of the corpus."""
        some = query.split(self.pace.alike)
        found = [registered_topk(x, taken, k, "cosine", self.backend) for x in some]
        scores, index = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        return TopK(scores, rows[index])

    def _plain(self, pending: Tensor, k: int) -> TopK:
        """The k best of all rows, read block by block."""
        query, best = self.query[pending], None
        for part, start in zip(self.parts, self.starts, strict=False):
            for first in range(0, len(part), self._block_rows()):
                block = part[first : first + self._block_rows()]
                rows = torch.arange(start + first, start + first + len(block), device=block.device)
                if self.mask is not None:
                    allowed = self.mask[start + first : start + first + len(block)]
                    block, rows = block[allowed], rows[allowed]
                self.read += len(block)
                best = _merged(best, self._best(query, block.to(query.dtype), rows, k), k)
        assert best is not None
        return best

    def _take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the corpus, ascending, as wide as the query; which they are, without -1."""
        edges = torch.searchsorted(rows, self.edges).tolist()
        taken = [
            part[rows[low:high] - start]
            for part, start, low, high in zip(
                self.parts, self.starts, edges[:-1], edges[1:], strict=False
            )
            if low < high
        ]
        dense = taken[0] if len(taken) == 1 else torch.cat(taken)
        return dense.to(self.query.dtype), rows[edges[0] :]

    def _block_rows(self) -> int:
        return max(1, self.pace.block_bytes // (self.query.shape[1] * self.query.element_size()))


def _merged(best: TopK | None, found: TopK, k: int) -> TopK:
    """The k best of two answers, of which the second's rows come after the first's."""
    if best is None:
        return found
    scores, index = (torch.cat(x, 1) for x in zip(best, found, strict=True))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return TopK(scores[:, :k], index.gather(1, order[:, :k]))
