"""Rows of embeddings and their norms, and what every equation's gradient starts from."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and rewards for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(rows: Tensor) -> Tensor:
    """`rows` over their norms; a zero row stays zero and gets 0 times the gradient that reaches it:
    NaN, as the others, in a group that is not finite."""
    rows, _ = scaled(rows)
    square = (rows * rows).sum(-1, keepdim=True)
    zero = square == 0
    units = rows / torch.where(zero, 1.0, square).sqrt()
    return torch.where(zero, 0.0 * rows + 0.0, units)


def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` times 2^-exponent, so that squares neither overflow nor vanish, and the exponents."""
    rows = rows.to(compute_dtype(rows.dtype)).contiguous()
    exponent = torch.frexp(rows.detach().abs().amax(-1, keepdim=True)).exponent
    return times_power(rows, -exponent), exponent


def times_power(rows: Tensor, exponent: Tensor) -> Tensor:
    """`rows` times 2^exponent, of each row.

    In two steps, since the power itself may lie outside the dtype's range (subnormal rows).
    """
    first = exponent // 2
    for step in (first, exponent - first):
        rows = rows * torch.exp2(step.to(rows.dtype))
    return rows


def leaf(tensor: Tensor) -> Tensor:
    """A tensor that autograd can start from; one made in inference mode has to be copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
