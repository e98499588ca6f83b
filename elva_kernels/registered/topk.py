"""Search as torch knows it."""

import torch
from torch import Tensor

from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import compute_dtype
from elva_kernels.registered import batched
from elva_kernels.registered.library import Registered, register


def _topk(query: Tensor, corpus: Tensor, k: int, metric: str, backend: str) -> Tensors:
    launch = launcher("topk", backend, query.device, query.dtype)
    found: Tensors = launch(query, corpus, k, metric=metric)
    return found


def _trace_topk(query: Tensor, corpus: Tensor, k: int, *_: object) -> Tensors:
    shape = (query.shape[0], torch.sym_min(k, corpus.shape[0]))
    scores = query.new_empty(shape, dtype=compute_dtype(query.dtype))
    return scores, query.new_empty(shape, dtype=torch.int64)


_OPS = register(
    {
        "topk": Registered(
            "(Tensor query, Tensor corpus, SymInt k, str metric, str backend) "
            "-> (Tensor scores, Tensor index)",
            _topk,
            _trace_topk,
            batched.search,
        ),
    }
)

topk = _OPS.topk.default
