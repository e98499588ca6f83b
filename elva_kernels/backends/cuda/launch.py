"""Calls of the CUDA functions of `elva_kernels._C`: where they run, and how they fail."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends import boundary


def module() -> Any:
    """The compiled module."""
    return boundary.module()


def place(tensor: Tensor) -> tuple[int, int]:
    """The device of a tensor and its current stream."""
    index = tensor.get_device()
    # What `torch.cuda.current_stream` asks before it makes an object of it.
    return index, torch._C._cuda_getCurrentRawStream(index)


def call(op: str, function: Callable[..., None], *arguments: Any) -> None:
    """`function` of the arguments; what a GPU says of it names the op."""
    try:
        function(*arguments)
    except RuntimeError as error:
        raise RuntimeError(f"{op}: {error}") from None
