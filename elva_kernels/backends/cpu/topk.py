"""Exact search on the CPU."""

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, METRIC_CODES, module, operand
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import compute_dtype


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> Tensors:
    """Scores and indices [Q, min(k, P)] of query [Q, D] and corpus [P, D]."""
    kept = min(k, corpus.shape[0])
    scores = torch.empty(query.shape[0], kept, dtype=compute_dtype(query.dtype))
    index = torch.empty(query.shape[0], kept, dtype=torch.int64)
    module().topk(
        DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
        METRIC_CODES[metric],
        query.shape[0],
        corpus.shape[0],
        query.shape[1],
        kept,
        operand(query),
        operand(corpus),
        scores.data_ptr(),
        index.data_ptr(),
    )
    return scores, index
