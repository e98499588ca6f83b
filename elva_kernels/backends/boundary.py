"""The binary boundary: the compiled module `elva_kernels._C` (csrc/elva.h), and what crosses it.

Tensors cross as addresses and strides, dtypes and names as the codes of csrc/elva.h.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_Function = TypeVar("_Function", bound=Callable[..., Any])

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
METRIC_CODES = {"dot": 0, "cosine": 1}
SCALE_CODES = {"std": 0, "batch": 1, "none": 2}
_CPU = torch.device("cpu")
# The memory of larger gradients is kept for the next (csrc/cpu/kept_memory.cpp).
_LARGE_BYTES = 1 << 20


def unavailable_reason() -> str | None:
    """None where the compiled module works, else one sentence: what is missing and what to do."""
    return _load()[1]


def describe() -> dict[str, Any]:
    """What the compiled module is and what it uses here, for `doctor()`.

    Keys: `available` (bool), `reason` (None or a sentence); where it loads also `level` (in use),
    `levels` (that this CPU and its operating system support, best first), `compiler`, `cuda`
    (bool), `cuda_archs` (tuple of str), `cuda_lacks` (str, why there are none), `threads` (what a
    call made now would use).
    """
    found, reason = _load()
    facts: dict[str, Any] = {"available": reason is None, "reason": reason}
    if found is not None:
        info = found.build_info()
        facts["level"] = found.level() if reason is None else None
        facts["levels"] = tuple(found.levels().split())
        facts["compiler"] = info["compiler"]
        facts["cuda"] = info["cuda"]
        facts["cuda_archs"] = tuple(filter(None, info["cuda_archs"].split(",")))
        facts["cuda_lacks"] = info.get("cuda_lacks", "it is of an older source")
        facts["threads"] = torch.get_num_threads()
    return facts


def build_digest() -> str:
    """What this build of the module is: its verdicts hold for no other."""
    path = module().__file__
    assert path is not None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def module() -> ModuleType:
    """`elva_kernels._C`; raises RuntimeError with the reason where it cannot be used."""
    found, reason = _load()
    if found is None or reason is not None:
        raise RuntimeError(reason)
    return found


def in_default_float_mode(function: _Function) -> _Function:
    """`function`, with rounding to nearest and subnormal numbers whatever its caller has set.

    Torch's own operations compute in the calling thread's mode. Nobody changes it where the
    compiled module is missing, nor while torch.compile traces the function.
    """

    @functools.wraps(function)
    def guarded(*arguments: Any) -> Any:
        found = None if torch.compiler.is_compiling() else _load()[0]
        if found is None:
            return function(*arguments)
        mode = found.enter_default_float_mode()
        try:
            return function(*arguments)
        finally:
            found.set_float_mode(mode)

    return guarded  # type: ignore[return-value]


def operand(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """A tensor of any strides."""
    return None if tensor is None else (tensor.data_ptr(), tensor.stride())


def pointer(tensor: Tensor | None) -> int:
    """A contiguous tensor; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """Uninitialised memory."""
    # Sizes as separate arguments: torch parses a Size in twice the time it takes to allocate.
    sizes = shape or ((),)
    return torch.empty(*sizes, dtype=dtype, device=device)


def empty_kept(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Where it is large, of memory that is kept for the next one; an index is not."""
    if dtype in DTYPE_CODES and shape.numel() * dtype.itemsize >= _LARGE_BYTES:
        return from_dlpack(module().empty(DTYPE_CODES[dtype], tuple(shape)))
    return empty(shape, dtype)


def empty_on_cpu(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`empty_kept` where the compiled module is there, else torch's."""
    return empty_kept(shape, dtype) if unavailable_reason() is None else empty(shape, dtype)


def empty_gradient(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of `x`, contiguous."""
    if x.nbytes < _LARGE_BYTES and x.is_contiguous():
        return torch.empty_like(x)
    return empty_kept(x.shape, x.dtype)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or the reason why it cannot be used."""
    try:
        found = importlib.import_module(f"{__name__.partition('.')[0]}._C")
    except ModuleNotFoundError:
        return None, (
            "elva_kernels._C is not built: no C++ compiler was found at install time, or this is a "
            "source tree or a hub's kernel that was not installed; install g++ 10 or later and run "
            "pip install again"
        )
    except ImportError as error:
        return (
            None,
            f"elva_kernels._C does not load ({error}); reinstall the package on this machine",
        )
    try:
        found.level()
    except RuntimeError as error:
        return found, str(error)
    return found, None
