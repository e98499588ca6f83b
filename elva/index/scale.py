"""Rows brought into a number format's range by powers of two, which a cosine does not see.

A row of 1e-7 rounds to noise in float16, one of 1e-300 to zero in float32, one of 1e6 to infinity.
Multiplied by the power of two that brings its largest number to 1, it keeps every bit that the
format has. Rows that lie well inside the range are left as they are.
"""

import numpy as np
import torch
from torch import Tensor

KEPT = {torch.float16: (2.0**-8, 2.0**15)}
"""A row's largest number within which it is left alone: float16 has 10 bits down to 2**-14, so one
of 2**-8 loses under 2**-17 of its length in the numbers that are smaller still."""
_KEPT_WIDE = (2.0**-100, 2.0**100)


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, D] of `dtype` on the CPU, contiguous: each row times a power of two, rounded once.

    Args:
        rows: [n, D] of floats; a row with NaN or infinity is only rounded.
    """
    rows = rows.detach().to("cpu")
    if rows.dtype != torch.float64:
        rows = rows.float()
    if rows.numel():
        low, high = KEPT.get(dtype, _KEPT_WIDE)
        smallest, largest = rows.aminmax(dim=1)
        size = torch.maximum(-smallest, largest)
        outside = (size > 0) & ((size < low) | (size > high)) & size.isfinite()
        if bool(outside.any()):
            exponents = np.frexp(size[outside].double().numpy())[1]
            fitted = np.ldexp(rows[outside].double().numpy(), 1 - exponents[:, None])
            rows = rows.clone()
            rows[outside] = torch.from_numpy(fitted).to(rows.dtype)
    return rows.to(dtype).contiguous()
