"""What may be asked of an index."""

import operator
from typing import Any

import torch
from torch import Tensor

from elva.errors import IndexFault
from elva.index import scale
from elva.settings import shown


def checked(query: Any, k: Any, dim: int) -> tuple[Tensor, int]:
    """The query as [Q, dim] fp32 on the CPU, and k.

    Raises:
        IndexFault: no such matrix of finite floats, or a k below 1.
    """
    if not isinstance(query, Tensor):
        raise IndexFault(
            f"search: query must be a tensor [Q, {dim}], got a {type(query).__name__}; "
            "embed it with the index's model"
        )
    if query.ndim != 2 or query.shape[1] != dim or not query.is_floating_point():
        raise IndexFault(
            f"search: query must be [Q, {dim}] of floats, got {tuple(query.shape)} of "
            f"{query.dtype}; embed it with the index's model"
        )
    if isinstance(k, bool) or not hasattr(k, "__index__") or operator.index(k) < 1:
        raise IndexFault(f"search: k must be at least 1, got {shown(k)}; ask for 10")
    query = scale.rounded(query, torch.float32)
    finite = query.isfinite().all(1)
    if not bool(finite.all()):
        raise IndexFault(
            "search: query must be finite, got NaN or infinity in row "
            f"{int((~finite).int().argmax())}; mend the model"
        )
    return query, operator.index(k)
