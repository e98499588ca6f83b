"""How far a result may be from the float64 truth: the one table of tolerances.

The figures are the kernels' contract, never widened to let a backend pass.
"""

import torch

# |score - float64 truth|, any finite input up to D = 8192. float64 inputs compute in float64.
SCORE = {
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
    torch.float32: 1e-6,
    torch.float64: 1e-13,
}

# The same where a matrix product accumulates: scores of a batch.
BATCH = SCORE | {torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.float32: 1e-5}

# |gradient - float64 truth| * |row|, beside half an ulp of the dtype that stores the gradient. With
# soft ranks colder than the suite's 0.05, whose slopes grow as 1 / rank_temperature, it is relative
# to 1 + 1 / rank_temperature.
GRADIENT = {
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
    torch.float32: 2e-6,
    torch.float64: 1e-13,
}

# A backend's error may be twice the error of the reference in the same dtype, and this much more.
BASELINE_SLACK = {
    torch.bfloat16: 2e-7,
    torch.float16: 2e-7,
    torch.float32: 2e-7,
    torch.float64: 1e-15,
}

# |reward - the same formula in float64 on the returned scores|, relative to 1 + the sum of the
# absolute weights of the scores.
REWARD = {torch.float32: 2e-7, torch.float64: 1e-15}

# A rank may differ from the float64 one only between scores that are closer than this.
RANK_GAP = 2e-6


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours of `values` in `dtype`, subnormals included."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    return (values.abs() * info.eps).clamp(min=smallest) / 2
