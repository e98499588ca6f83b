"""Exact search, as users call it."""

import torch
from torch import Tensor

from elva_kernels import checks
from elva_kernels.reference import TopK
from elva_kernels.registered import topk as registered


def topk(
    query: Tensor,
    corpus: Tensor,
    k: int,
    *,
    metric: str = "cosine",
    backend: str = "auto",
) -> TopK:
    """The k corpus rows that score highest for each query: exact, in one pass over the corpus.

    With the score ``s = q . c / (|q| |c|)`` ("cosine") or ``s = q . c`` ("dot"), rows come by score
    descending, then by index ascending: a total order, so that copies of a row come in the order
    in which the corpus holds them, on every backend and any number of threads. A score's bits
    depend on its query and its row alone; but on "cuda" in half precision, where torch multiplies
    more than 128 queries, also on how many queries and rows there are.

    Args:
        query: [Q, D], bfloat16, float16, float32 or float64, of any strides; Q may be 0.
        corpus: [P, D], in query's dtype and on its device, of any strides; P may be 0. It is read
            where it lies, block by block, and never copied whole or written: it may be a memory map
            larger than memory (`torch.from_file`, or `torch.from_numpy` of a read-only
            `numpy.memmap`).
        k: >= 0, rows a query; more than P gives P.
        metric: "cosine", for rows of any finite magnitude, or "dot".
        backend: "auto", or a name out of `available_backends()`, which is used or raises.

    Returns:
        TopK: `scores` [Q, min(k, P)] in float32, or float64 for float64 inputs, and `index` int64
        of the same shape. A cosine lies in [-1, 1] and within 1e-5 of the float64 truth (about 1e-7
        as a rule), a dot within 1e-5 |q| |c|; a dot beyond float32's range is inf. A zero row or
        query scores 0. NaN is never returned: a row that holds NaN or inf scores -inf, behind all
        other rows, and so does every row for such a query.

    Raises:
        ValueError: a shape, device, layout or number out of its range.
        TypeError: a dtype, or an argument of another type.
        BackendUnavailable: the named backend cannot run here.

    Differentiable: no; the results are detached.

    Equivalent to::

        scores = F.normalize(query.float(), dim=-1) @ F.normalize(corpus.float(), dim=-1).T
        scores, index = scores.sort(dim=-1, descending=True, stable=True)
        scores, index = scores[:, :k], index[:, :k]
    """
    k = checks.search("topk", query, corpus, k, metric, backend)
    with torch.no_grad():
        return TopK(*registered.topk(query, corpus, k, metric, backend))
