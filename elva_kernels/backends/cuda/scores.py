"""The in-batch ops' scores by the CUDA kernels: unit rows, products, statistics, losses.

Rows in half precision are kept in float16, as a power of two brings their norms near one another.
Only their products are kept of scores: each kernel that needs scores makes them once more.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, operand, pointer
from elva_kernels.backends.cuda import launch, select
from elva_kernels.backends.cuda.products import multiply
from elva_kernels.backends.gpu.in_batch import GpuSteps
from elva_kernels.backends.steps import Sums, Units, some

OP = "in-batch op"  # for messages
_ROW_PADDING = 16


class CudaScores(GpuSteps):
    """Units have float32 inverse norms as `scale`, NaN for bad rows, and exponents as `norm`."""

    masked = math.nan  # a product

    def __init__(self, query: Tensor, candidates: Tensor, *arguments: Any, **named: Any) -> None:
        self.place = launch.place(query)
        super().__init__(query, candidates, *arguments, **named)
        self.has_columns = False  # whether `columns` are sums of anything
        # Losses and eq. 11 of the queries, once `finish` has been there.
        self.losses: Tensor | None = None
        self.found: Tensor | None = None

    def new_statistics(self) -> None:
        super().new_statistics()
        self.rank = torch.empty_like(self.n_greater)

    def width_of(self, m: int) -> int:
        return -(-max(m, 1) // _ROW_PADDING) * _ROW_PADDING

    def call(self, name: str, *arguments: Any) -> None:
        """A CUDA function that begins with where it runs."""
        launch.call(OP, getattr(launch.module(), name), *self.place, *arguments)

    def units_of_both(self, query: Tensor, candidates: Tensor) -> tuple[Units, Units]:
        both = self.empty_units(query), self.empty_units(candidates)
        operands: list[Any] = []
        for rows, units in zip((query, candidates), both, strict=True):
            operands += (rows.shape[0], operand(rows), units.rows.data_ptr())
            operands += (pointer(units.scale), units.norm.data_ptr())
        launch.call(
            OP,
            launch.module().cuda_unit_rows,
            DTYPE_CODES[query.dtype],
            *self.place,
            query.shape[1],
            *operands,
        )
        return both

    def empty_units(self, rows: Tensor) -> Units:
        r, d = rows.shape
        dtype = torch.float32 if rows.dtype == torch.float32 else torch.float16
        unit, exponent = self.empty((r, d), dtype), self.empty((r,), torch.int32)
        return Units(unit, exponent, self.empty((self.width_of(r),), torch.float32))

    def exact(self, temperature: Tensor) -> Tensor:
        return temperature.double()  # kernels make NaN of one that is not above 0

    def new_workspace(self, rows: int) -> Tensor:
        return self.empty((rows, self.width), torch.float32)

    def multiply_rows(self, query: Units, scores: Tensor) -> None:
        multiply(query.rows, self.candidates.rows.T, self.of_candidates(scores))

    def of_candidates(self, matrix: Tensor) -> Tensor:
        """Without the padding of its rows."""
        m = self.n_candidates
        return matrix if matrix.shape[-1] == m else matrix[..., :m]

    def keep_best(self, scores: Tensor, rows: slice) -> None:
        if not select.takes(self.k):
            super().keep_best(scores, rows)
            return
        best = select.Best(
            OP, some(self.topk_scores, rows), some(self.topk_index, rows), finite=True
        )
        best.add(self.of_candidates(scores))

    def score_rows(self, scores: Tensor, rows: slice) -> None:
        sums = (0, 0)
        if self.temperature is not None:
            sums = (address(self.total, rows), address(self.moment, rows))
        self.call(
            "cuda_score_rows",
            scores.shape[0],
            self.n_candidates,
            self.width,
            scores.data_ptr(),
            self.k > 0,
            address(self.query.scale, rows),
            pointer(self.candidates.scale),
            address(self.batch.target, rows),
            self.batch.target.shape[1],
            *self.skipped_operands(rows),
            self.max_score,
            pointer(self.temperature),
            address(self.rank, rows),
            address(self.n_greater, rows),
            address(self.n_equal, rows),
            address(self.target_score, rows),
            address(self.hardest_score, rows),
            address(self.hardest_index, rows),
            *sums,
        )
        self.keep_best(scores, rows)

    @property
    def max_score(self) -> float:
        return math.inf if self.batch.max_score is None else self.batch.max_score

    def skipped_operands(self, rows: slice) -> tuple[int, int, int, int]:
        """What `cuda_score_rows` takes for the candidates that some queries skip."""
        if self.skipped is None:
            return 0, 0, 0, 0
        index, first, last = self.skipped
        return index.data_ptr(), address(first, rows), address(last, rows), first.shape[1]

    def add_terms(self, rows: slice) -> None:
        """`finish` does."""

    @functools.cached_property
    def columns(self) -> Sums:
        total, moment = (self.empty((self.width,), torch.float64) for _ in range(2))
        return Sums(self.empty((self.width,), torch.float32), total, moment)

    def column_sums(self, scores: Tensor, rows: slice) -> None:
        size = launch.module().cuda_column_scratch_bytes(*scores.shape)
        scratch = self.empty((size,), torch.uint8)
        self.call(
            "cuda_column_sums",
            scores.shape[0],
            self.width,
            scores.data_ptr(),
            address(self.query.scale, rows),
            pointer(self.candidates.scale),
            self.max_score,
            pointer(self.temperature),
            not self.has_columns,
            *(x.data_ptr() for x in self.columns),
            scratch.data_ptr(),
        )
        self.has_columns = True

    def end_columns(self) -> None:
        """`finish` does."""

    def ranks(self) -> Tensor:
        return self.rank

    def loss(self, symmetric: bool) -> Tensor:
        if self.losses is None:
            self.losses = torch.empty_like(self.hardest_score)
            self.finish(slice(None), symmetric)
        return self.losses

    def logsumexp(self) -> Tensor | None:
        if self.temperature is not None and self.found is None:
            self.finish(slice(None), False)
        return self.found

    def finish(self, rows: slice, symmetric: bool, *slopes: int) -> None:
        """What `cuda_info_nce_pairs` makes of the sums of some queries.

        Args:
            slopes: addresses of a weight and of what becomes of it.
        """
        if self.found is None:
            self.found = torch.empty_like(self.hardest_score)
        columns = [x.data_ptr() for x in self.columns] if symmetric else (0, 0, 0)
        target = some(self.batch.target, rows)
        self.call(
            "cuda_info_nce_pairs",
            *target.shape,
            target.data_ptr(),
            address(self.target_score, rows),
            address(self.hardest_score, rows),
            address(self.total, rows),
            address(self.moment, rows),
            *columns,
            pointer(self.temperature),
            address(self.found, rows),
            0 if self.losses is None else address(self.losses, rows),
            *(slopes or (0,) * 5),
        )


def address(x: Tensor | None, rows: slice) -> int:
    """The address of x[rows], dense."""
    assert x is not None
    first = rows.start or 0
    return x.data_ptr() + first * x.stride(0) * x.element_size() if first else x.data_ptr()
