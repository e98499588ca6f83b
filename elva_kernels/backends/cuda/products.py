"""Products of matrices for the in-batch ops, in float32 whatever a process has set."""

import functools

import torch
from torch import Tensor

from elva_kernels.backends.boundary import operand
from elva_kernels.backends.cuda import launch

# What `torch.backends.cuda.matmul.allow_fp16_accumulation` looks up; not in every torch. Where it
# is set, torch refuses products of float16 in float32.
sums_in_float16 = getattr(torch._C, "_get_cublas_allow_fp16_accumulation", lambda: False)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out [m, n] = a [m, k] b [k, n], or += it; rows of `out` are dense."""
    # Sums in float16, which torch may be told to make, would overflow.
    if a.dtype == torch.float32 or sums_in_float16():
        float_product(a.float(), b.float(), out, add=add)
    else:
        half_product(a, b, out, add=add)


def float_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Of float32 by our kernel: torch's depends on the switches of its precision."""
    launch.call(
        "in-batch op",
        launch.module().cuda_matrix_product,
        *launch.place(out),
        len(a),
        b.shape[1],
        len(b),
        operand(a),
        operand(b),
        out.data_ptr(),
        out.stride(0),
        add,
    )


def half_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Of half precision by torch; autocast leaves alone what writes to `out`."""
    if not add:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _adds_in_float32(out.device):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32, out=torch.empty_like(out))


@functools.cache
def _adds_in_float32(device: torch.device) -> bool:
    """Whether torch adds products of halves to floats; some versions of it refuse."""
    half, total = (torch.zeros(8, 8, dtype=x, device=device) for x in (torch.half, torch.float))
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
