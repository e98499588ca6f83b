"""A backend proves itself on a device before "auto" uses it: a small run against the reference.

Once per (op, dtype, device model, driver, versions). A verdict is kept in the user's cache
directory; a crash is kept for the process alone, for it may have been a lack of memory. A backend
that fails is passed over with one warning. ELVA_KERNELS_SELFTEST=0 trusts blindly.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Tensors = tuple[Tensor, ...]
Launchers = Callable[[str], Callable[..., Tensors]]

_WEIGHTS = {"margin": -0.9, "rank_penalty": 0.05, "w_margin": 0.4, "w_rank": 0.6}
_TEMPERATURE = 0.1
# Errors of a wrong kernel are orders above these; those of a right one are below by as much.
_ALLOWED = {torch.float32: 2e-5, torch.float64: 1e-11}


class Capturing(RuntimeError):
    """A self-test is due, and the stream is being captured into a CUDA graph."""


class Subject(NamedTuple):
    """What a verdict is about."""

    op: str
    backend: str
    version: str
    dtype: torch.dtype
    device: str

    def facts(self) -> dict[str, str]:
        """All that the verdict may depend on; its key."""
        return {
            "op": self.op,
            "backend": self.backend,
            "version": self.version,
            "dtype": str(self.dtype).removeprefix("torch."),
            **_device_facts(torch.device(self.device)),
        }


class _Wrong(Exception):
    """A result that is not the reference's."""


# Key -> (facts, error or None), as far as this process has asked.
_verdicts: dict[str, tuple[dict[str, str], str | None]] = {}


