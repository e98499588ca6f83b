"""What can run here: `doctor`, `available_backends`, and `warm_up`, which finds it out now."""

import platform
from dataclasses import dataclass
from typing import Any

import torch

from elva_kernels.backends import boundary
from elva_kernels.backends.admission import verdicts
from elva_kernels.backends.choice import failure_of, obstacle_to
from elva_kernels.backends.table import BACKENDS, LAUNCHERS


def warm_up(device: torch.device | str) -> "Report":
    """Prove and compile, now, every backend that "auto" may take on `device`; then `doctor()`.

    Each op is run in each dtype against the reference, once a process and device even where a
    verdict is kept: what runs is compiled and loaded. Call it before a CUDA graph capture, which
    can do neither. ELVA_KERNELS_SELFTEST=0 runs nothing here either.
    """
    place = torch.device(device)
    for op, row in LAUNCHERS.items():
        for name in row:
            for dtype in verdicts.DTYPES:
                usable = obstacle_to(op, name, place.type, dtype) is None
                if usable and not BACKENDS[name].by_name_only:
                    failure_of(op, name, place, dtype, here=True)
    return doctor()


def available_backends() -> dict[str, str | None]:
    """Every backend with None where it runs here, or the reason in a sentence where it does not."""
    return {name: backend.unavailable_reason() for name, backend in BACKENDS.items()}


@dataclass(frozen=True)
class Report:
    """What `doctor` found; `print` it, or read its fields.

    Attributes:
        versions: of Python, torch and the machine.
        backends: name -> None where it runs here, or the reason in a sentence why not.
        native: of the compiled module: level, levels, compiler, threads and more.
        selftests: of GPU backends, what is known: None for passed, or the error.
    """

    versions: dict[str, str]
    backends: dict[str, str | None]
    native: dict[str, Any]
    selftests: dict[str, str | None]

    def __str__(self) -> str:
        lines = ["  ".join(f"{name} {version}" for name, version in self.versions.items())]
        for name, reason in self.backends.items():
            lines.append(f"{name:10s} {'runs here' if reason is None else reason}")
        told = ("available", "reason", "cuda_lacks")  # among the backends
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
    return Report(versions, available_backends(), boundary.describe(), verdicts.known(proven))


def markdown_table() -> str:
    """The table of ops and backends that the README shows."""
    lines = ["| op | " + " | ".join(BACKENDS) + " |", "|---" * (1 + len(BACKENDS)) + "|"]
    for op, row in LAUNCHERS.items():
        # Not the two halves of autograd's path, nor what one process of a group computes.
        if not op.endswith(("_saved", "_backward", "_share")):
            cells = " | ".join("yes" if name in row else "-" for name in BACKENDS)
            lines.append(f"| `{op}` | {cells} |")
    return "\n".join(lines)
