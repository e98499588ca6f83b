"""Cases of adversarial inputs on a backend, in the modes that a program may have."""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Collection, Iterator

import torch

from benchmarks.reliability.adversarial.cases import OPS
from benchmarks.reliability.adversarial.draw import DTYPES, Draw
from benchmarks.reliability.row import Outcome, Trials

# A number's op: the two large families twice.
TURNS = (
    "grouped", "statistics", "in_batch", "info_nce", "grouped", "search", "from_scores",
    "info_nce", "grouped", "advantages",
)  # fmt: skip


@contextlib.contextmanager
def at_level(level: str | None) -> Iterator[None]:
    """The compiled module held to a CPU level."""
    if level is None:
        yield
        return
    compiled = importlib.import_module("elva_kernels._C")
    before = os.environ.get("ELVA_KERNELS_CPU_LEVEL")
    os.environ["ELVA_KERNELS_CPU_LEVEL"] = level
    compiled.reset_level()
    if compiled.level() != level:
        raise RuntimeError(f"this CPU has no {level}")
    try:
        yield
    finally:
        os.environ.pop("ELVA_KERNELS_CPU_LEVEL")
        if before is not None:
            os.environ["ELVA_KERNELS_CPU_LEVEL"] = before
        compiled.reset_level()


def trials(
    wanted: Trials,
    *,
    backend: str,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    largest: int = 20_000,
    lacking: Collection[str] = (),
) -> Outcome:
    """Cases on a backend, "cpu:avx2" at a level.

    Args:
        largest: elements of a tensor, as far as the backend bears it.
        lacking: ops that the backend has no kernel for.
    """
    name, _, level = backend.partition(":")
    turns = [op for op in TURNS if op not in lacking]
    outcome = Outcome()
    with at_level(level or None):
        for number in wanted.numbers:
            draw = Draw(wanted.seed, number, dtypes, largest)
            op = turns[number % len(turns)]
            outcome.tried += 1
            try:
                OPS[op](draw, name)
            except Exception as error:  # noqa: BLE001  the next case is tried all the same
                last = traceback.extract_tb(error.__traceback__)[-1]
                outcome.wrong.append(
                    f"{backend} seed {wanted.seed} number {number} ({op} "
                    f"{' '.join(draw.words[:12])}): {type(error).__name__} "
                    f"{str(error)[:300]} at {last.name}:{last.lineno}"
                )
            else:
                outcome.counts[op] += 1
    return outcome
