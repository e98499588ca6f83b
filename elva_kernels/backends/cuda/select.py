"""The choice of the best scores of each row, by the CUDA kernel."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.backends.boundary import pointer
from elva_kernels.backends.cuda import launch


def takes(k: int) -> bool:
    """Whether the kernel chooses that many."""
    return 0 < k <= int(launch.module().CUDA_SELECT_MOST)


class Factors(NamedTuple):
    """What makes scores of products: see ElvaSelectArgs in csrc/elva.h."""

    row: Tensor  # float32 [R]
    column: Tensor  # float32 [P]
    limit: float = math.inf  # of a score's magnitude
    unit_columns: bool = False


class Best:
    """The k best of each of R rows, as `gpu.topk.best_of`; scores come some columns at a time.

    Args:
        op: for messages.
        scores, index: float32 and int64 [R, k], dense, which are filled in.
        finite: an index is -1 where its score is -inf.
    """

    def __init__(self, op: str, scores: Tensor, index: Tensor, *, finite: bool = False) -> None:
        self.op, self.scores, self.index, self.finite = op, scores, index, finite
        self.seen = 0

    def add(self, scores: Tensor, first: int = 0, factors: Factors | None = None) -> None:
        """Scores float32 [R, P] of the columns from `first` on, dense, after all earlier ones."""
        rows, columns = scores.shape
        k = self.scores.shape[1]
        module = launch.module()
        size = module.cuda_select_scratch_bytes(rows, columns, k)
        scratch = self.scores.new_empty(size, dtype=torch.uint8) if size else None
        row, column, limit, unit_columns = factors or (None, None, math.inf, False)
        launch.call(
            self.op,
            module.cuda_select,
            *launch.place(scores),
            rows,
            columns,
            scores.stride(0),
            k,
            scores.data_ptr(),
            pointer(row),
            pointer(column),
            limit,
            unit_columns,
            first,
            min(k, self.seen),
            self.finite,
            pointer(scratch),
            self.scores.data_ptr(),
            self.index.data_ptr(),
        )
        self.seen += columns
