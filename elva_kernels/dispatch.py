"""Which backend computes which op: the only file that knows which backends exist.

A new backend is one line in `BACKENDS` and one in each row of `LAUNCHERS` that it computes.
"""

import functools
import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from elva_kernels import (
    batch_launchers,
    in_batch,
    native,
    native_batch,
    native_cuda,
    native_scores,
    reference,
    selftest,
    triton_kernels,
)
from elva_kernels.batch_launchers import own

Tensors = tuple[Tensor, ...]


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot run this call here; the message says why."""


class Backend(NamedTuple):
    """What a backend needs, asked before it is chosen."""

    device_type: str | None  # None: every device
    unavailable_reason: Callable[[], str | None]
    # What a self-test's verdict on it holds for; None: trusted without one.
    version: Callable[[], str] | None = None
    by_name_only: bool = False  # never chosen by "auto"
    dtypes: tuple[torch.dtype, ...] | None = None  # None: all


def _reward(*tensors: Any, **weights: Any) -> Tensors:
    return own(reference.ranking_reward(*tensors, **weights))


def _reward_saved(*tensors: Any, **weights: Any) -> Tensors:
    negatives = tensors[2]  # the backward starts from the inputs again and needs nothing saved
    saved = (*negatives.shape[:-2], 2 * negatives.shape[-2] + 3)
    return *_reward(*tensors, **weights), negatives.new_zeros(saved, dtype=torch.float64)


def _reward_backward(*tensors: Any, **weights: Any) -> Tensors:
    query, positive, negatives, mask, _, grad_reward = tensors
    inputs = (query, positive, negatives, mask)
    _, *gradients = reference.ranking_reward_and_grad(*inputs, grad_reward, **weights)
    return own(gradients)


def _reward_and_grad(*tensors: Any, **weights: Any) -> Tensors:
    result, *gradients = reference.ranking_reward_and_grad(*tensors, **weights)
    return *own(result), *own(gradients)


def _from_scores(scores: Tensor, mask: Tensor | None, **weights: Any) -> Tensors:
    return own(reference.reward_from_scores(scores, mask, **weights))


def _from_scores_backward(*tensors: Any, **weights: Any) -> Tensors:
    return own([reference.reward_from_scores_backward(*tensors, **weights)])


def _advantages(reward: Tensor, *, scale: str, std_eps: float) -> Tensors:
    return (reference.group_advantages(reward, scale=scale, std_eps=std_eps),)


def _topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> Tensors:
    return own(reference.topk(query, corpus, k, metric=metric))


def _triton_run(*arguments: Any) -> in_batch.Run:
    """The steps of the Triton backend, imported when they are first needed."""
    launchers = importlib.import_module("elva_kernels.triton_kernels.launch_batch")
    return cast(in_batch.Run, launchers.Run(*arguments))


def _native_reward_backward(*tensors: Any, **_: Any) -> Tensors:
    query, positive, negatives, _mask, saved, grad_reward = tensors
    return native.reward_backward(query, positive, negatives, saved, grad_reward)


def _cuda_reward_backward(*tensors: Any, **_: Any) -> Tensors:
    query, positive, negatives, _mask, saved, grad_reward = tensors
    return native_cuda.reward_backward(query, positive, negatives, saved, grad_reward)


def _native_from_scores(scores: Tensor, mask: Tensor | None, **weights: Any) -> Tensors:
    values = native_scores.reward_from_scores(scores, mask, **weights)
    return *values, reference.live_scores(scores, mask)


def _native_from_scores_backward(*tensors: Any, **weights: Any) -> Tensors:
    return (native_scores.reward_from_scores_backward(*tensors, **weights),)


def _native_advantages(reward: Tensor, *, scale: str, std_eps: float) -> Tensors:
    return (native_scores.group_advantages(reward, scale=scale, std_eps=std_eps),)


def _triton(name: str, module: str = "launch") -> Callable[..., Tensors]:
    """A launcher of the Triton backend, imported when it is first called."""

    def launch(*tensors: Any, **weights: Any) -> Tensors:
        launchers = importlib.import_module(f"elva_kernels.triton_kernels.{module}")
        return cast(Tensors, getattr(launchers, name)(*tensors, **weights))

    return launch


def _cuda_run(*arguments: Any) -> in_batch.Run:
    """The steps of the CUDA backend, imported when they are first needed."""
    launchers = importlib.import_module("elva_kernels.native_cuda_batch")
    return cast(in_batch.Run, launchers.Run(*arguments))


def _in_batch(name: str) -> dict[str, Callable[..., Tensors]]:
    """An in-batch op's launchers: the same steps, of each backend that has them."""
    op = getattr(batch_launchers, f"stepped_{name}")
    return {
        "cpu": functools.partial(op, native_batch.Run),
        "cuda": functools.partial(op, _cuda_run),
        "triton": functools.partial(op, _triton_run),
        "reference": getattr(batch_launchers, f"reference_{name}"),
    }


# In the order in which "auto" prefers them.
BACKENDS: dict[str, Backend] = {
    "cpu": Backend("cpu", unavailable_reason=native.unavailable_reason),
    "cuda": Backend(
        "cuda",
        unavailable_reason=native_cuda.unavailable_reason,
        version=native_cuda.version,
        dtypes=native_cuda.DTYPES,
    ),
    "triton": Backend(
        triton_kernels.DEVICE_TYPE,
        unavailable_reason=triton_kernels.unavailable_reason,
        version=triton_kernels.version,
        by_name_only=triton_kernels.INTERPRETED,
    ),
    "reference": Backend(None, unavailable_reason=lambda: None),
}

