"""The Triton backend: portable GPU kernels. Nothing here imports triton before a kernel runs.

With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter, on CPU tensors:
for tests, far too slow for anything else.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
from pathlib import Path

import torch

# Triton itself decides once, when it is imported, by these words.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"

_LEAST_CAPABILITY = (8, 0)  # the oldest that the kernels are compiled for in the tests


def unavailable_reason() -> str | None:
    """None where the kernels can run, else one sentence: what is missing and what to do."""
    if importlib.util.find_spec("triton") is None:
        return (
            "triton is not installed; torch's CUDA and ROCm builds bring it, or pip install triton"
        )
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU; TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"triton kernels need a GPU of compute capability 8.0 or later, this one has {found}"
    return None


@functools.cache
def version() -> str:
    """The triton and the kernels that a verdict on them holds for."""
    triton = importlib.import_module("triton")
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return f"triton {triton.__version__}, kernels {digest[:16]}"
