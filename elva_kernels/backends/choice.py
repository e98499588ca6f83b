"""The choice of a backend for a call."""

import functools

import torch

from elva_kernels.backends.admission import verdicts
from elva_kernels.backends.launcher import Launcher
from elva_kernels.backends.table import BACKENDS, LAUNCHERS


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot run this call here; the message says why."""


@functools.cache
def launcher(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, called: str | None = None
) -> Launcher:
    """The function that computes `op` on `backend`, or on the first that can for "auto".

    On a GPU "auto" takes a backend only after its self-test (`admission`) in `dtype` on `device`.

    Raises:
        BackendUnavailable: `backend` was named and cannot run this call, which is said in the name
            of `called` (None: of `op`); or a CUDA graph is being captured and "auto" has no verdict
            yet.
    """
    if backend == "auto":
        backend = next(
            name
            for name in BACKENDS
            if obstacle_to(op, name, device.type, dtype) is None
            and not BACKENDS[name].by_name_only
            and failure_of(op, name, device, dtype) is None
        )
    obstacle = obstacle_to(op, backend, device.type, dtype)
    if obstacle is not None:
        raise BackendUnavailable(
            f"{called or op}: backend must run here, got {backend!r}; {obstacle}"
        )
    return LAUNCHERS[op][backend]


def failure_of(
    op: str, name: str, device: torch.device, dtype: torch.dtype, *, here: bool = False
) -> str | None:
    """What a backend's self-test found wrong, in a sentence; None where it passed or needs none.

    here: the test is run unless this process has run it, whatever verdict is kept.
    """
    backend = BACKENDS[name]
    if backend.version is None:
        return None
    subject = verdicts.Subject(op, name, backend.version(), dtype, str(device))
    if here:
        launcher.cache_clear()  # it may choose by a verdict that this one overturns
    try:
        return verdicts.verdict(subject, lambda name_of_op: LAUNCHERS[name_of_op][name], here=here)
    except verdicts.Capturing as error:
        raise BackendUnavailable(str(error)) from None


def obstacle_to(op: str, name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot compute `op` here, in a sentence; None where it can."""
    backend = BACKENDS[name]
    if name not in LAUNCHERS[op]:
        return f"{name} does not compute {op}"
    if backend.device_type not in (None, device_type):
        return f"{name} takes tensors on {backend.device_type}, these are on {device_type}"
    if backend.dtypes is not None and dtype not in backend.dtypes:
        names = ", ".join(str(x).removeprefix("torch.") for x in backend.dtypes)
        return f"{name} takes {names}, these are {str(dtype).removeprefix('torch.')}"
    return backend.unavailable_reason()