# op -> backend -> launcher. `library` says what a launcher of each op takes and gives.
LAUNCHERS: dict[str, dict[str, Callable[..., Tensors]]] = {
    "ranking_reward": {
        "cpu": native.reward_forward,
        "cuda": native_cuda.reward_forward,
        "triton": _triton("reward_forward"),
        "reference": _reward,
    },
    "ranking_reward_saved": {
        "cpu": native.reward_forward_saved,
        "cuda": native_cuda.reward_forward_saved,
        "triton": _triton("reward_forward_saved"),
        "reference": _reward_saved,
    },
    "ranking_reward_backward": {
        "cpu": _native_reward_backward,
        "cuda": _cuda_reward_backward,
        "triton": _triton("reward_backward"),
        "reference": _reward_backward,
    },
    "ranking_reward_and_grad": {
        "cpu": native.reward_value_and_grad,
        "cuda": native_cuda.reward_value_and_grad,
        "triton": _triton("reward_value_and_grad"),
        "reference": _reward_and_grad,
    },
    "reward_from_scores": {
        "cpu": _native_from_scores,
        "triton": _triton("reward_from_scores"),
        "reference": _from_scores,
    },
    "reward_from_scores_backward": {
        "cpu": _native_from_scores_backward,
        "triton": _triton("reward_from_scores_backward"),
        "reference": _from_scores_backward,
    },
    "topk": {
        "cpu": native.topk,
        "cuda": native_cuda.topk,
        "triton": _triton("topk", "launch_topk"),
        "reference": _topk,
    },
    "group_advantages": {"cpu": _native_advantages, "reference": _advantages},
    "rank_statistics": _in_batch("statistics"),
    "in_batch_ranking_reward": _in_batch("in_batch_reward"),
    "in_batch_ranking_reward_backward": _in_batch("in_batch_backward"),
    "info_nce": _in_batch("info_nce"),
    "info_nce_saved": _in_batch("info_nce_saved"),
    "info_nce_backward": _in_batch("info_nce_backward"),
}


@functools.cache
def launcher(
    op: str, backend: str, device: torch.device, dtype: torch.dtype
) -> Callable[..., Tensors]:
    """The function that computes `op` on `backend`, or on the first that can for "auto".

    On a GPU "auto" takes a backend only after its self-test (`selftest`) in `dtype` on `device`.

    Raises:
        BackendUnavailable: `backend` was named and cannot run this call, or a CUDA graph is being
            captured and "auto" has no verdict yet.
    """
    if backend == "auto":
        backend = next(
            name
            for name in BACKENDS
            if _obstacle(op, name, device.type, dtype) is None
            and not BACKENDS[name].by_name_only
            and _failure(op, name, device, dtype) is None
        )
    obstacle = _obstacle(op, backend, device.type, dtype)
    if obstacle is not None:
        raise BackendUnavailable(f"{op}: backend must run here, got {backend!r}; {obstacle}")
    return LAUNCHERS[op][backend]


def _failure(op: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What a backend's self-test found wrong, in a sentence; None where it passed or needs none."""
    backend = BACKENDS[name]
    if backend.version is None:
        return None
    subject = selftest.Subject(op, name, backend.version(), dtype, str(device))
    try:
        return selftest.verdict(subject, lambda half: LAUNCHERS[half][name])
    except selftest.Capturing as error:
        raise BackendUnavailable(str(error)) from None


def warm_up(device: torch.device | str) -> "Report":
    """Prove and compile, now, every backend that "auto" may take on `device`; then `doctor()`.

    Each op is run in each dtype against the reference, unless a verdict on it is known. Call it
    before a CUDA graph capture, which can run no self-test.
    """
    place = torch.device(device)
    for op, row in LAUNCHERS.items():
        for name in row:
            for dtype in selftest.DTYPES:
                usable = _obstacle(op, name, place.type, dtype) is None
                if usable and not BACKENDS[name].by_name_only:
                    _failure(op, name, place, dtype)
    return doctor()


def _obstacle(op: str, name: str, device_type: str, dtype: torch.dtype) -> str | None:
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


def available_backends() -> dict[str, str | None]:
    """Every backend with None where it runs here, or the reason in a sentence where it does not."""
    return {name: backend.unavailable_reason() for name, backend in BACKENDS.items()}


@dataclass(frozen=True)
class Report:
    """What `doctor` found; `print` it, or read its fields."""

    versions: dict[str, str]
    backends: dict[str, str | None]  # None: runs here; else the reason why not
    native: dict[str, Any]  # the compiled module: level, levels, compiler, threads, ...
    selftests: dict[str, str | None]  # what is known of GPU backends: None passed; else the error

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items())]
        for name, reason in self.backends.items():
            lines.append(f"{name:10s} {'runs here' if reason is None else reason}")
        told = ("available", "reason")  # among the backends
        lines += [f"  {name}: {fact}" for name, fact in self.native.items() if name not in told]
        for subject, error in self.selftests.items():
            lines.append(f"  self-test of {subject}: {'passed' if error is None else error}")
        return "\n".join(lines)


def doctor() -> Report:
    """What can run here and, for what cannot, the reason in a sentence."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    proven = {
        backend.version()
        for backend in BACKENDS.values()
        if backend.version is not None and backend.unavailable_reason() is None
    }
    return Report(versions, available_backends(), native.describe(), selftest.known(proven))


def markdown_table() -> str:
    """The table of ops and backends that the README shows."""
    lines = ["| op | " + " | ".join(BACKENDS) + " |", "|---" * (1 + len(BACKENDS)) + "|"]
    for op, row in LAUNCHERS.items():
        if not op.endswith(("_saved", "_backward")):  # the two halves of autograd's path
            cells = " | ".join("yes" if name in row else "-" for name in BACKENDS)
            lines.append(f"| `{op}` | {cells} |")
    return "\n".join(lines)
