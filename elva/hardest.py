"""Negatives out of a pool: the rows most similar to each query that are no answer to it, and rows
drawn at random.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: drop the candidates whose similarity exceeds a
threshold, keep the top 50 of what remains. Differs from the paper, which does not mention copies:
a copy of a right answer is a right answer, and a copy of a harder negative is no second one.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import elva_kernels
from elva.draws import Seed, uniforms
from elva.index.exact import Found, Stack, merge

BLOCK_MB = 64
"""Ours: what of the pool is widened to the query's fp32 at a time."""

SPARE = 14
"""Ours: rows asked for beyond those wanted, in place of copies; more where it was not enough."""

ANSWERS = 1 << 22
"""Ours: answers of one pass over the pool at most, queries times depth."""

QUERIES = 1024
"""Ours: queries whose answers are told apart together."""

Identities = Callable[[np.ndarray], np.ndarray]
"""Rows -> int64, a number a row; equal numbers are the same answer, whatever its id."""


@dataclass(frozen=True)
class Mined(Found):
    """What `hardest` gives; places for which no row is left hold score -inf and row -1."""

    copies: Tensor  # [Q] int64, rows that came up and were left out for their content


def hardest(
    query: Tensor,
    parts: Sequence[Tensor],
    right: Sequence[Sequence[int]],
    *,
    k: int,
    max_score: float | Tensor | None = None,
    identities: Identities | None = None,
    progress: Callable[[int], None] | None = None,
) -> Mined:
    """The k most similar rows of each query that are neither right answers nor copies.

    Args:
        query: [Q, D] fp32.
        parts: [n, D] each, in one dtype, mapped or not; row numbers run on from one to the next.
        right: rows of each query's right answers, possibly none.
        k: rows a query.
        max_score: cosine similarity above which a row is taken for a right answer: one for all, or
            [Q], one a query. None: no limit.
        identities: content of rows, asked for the right answers and for rows that came up. A row
            of a right answer's content is left out; of rows of one content the first stays. None:
            all differ.
        progress: called after each block with the rows that this pass has read.

    Returns:
        Mined: scores [Q, k] fp32 and rows [Q, k] int64, score descending, then row ascending. What
        is held grows with Q * k and with a block, never with the pool.
    """
    stack = Stack(parts)
    limit = torch.as_tensor(torch.inf if max_score is None else max_score, dtype=torch.float64)
    limit = limit.to(query.device).expand(len(query))
    scores = query.new_full((len(query), k), -torch.inf)
    rows = torch.full((len(query), k), -1, dtype=torch.int64, device=query.device)
    copies = rows.new_zeros(len(query))
    spare = 0 if identities is None and not isinstance(max_score, Tensor) else SPARE
    pending, depth = torch.arange(len(query), device=query.device), k + spare
    while k and len(pending):
        left = []
        for some in pending.split(max(1, ANSWERS // depth)):
            answers = [right[i] for i in some.tolist()]
            found = _nearest(query[some], stack, answers, depth, float(limit[some].max()), progress)
            kept = (found.rows >= 0) & (found.scores <= limit[some, None])
            if identities is not None:
                first = _first_of_content(found.rows, answers, identities)
                copies[some] = (kept & ~first).sum(1)
                kept &= first
            scores[some], rows[some] = _leading(found, kept, k)
            # A list with room left, or as long as the pool, holds all that there is.
            whole = (found.rows < 0).any(1) | (depth >= len(stack))
            left.append(some[~whole & (rows[some, -1] < 0)])
        pending, depth = torch.cat(left), 4 * depth
        # Queries of like limits share a pass, which leaves out what is above the highest of them.
        pending = pending[limit[pending].sort().indices]
    return Mined(scores, rows, copies)


def _nearest(
    query: Tensor,
    stack: Stack,
    right: Sequence[Sequence[int]],
    k: int,
    max_score: float,
    progress: Callable[[int], None] | None,
) -> Found:
    """The k most similar rows that are no right answers, in one pass over the pool."""
    nobody = torch.full((len(query), 1), -1, device=query.device)
    asked = np.repeat(np.arange(len(right)), [len(rows) for rows in right])
    answer = np.fromiter((row for rows in right for row in rows), np.int64, len(asked))
    order = np.lexsort((asked, answer))
    asked, answer = asked[order], answer[order]
    found = merge([], len(query), k)
    found = Found(found.scores.to(query), found.rows.to(query.device))
    for start, block in _blocks(stack, query):
        first, last = np.searchsorted(answer, [start, start + len(block)])
        pairs = np.stack([asked[first:last], answer[first:last] - start], 1)
        out = elva_kernels.rank_statistics(
            query,
            block,
            nobody,
            k=k,
            max_score=None if max_score == torch.inf else max_score,
            excluded=torch.from_numpy(pairs).to(query.device),
        )
        rows = torch.where(out.topk_index < 0, -1, out.topk_index + start)
        found = merge([found, Found(out.topk_scores, rows)], len(query), k)
        if progress is not None:
            progress(start + len(block))
    return found


def _blocks(stack: Stack, query: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in the query's dtype), where they lie if that is theirs."""
    size = max(1, (BLOCK_MB << 20) // (query.shape[1] * query.element_size()))
    for part, start in zip(stack.parts, stack.starts.tolist(), strict=False):
        for first in range(0, len(part), size):
            yield start + first, part[first : first + size].to(query)


def _first_of_content(
    rows: Tensor, right: Sequence[Sequence[int]], identities: Identities
) -> Tensor:
    """[Q, n] whether no right answer and no row before it has a row's content."""
    first = torch.ones_like(rows, dtype=torch.bool)
    for start in range(0, len(rows), QUERIES):
        some = right[start : start + QUERIES]
        width = max(map(len, some))
        # The right answers stand before all others: what equals them comes second.
        lists = np.array([[*r, *[-1] * (width - len(r))] for r in some], np.int64)
        lists = np.concatenate([lists, rows[start : start + QUERIES].cpu().numpy()], 1)
        known, place = np.unique(lists, return_inverse=True)
        content = np.full(len(known), -1)
        content[known >= 0] = np.unique(identities(known[known >= 0]), return_inverse=True)[1]
        ordered = torch.from_numpy(content[place].reshape(lists.shape)).sort(dim=1, stable=True)
        again = torch.zeros(lists.shape, dtype=torch.bool)
        equal = ordered.values[:, 1:] == ordered.values[:, :-1]
        again.scatter_(1, ordered.indices[:, 1:], equal)
        first[start : start + QUERIES] = ~again[:, width:].to(rows.device)
    return first


def _leading(found: Found, kept: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and rows [Q, k] of the first k that are kept, then -inf and -1."""
    order = (~kept).to(torch.int8).sort(dim=1, stable=True).indices[:, :k]
    there = kept.gather(1, order)
    scores = found.scores.gather(1, order).where(there, -torch.inf)
    rows = found.rows.gather(1, order).where(there, -1)
    short = (0, k - order.shape[1])
    return (
        torch.nn.functional.pad(scores, short, value=-torch.inf),
        torch.nn.functional.pad(rows, short, value=-1),
    )


def at_random(
    span: tuple[int, int], taken: Collection[int], count: int, identities: Identities, seed: Seed
) -> list[int]:
    """Rows drawn evenly from a pool: none of those taken, no content of theirs, none twice.

    Args:
        span: first row and one beyond the last.
        taken: rows of the right answers and of the negatives that are chosen already.
        count: fewer where the pool has no more.
        identities: called for as many rows as are wanted, not for all that are drawn.
        seed: the draw is a pure function of it.
    """
    first, size = span[0], span[1] - span[0]
    left = set(taken)
    seen = set(identities(np.array(sorted(taken), np.int64)).tolist()) if count else set()
    found: list[int] = []
    tries = itertools.count()
    while len(found) < count and len(left) < size:
        draws = (uniforms((*seed, next(tries)), (2 * count + 8,)) * size).long() + first
        fresh = [row for row in dict.fromkeys(draws.tolist()) if row not in left]
        while fresh and len(found) < count:
            some, fresh = fresh[: count - len(found)], fresh[count - len(found) :]
            left.update(some)
            for row, identity in zip(some, identities(np.array(some)).tolist(), strict=True):
                if identity not in seen:
                    seen.add(identity)
                    found.append(row)
    return found
