"""Rewards of given scores, and advantages, against torch: `python -m benchmarks.bench_scores`.

Each case is checked against float64 first; a red op gets no speed. Providers take turns call by
call. Rewards of scores come with their gradient, by autograd on both sides.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import elva_kernels
from benchmarks import rivals, timing
from benchmarks.ceilings import Ceilings
from benchmarks.timing import DTYPES, Tally, extra_mb, spread, timed

WEIGHTS = {"margin": 0.1, "rank_penalty": 0.01, "w_margin": 0.4, "w_rank": 0.6}
STD_EPS = 1e-4
CASES = (  # op, groups x scores or rollouts, dtype
    ("reward_from_scores", (1, 10), "fp32"),
    ("reward_from_scores", (64, 101), "fp32"),
    ("reward_from_scores", (4096, 101), "fp32"),
    ("reward_from_scores", (256, 1001), "fp32"),
    ("reward_from_scores", (4096, 101), "fp64"),
    ("group_advantages", (64, 8), "fp32"),
    ("group_advantages", (4096, 8), "fp32"),
)
SECONDS = 2.0  # of measuring, per case under pytest
MAX_ERROR = {"fp32": 1e-6, "fp64": 1e-12}  # of values and gradients, over the largest
Provider = Callable[[Tensor], Any]


def value_and_grad(reward_of: Callable[[Tensor], Tensor]) -> Provider:
    """Scores -> the rewards, and the gradient of their sum."""

    def run(scores: Tensor) -> tuple[Tensor, Tensor]:
        leaf = scores.detach().requires_grad_()
        reward = reward_of(leaf)
        (gradient,) = torch.autograd.grad(reward.sum(), leaf)
        return reward.detach(), gradient

    return run


def eager_advantages(reward: Tensor) -> Tensor:
    deviation = reward - reward.mean(-1, keepdim=True)
    return deviation / (reward.std(-1, keepdim=True) + STD_EPS)


PROVIDERS: dict[str, dict[str, Provider]] = {
    "reward_from_scores": {
        "ours": value_and_grad(lambda x: elva_kernels.reward_from_scores(x, **WEIGHTS).reward),
        "torch eager, sort": value_and_grad(lambda x: rivals.reward_of_scores(x, WEIGHTS)),
    },
    "group_advantages": {
        "ours": lambda reward: elva_kernels.group_advantages(reward, std_eps=STD_EPS),
        "torch eager": eager_advantages,
    },
}


TRUTHS: dict[str, Provider] = {
    "reward_from_scores": value_and_grad(
        lambda x: elva_kernels.reward_from_scores(x, **WEIGHTS, backend="reference").reward
    ),
    "group_advantages": eager_advantages,
}


def checked(op: str, name: str, values: Tensor, dtype: str) -> dict[str, Any]:
    """The error against float64 and the extra memory; ends the run where ours is red."""
    run = PROVIDERS[op][name]
    found, truth = run(values), TRUTHS[op](values.double())
    pairs = [(found, truth)] if isinstance(found, Tensor) else zip(found, truth, strict=True)
    error = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if name == "ours" and error > MAX_ERROR[dtype]:
        sys.exit(f"{op}: {dtype} is red: error {error}")
    return {"score_error": error, "extra_mb": extra_mb(lambda: run(values), values.nbytes)}


def measure(op: str, size: tuple[int, int], dtype: str, seconds: float) -> Any:
    """Rows of one case, and the read and copy times that were taken in turns with it."""
    sets = [torch.randn(size).to(DTYPES[dtype]) for _ in range(4)]
    providers = PROVIDERS[op]
    facts = {name: checked(op, name, sets[0], dtype) for name in providers}
    ceilings = Ceilings()
    turns: dict[str, Callable[[int], Any]] = {
        name: lambda i, run=run: run(sets[i % 4]) for name, run in providers.items()
    }
    turns |= {"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}
    times = timed(turns, seconds)
    eager = min(spread(times[name])[1] for name in providers if name != "ours")
    rows = []
    for name in providers:
        row = timing.row(f"{op} {size[0]}x{size[1]}", dtype, name, times[name])
        row["gbps"] = 2 * sets[0].nbytes / row["median_ms"] / 1e6
        row["times_eager"] = eager / row["median_ms"]
        rows.append(row | facts[name])
    return rows, {name: times[name] for name in ("read", "copy")}


@pytest.mark.parametrize(("op", "size", "dtype"), CASES)
def test_scores(op: str, size: Any, dtype: str, tally: Tally, benchmark: Any) -> None:
    tally.add(*measure(op, size, dtype, SECONDS))
    benchmark(PROVIDERS[op]["ours"], torch.randn(size).to(DTYPES[dtype]))


def main() -> None:
    arguments = timing.arguments("bench_scores", __doc__, quick="one size, no file")
    tally = Tally("scores")
    for case in CASES[:1] if arguments.quick else CASES:
        tally.add(*measure(*case, arguments.seconds))
    tally.tell(keep=not arguments.quick)


if __name__ == "__main__":
    main()