def verdict(subject: Subject, launchers: Launchers) -> str | None:
    """None where the subject computes what the reference does, else one sentence of what is wrong.

    Args:
        subject: its op must be one of `TRIALS`; one that is not has no verdict but this sentence.
        launchers: the backend's launcher of any op.

    Raises:
        Capturing: a self-test would have to run inside a CUDA graph capture.
    """
    if os.environ.get("ELVA_KERNELS_SELFTEST") == "0":
        return None
    if subject.op not in TRIALS:
        return f"{subject.op} has no self-test"
    facts = subject.facts()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if key not in _verdicts:
        kept = _read(_directory() / f"{key}.json")
        error = kept[1] if kept else _try(subject, launchers, key, facts)
        _verdicts[key] = facts, error
        if error is not None:
            warnings.warn(
                f"{subject.op}: backend {subject.backend} is passed over for {facts['dtype']} on "
                f"{facts['device']}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return _verdicts[key][1]


def known(versions: Iterable[str]) -> dict[str, str | None]:
    """Verdicts on these versions that this process or the cache directory holds, by description."""
    told = [entry for path in sorted(_directory().glob("*.json")) if (entry := _read(path))]
    current = set(versions)
    return {
        f"{facts['op']} {facts['backend']} {facts['dtype']} on {facts['device']}": error
        for facts, error in (*told, *_verdicts.values())
        if facts["version"] in current
    }


def _try(subject: Subject, launchers: Launchers, key: str, facts: dict[str, str]) -> str | None:
    device = torch.device(subject.device)
    if _is_captured(device):
        raise Capturing(
            f"{subject.op}: backend {subject.backend} must prove itself before it is captured into "
            f"a CUDA graph, got no verdict for {facts['dtype']}; call "
            f"elva_kernels.warm_up({subject.device!r}) before the capture"
        )
    try:
        with torch.inference_mode(False), torch.no_grad():
            for soft in (False, True):
                TRIALS[subject.op](launchers, subject.dtype, device, soft)
    except _Wrong as error:
        _remember(key, facts, str(error))
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver may raise
        text = " ".join(str(error).split())
        return f"it raised {type(error).__name__}: {text[:300]}"
    _remember(key, facts, None)
    return None


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _directory() -> Path:
    """Where verdicts outlive the process."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "elva_kernels" / "selftest"


def _read(path: Path) -> tuple[dict[str, str], str | None] | None:
    """A kept verdict; None where there is none, or none that can be read: it is found again."""
    try:
        entry = json.loads(path.read_text())
        return entry["facts"], entry["error"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(key: str, facts: dict[str, str], error: str | None) -> None:
    # A directory that cannot be written costs a self-test a process, and nothing else.
    with suppress(OSError):
        directory = _directory()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".new", delete=False) as file:
            json.dump({"facts": facts, "error": error}, file)
        os.replace(file.name, directory / f"{key}.json")


def _device_facts(device: torch.device) -> dict[str, str]:
    facts = {"torch": torch.__version__, "device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["runtime"] = str(torch.version.hip or torch.version.cuda)
        drivers = [Path(f"/sys/module/{name}/version") for name in ("nvidia", "amdgpu")]
        facts["driver"] = " ".join(x.read_text().strip() for x in drivers if x.exists())
    return facts


class _Case(NamedTuple):
    """Inputs on the device, and what must come of them, in float64 on the CPU."""

    inputs: Tensors  # query, positive, negatives, mask
    upstream: Tensor
    weights: dict[str, float]
    truth: reference.RankingReward
    gradients: Tensors
    norms: Tensors  # of the rows that the gradients are of


def _case(dtype: torch.dtype, device: torch.device, soft: bool) -> _Case:
    """Ragged sizes, wide strides, a tie, a zero row, masked NaN, huge rows, a group with NaN."""
    with torch.device("cpu"):  # whatever the default device is
        return _case_from(torch.Generator().manual_seed(1), dtype, device, soft)


def _case_from(
    generator: torch.Generator, dtype: torch.dtype, device: torch.device, soft: bool
) -> _Case:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, positive, negatives = randn(4, 77), randn(4, 77), randn(4, 9, 2 * 77)
    positive += query
    negatives[..., ::2] += torch.linspace(-1, 1, 9).double()[:, None] * query[:, None]
    negatives[0, 2, ::2] = positive[0]
    negatives[1, 4] = 0
    negatives[2] *= 2.0 ** (8 if dtype == torch.float16 else 70)
    mask = torch.rand(4, 9, generator=generator) < 0.8
    mask[0, 2] = mask[1, 4] = mask[3, 5] = True
    mask[1, 6] = mask[3, 8] = False
    negatives[~mask] = torch.nan
    negatives[3, 5, 8] = torch.nan
    rounded = [x.to(dtype) for x in (query, positive, negatives)]
    inputs = (*(x.to(device) for x in rounded), mask.to(device))
    exact = [rounded[0].double(), rounded[1].double(), rounded[2][..., ::2].double()]
    upstream = randn(4).to(reference.compute_dtype(dtype))
    weights = _WEIGHTS | ({"rank_temperature": _TEMPERATURE} if soft else {})
    truth, *gradients = reference.ranking_reward_and_grad(
        exact[0], exact[1], exact[2], mask, upstream.double(), **weights
    )
    return _Case(
        (inputs[0], inputs[1], inputs[2][..., ::2], inputs[3]),
        upstream.to(device),
        weights,
        truth,
        tuple(gradients),
        tuple(x.norm(dim=-1, keepdim=True) for x in exact),
    )


def _try_values(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    case = _case(dtype, device, soft)
    _check_values(launchers("ranking_reward")(*case.inputs, **case.weights), case.truth)


def _try_autograd(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    """The forward that saves and the backward: neither means anything without the other."""
    case = _case(dtype, device, soft)
    *values, saved = launchers("ranking_reward_saved")(*case.inputs, **case.weights)
    _check_values(values, case.truth)
    backward = launchers("ranking_reward_backward")
    _check_gradients(backward(*case.inputs, saved, case.upstream, **case.weights), case)


def _try_value_and_grad(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    case = _case(dtype, device, soft)
    launch = launchers("ranking_reward_and_grad")
    results = launch(*case.inputs, case.upstream, **case.weights)
    _check_values(results[:5], case.truth)
    _check_gradients(results[5:], case)


def _try_scores(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    case = _case(dtype, device, soft)
    scores, mask = case.truth.scores.to(dtype), case.inputs[3]
    truth = reference.reward_from_scores(scores.double(), mask.cpu(), **case.weights)
    _check_values(launchers("reward_from_scores")(scores.to(device), mask, **case.weights), truth)


def _try_scores_backward(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    case = _case(dtype, device, soft)
    scores, mask = case.truth.scores.to(dtype), case.inputs[3]
    truth = reference.reward_from_scores_backward(
        scores.double(), mask.cpu(), case.upstream.cpu().double(), **case.weights
    )
    launch = launchers("reward_from_scores_backward")
    (gradient,) = launch(scores.to(device), mask, case.upstream, **case.weights)
    _check("grad_scores", gradient, truth, torch.finfo(dtype).eps * truth.abs())


TRIALS: dict[str, Callable[[Launchers, torch.dtype, torch.device, bool], None]] = {
    "ranking_reward": _try_values,
    "ranking_reward_saved": _try_autograd,
    "ranking_reward_backward": _try_autograd,
    "ranking_reward_and_grad": _try_value_and_grad,
    "reward_from_scores": _try_scores,
    "reward_from_scores_backward": _try_scores_backward,
}


def _check_values(found: Iterable[Tensor], truth: reference.RankingReward) -> None:
    for name, actual, expected in zip(truth._fields, found, truth, strict=True):
        _check(name, actual, expected, torch.zeros_like(expected, dtype=torch.float64))


def _check_gradients(found: Iterable[Tensor], case: _Case) -> None:
    names = ("grad_query", "grad_positive", "grad_negatives")
    for name, actual, truth, norm in zip(names, found, case.gradients, case.norms, strict=True):
        scale = norm.nan_to_num()
        rounding = torch.finfo(actual.dtype).eps * truth.abs() * scale
        if actual.dtype == torch.float16:  # subnormal gradients of huge rows
            rounding = rounding + 2.0**-25 * scale
        _check(name, actual.cpu().double() * scale, truth * scale, rounding, actual.dtype)


def _check(
    name: str,
    found: Tensor,
    truth: Tensor,
    rounding: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raises _Wrong where a result is further from the truth than its dtype explains."""
    allowed = _ALLOWED[reference.compute_dtype(dtype or found.dtype)]
    if found.dtype == torch.int32:
        allowed = 0.0
    actual, expected = found.cpu().double(), truth.double()
    if actual.shape != expected.shape:
        raise _Wrong(f"{name} has shape {list(actual.shape)}, not {list(expected.shape)}")
    # Where both are infinite or both NaN, a difference would be NaN.
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs() - rounding)
    if not bool((error <= allowed).all()):
        worst = error.nan_to_num(nan=torch.inf).max().item()
        raise _Wrong(f"{name} is {worst:.1e} from the reference, allowed are {allowed:.0e}")
