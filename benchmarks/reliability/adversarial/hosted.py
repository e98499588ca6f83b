"""Adversarial inputs on backends of a GPU, without one: a process that has that backend alone.

CUDA's kernels run on the host's fibers, Triton's in its interpreter; both take their tensors on
the host, which a process must be told before it imports them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter

import torch

from benchmarks.reliability.adversarial.trials import trials
from benchmarks.reliability.child import spoken
from benchmarks.reliability.row import Outcome, Trials

DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "triton": (torch.bfloat16, torch.float16, torch.float32, torch.float64),
}
LACKING = {"cuda": ("advantages", "from_scores"), "triton": ("advantages",)}  # ops
LARGEST = {"cuda": 3_000, "triton": 400}  # elements of a tensor: what either bears


def elsewhere(wanted: Trials, *, backend: str) -> Outcome:
    """Cases on `backend` in a process of its own."""
    environment = {}
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    elif "ELVA_TEST_CUDA_HOST" not in os.environ:
        from tests.kernels import fibers

        environment["ELVA_TEST_CUDA_HOST"] = str(fibers.module())
    found = json.loads(spoken(__name__, backend, *map(str, wanted), environment=environment))
    return Outcome(**found | {"counts": Counter(found["counts"])})


def main() -> None:
    """What such a process does: prints the outcome."""
    from tests.kernels import hosted

    backend, *numbers = sys.argv[1:]
    wanted = Trials(*map(int, numbers))
    with contextlib.ExitStack() as stack:
        if backend == "cuda":
            hosted.serve_cuda(os.environ[hosted.CUDA_HOST])
        else:
            stack.enter_context(hosted.arithmetic_of_a_gpu())
        done = trials(
            wanted, backend=backend, dtypes=DTYPES[backend], largest=LARGEST[backend],
            lacking=LACKING[backend],
        )  # fmt: skip
    print(json.dumps(vars(done)))


def missing(backend: str) -> str:
    """What the machine lacks for such a process."""
    if backend == "triton":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    if "ELVA_TEST_CUDA_HOST" in os.environ:
        return ""
    return (
        "" if shutil.which("g++") and importlib.util.find_spec("pybind11") else "no g++, pybind11"
    )
