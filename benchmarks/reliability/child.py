"""A process of its own for trials, on the kernels of the caller."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def findable() -> None:
    """What is spawned from here on finds the benchmarks, and an installed package first."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))


def spoken(module: str, *given: str, environment: Mapping[str, str] | None = None) -> str:
    """The last line that `main` of a module of the benchmarks prints, for these arguments.

    Args:
        environment: added to that of the caller.
    """
    # The root comes last on the path: an installed package goes before the tree.
    code = f"import sys; sys.path.append({str(ROOT)!r}); import {module} as module; module.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=tempfile.gettempdir(),
        env={**os.environ, **(environment or {})}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(given)}: {done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]
