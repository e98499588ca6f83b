"""Verdicts of the self-test: a small comparison with the reference before "auto" uses a backend.

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
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from elva_kernels.backends.admission import codes, in_batch, reward, topk
from elva_kernels.backends.admission.trial import Launchers, Wrong

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

TRIALS = reward.TRIALS | in_batch.TRIALS | topk.TRIALS | codes.TRIALS


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


# Key -> (facts, error or None), as far as this process has asked.
_verdicts: dict[str, tuple[dict[str, str], str | None]] = {}
_tried: set[tuple[str, torch.device]] = set()  # what this process has run itself, and where


def verdict(subject: Subject, launchers: Launchers, *, here: bool = False) -> str | None:
    """None where the subject computes what the reference does, else one sentence of what is wrong.

    Args:
        subject: its op must be one of `TRIALS`; one that is not has no verdict but this sentence.
        launchers: the backend's launcher of any op.
        here: run the self-test unless this process has, whatever is kept: it compiles and loads.

    Raises:
        Capturing: a self-test would have to run inside a CUDA graph capture.
    """
    if os.environ.get("ELVA_KERNELS_SELFTEST") == "0":
        return None
    if subject.op not in TRIALS:
        return f"{subject.op} has no self-test"
    facts = subject.facts()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    place = key, _resolved(torch.device(subject.device))
    due = here and place not in _tried
    if due or key not in _verdicts:
        path = _directory() / f"{key}.json"
        kept = None if due else _read(path)
        error, is_crash = (kept[1], False) if kept else _try(subject, launchers, key, facts)
        known = _verdicts.get(key) or _read(path)
        # What was known outlives a crash, which may have been a lack of memory.
        _verdicts[key] = known if is_crash and known else (facts, error)
        if not kept:
            _tried.add(place)
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


def _try(
    subject: Subject, launchers: Launchers, key: str, facts: dict[str, str]
) -> tuple[str | None, bool]:
    """What is wrong, and whether it is a crash."""
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
    except Wrong as error:
        _remember(key, facts, str(error))
        return str(error), False
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver may raise
        text = " ".join(str(error).split())
        return f"it raised {type(error).__name__}: {text[:300]}", True
    _remember(key, facts, None)
    return None, False


def _resolved(device: torch.device) -> torch.device:
    """With its number: kernels are loaded on each GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


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
