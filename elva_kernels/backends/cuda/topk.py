"""Exact search by the CUDA kernels: scores by ours, the choice among them by torch."""

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, METRIC_CODES, operand
from elva_kernels.backends.cuda import launch
from elva_kernels.backends.gpu.topk import search
from elva_kernels.backends.launcher import Tensors

_WORKSPACE_BYTES = 256 << 20  # of scores that a search holds at once; ours


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> Tensors:
    """Scores and indices [Q, min(k, P)] of query [Q, D] and corpus [P, D]."""
    q, dim = query.shape
    code = DTYPE_CODES[query.dtype]
    step = max(1, _WORKSPACE_BYTES // (4 * max(1, q)))
    size = launch.module().cuda_topk_scratch_bytes(code, q, min(step, len(corpus)), dim)
    scratch = query.new_empty(size, dtype=torch.uint8)

    def scores_of(rows: Tensor) -> Tensor:
        scores = query.new_empty((q, len(rows)), dtype=torch.float32)
        launch.call(
            "topk",
            launch.module().cuda_topk_scores,
            code,
            *launch.place(query),
            METRIC_CODES[metric],
            q,
            len(rows),
            dim,
            operand(query),
            operand(rows),
            scratch.data_ptr(),
            scores.data_ptr(),
        )
        return scores

    return search(query, corpus, k, step, scores_of)
