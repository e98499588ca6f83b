"""Rows of adversarial inputs: each op of the contract, each backend, judged in float64."""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Iterator
from functools import partial

import torch

import elva_kernels
from benchmarks.reliability.adversarial.cases import OPS
from benchmarks.reliability.adversarial.draw import DTYPES, Draw
from benchmarks.reliability.row import Outcome, Row, Trials

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


@contextlib.contextmanager
def in_some_mode(draw: Draw) -> Iterator[None]:
    """Threads, autocast, flushing of subnormals, as a program may have them."""
    before, flushed = torch.get_num_threads(), draw.maybe(0.1)
    torch.set_num_threads(draw.one_of((1, 1, 1, 2, 3)))
    torch.set_flush_denormal(False)
    cast = draw.maybe(0.1)
    draw.words += ["flushed"] * flushed + ["autocast"] * cast
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def op_of(number: int) -> str:
    """The op that the case of this number tries."""
    return TURNS[number % len(TURNS)]


def trials(
    wanted: Trials, *, backend: str, dtypes: tuple[torch.dtype, ...] = DTYPES, largest: int = 20_000
) -> Outcome:
    """Cases on a backend, "cpu:avx2" at a level.

    Args:
        largest: elements of a tensor, as far as the backend bears it.
    """
    name, _, level = backend.partition(":")
    outcome = Outcome()
    with at_level(level or None):
        for number in wanted.numbers:
            draw, op = Draw(wanted.seed, number, dtypes, largest), op_of(number)
            outcome.tried += 1
            try:
                with in_some_mode(draw):
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


def missing(backend: str) -> str:
    """What this machine lacks for a backend, "cpu:avx2" at a level."""
    name, _, level = backend.partition(":")
    if reason := elva_kernels.available_backends()[name]:
        return reason
    has = elva_kernels.doctor().native["levels"]
    return f"this CPU has no {level}" if level and level not in has else ""


def row(backend: str, amount: int, smoke: int) -> Row:
    return Row(
        title=f"adversarial inputs of every op on `{backend}`, against float64",
        goal=f"{amount:,}, 0 silently wrong",
        unit="inputs",
        amount=amount,
        smoke=smoke,
        chunk=2_000,
        run=partial(trials, backend=backend),
        missing=partial(missing, backend),
    )


ROWS = {
    "adversarial-avx512": row("cpu:avx512bf16", 1_000_000, 60),
    "adversarial-avx2": row("cpu:avx2", 1_000_000, 60),
    "adversarial-plain": row("cpu:plain", 20_000, 30),
}
