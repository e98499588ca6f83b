"""Exact search by the CUDA kernels: scores by ours, or of torch's products; the choice by ours."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, METRIC_CODES, operand, pointer
from elva_kernels.backends.cuda import launch, products
from elva_kernels.backends.cuda.select import Best, Factors, takes
from elva_kernels.backends.gpu.topk import search
from elva_kernels.backends.launcher import Tensors

_WORKSPACE_BYTES = 256 << 20  # of scores that a search holds at once; ours
_COPIED_BYTES = 512 << 20  # of rows, where they have to be copied to be multiplied; ours
_QUERIES = 4096  # at a time, so that chunks of the corpus stay large; ours
# Beyond it, in half precision, torch's products take less time than groups of 64 queries, although
# the corpus is read once more for its norms; by arithmetic for an H200.
_SCAN_QUERIES = 128
# Torch's products are fastest, and all of one kind, where rows lie on 16 bytes and results on 256.
_DEPTH, _ROWS = 8, 64


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> Tensors:
    """Scores and indices [Q, min(k, P)] of query [Q, D] and corpus [P, D]."""
    q, p = len(query), len(corpus)
    k = min(k, p)
    if q > 0 and k > 0 and not takes(k):
        by_scan = _Search(query, corpus, metric)
        return search(query, p, k, by_scan.scanned_rows, by_scan.scores_of)
    scores = query.new_empty((q, k), dtype=torch.float32)
    index = query.new_empty((q, k), dtype=torch.int64)
    if q == 0 or k == 0:
        return scores, index
    size = -(-q // -(-q // _QUERIES))
    for first in range(0, q, size):
        some = slice(first, first + size) if size < q else slice(None)
        found = Best("topk", scores[some], index[some])
        _Search(query[some], corpus, metric).into(found)
    return scores, index


class _Search:
    """Some queries, and the corpus that they look through."""

    def __init__(self, query: Tensor, corpus: Tensor, metric: str) -> None:
        self.query, self.corpus, self.metric = query, corpus, metric
        size, self.padded_dim = launch.module().cuda_topk_scratch(
            DTYPE_CODES[query.dtype], *query.shape
        )
        self.scratch = query.new_empty(size, dtype=torch.uint8)

    def into(self, found: Best) -> None:
        many = len(self.query) > _SCAN_QUERIES and self.query.dtype != torch.float32
        if many and not products.sums_in_float16():
            self.multiply(found)
        else:
            self.scan(found)

    @property
    def scanned_rows(self) -> int:
        """Whose scores the workspace holds."""
        return max(1, _WORKSPACE_BYTES // (4 * len(self.query)))

    def scan(self, found: Best) -> None:
        p, step = len(self.corpus), self.scanned_rows
        for first in range(0, p, step):
            found.add(self.scores_of(slice(first, first + step)), first)

    def scores_of(self, some: slice) -> Tensor:
        rows = self.corpus[some]
        scores = self.query.new_empty((len(self.query), len(rows)), dtype=torch.float32)
        self.call(launch.module().cuda_topk_scores, rows, scores, None, None)
        return scores

    def multiply(self, found: Best) -> None:
        """Every product has one shape, so that copies of a row tie: the last rows come again."""
        q, p, step = len(self.query), len(self.corpus), self.multiplied_rows
        row, column = (self.query.new_empty(n, dtype=torch.float32) for n in (q, p))
        self.call(launch.module().cuda_topk_factors, self.corpus, None, row, column)
        scaled = self.scratch.view(self.query.dtype).as_strided(
            (q, self.query.shape[1] + self.padding), (self.padded_dim, 1)
        )
        kind = (1.0, False) if self.metric == "cosine" else (math.inf, True)
        for first in range(0, p, step):
            start = min(first, p - step)
            rows = self.corpus[start : start + step]
            scores = self.query.new_empty((q, len(rows)), dtype=torch.float32)
            products.half_product(scaled, self.dense(rows).T, scores)
            self.call(launch.module().cuda_topk_far, rows, scores, None, column[start:])
            factors = Factors(row, column[first:], *kind)
            found.add(scores[:, first - start :], first, factors)
            del scores  # before the next

    @property
    def multiplied_rows(self) -> int:
        """At a time: what the workspace holds, and so that few rows are in two chunks."""
        p, dim = self.corpus.shape
        copied = _COPIED_BYTES // (self.corpus.element_size() * dim)
        most = max(_ROWS, min(self.scanned_rows, copied) // _ROWS * _ROWS)
        chunks = -(-p // most)
        if chunks == 1 and p % _ROWS:
            chunks = 2
        return min(p, -(-p // chunks // _ROWS) * _ROWS)

    @property
    def padding(self) -> int:
        """Columns of zeros behind those of rows that are multiplied."""
        return -self.query.shape[1] % _DEPTH

    def dense(self, rows: Tensor) -> Tensor:
        """Rows one after the other on 16 bytes, padded by zeros; copies where they are not."""
        n, dim = rows.shape
        if not self.padding and rows.is_contiguous() and rows.data_ptr() % 16 == 0:
            return rows
        copies = rows.new_empty((n, dim + self.padding))
        copies[:, :dim], copies[:, dim:] = rows, 0
        return copies

    def call(self, function: Callable[..., None], rows: Tensor, *results: Tensor | None) -> None:
        """A function of csrc/cuda/topk.cu: into scores, row factors and column factors."""
        q, dim = self.query.shape
        launch.call(
            "topk",
            function,
            DTYPE_CODES[self.query.dtype],
            *launch.place(self.query),
            METRIC_CODES[self.metric],
            q,
            len(rows),
            dim,
            operand(self.query),
            operand(rows),
            self.scratch.data_ptr(),
            *map(pointer, results),
        )
