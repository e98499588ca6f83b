"""Rows of adversarial inputs: each op of the contract, each backend, judged in float64."""

from __future__ import annotations

from functools import partial

import elva_kernels
from benchmarks.reliability.adversarial import hosted
from benchmarks.reliability.adversarial.trials import trials
from benchmarks.reliability.row import Row


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


def hosted_row(backend: str, how: str, amount: int, smoke: int) -> Row:
    return Row(
        title=f"the same on `{backend}`, {how}",
        goal=f"{amount:,}, 0 silently wrong",
        unit="inputs",
        amount=amount,
        smoke=smoke,
        chunk=500,
        run=partial(hosted.elsewhere, backend=backend),
        missing=partial(hosted.missing, backend),
    )


ROWS = {
    "adversarial-avx512": row("cpu:avx512bf16", 1_000_000, 30),
    "adversarial-avx2": row("cpu:avx2", 1_000_000, 30),
    "adversarial-amx": row("cpu:amx", 20_000, 9),
    "adversarial-plain": row("cpu:plain", 20_000, 9),
    "adversarial-fibers": hosted_row("cuda", "whose kernels run on the host's fibers", 20_000, 9),
    "adversarial-triton": hosted_row("triton", "in its interpreter", 2_000, 6),
}
