"""Which places of an index name a row: what a sorted sum over a row's occurrences starts from."""

import torch
from torch import Tensor


def occurrences(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The flat positions of `index` (int64, any shape; < 0: of no row) in the order of their rows.

    Returns:
        order: int64 [L], the positions sorted stably by row, those of no row first.
        first: int64 [rows + 1]; row r's positions are order[first[r]:first[r + 1]].
    """
    found, order = index.flatten().sort(stable=True)
    bounds = torch.arange(rows + 1, device=index.device)
    return order, torch.searchsorted(found, bounds)
