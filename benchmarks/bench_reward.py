"""The grouped reward against torch and the memory: `python -m benchmarks.bench_reward`.

Each case is checked against float64 first; a red op gets no speed. Providers take turns call by
call, so that what else the machine does meets all of them alike; inputs rotate over sets that
together exceed the caches. Every call allocates its results, as a user's does.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from benchmarks import report, rivals
from benchmarks.ceilings import BYTES, Ceilings

WEIGHTS = {"margin": 0.1, "rank_penalty": 0.01, "w_margin": 0.4, "w_rank": 0.6}
# groups x rows x D: one query, one positive and rows - 2 negatives a group.
SIZES = (
    (1, 10, 64),
    (8, 10, 256),
    (1, 102, 1536),
    (8, 102, 1536),
    (64, 102, 1536),
    (64, 102, 3584),
)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
HEADLINE = (64, 102, 1536)  # the size that every dtype and torch.compile are measured at
MAX_SCORE_ERROR = {"bf16": 1e-6, "fp16": 1e-6, "fp32": 1e-6, "fp64": 1e-13}
MAX_GRAD_ERROR = {"bf16": 2e-6, "fp16": 2e-6, "fp32": 2e-6, "fp64": 1e-13}
Inputs = tuple[Tensor, Tensor, Tensor]
Provider = Callable[..., Any]


def inputs_of(groups: int, rows: int, dim: int, dtype: torch.dtype) -> Inputs:
    query = torch.randn(groups, dim)
    positive = query + torch.randn(groups, dim)
    return query.to(dtype), positive.to(dtype), torch.randn(groups, rows - 2, dim).to(dtype)


def ours(*inputs: Tensor) -> Any:
    return elva_kernels.ranking_reward_and_grad(*inputs, **WEIGHTS)


def ours_autograd(*inputs: Tensor) -> Any:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(elva_kernels.ranking_reward(*leaves, **WEIGHTS).reward.sum(), leaves)


def errors_of(inputs: Inputs, gradients: Any, scores: Tensor | None) -> tuple[float | None, float]:
    """Largest |score - truth|, and |gradient - truth| * |row| beyond half an ulp of the dtype."""
    exact = tuple(x.double() for x in inputs)
    truth, *expected = elva_kernels.ranking_reward_and_grad(*exact, **WEIGHTS, backend="reference")
    half_ulp = torch.finfo(inputs[0].dtype).eps / 2
    grad_error = 0.0
    for row, gradient, right in zip(exact, gradients, expected, strict=True):
        excess = (gradient.double() - right).abs() - half_ulp * right.abs()
        grad_error = max(grad_error, (excess * row.norm(dim=-1, keepdim=True)).max().item())
    score_error = None if scores is None else (scores.double() - truth.scores).abs().max().item()
    return score_error, grad_error


def extra_mb(run: Callable[[], Any], result_bytes: int) -> float:
    """Peak memory of a call beyond its inputs and results, from Linux's own account."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")

    def field(name: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    run()
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    before = field("VmRSS")
    kept = run()
    peak = field("VmHWM")
    del kept
    return max(0.0, (peak - before - result_bytes) / 1e6)


def timed(providers: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each provider's calls, taken in turns of 20 ms for about `seconds` in all."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    turns = dict.fromkeys(providers, 0)
    for name, run in providers.items():
        start = time.perf_counter()
        run(0)
        run(1)
        turns[name] = min(200, max(1, int(0.04 / (time.perf_counter() - start))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 7:
        for name, run in providers.items():
            for _ in range(turns[name]):
                start = time.perf_counter()
                result = run(len(times[name]))
                times[name].append((time.perf_counter() - start) * 1e3)
                del result
    return times


def spread(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return cuts[0], statistics.median(times), cuts[3]


def providers_of(compile_too: bool) -> dict[str, Provider]:
    found: dict[str, Provider] = {"ours, value and grad": ours, "ours, autograd": ours_autograd}
    for name, form in rivals.FORMS.items():
        found[name] = rivals.value_and_grad(form, WEIGHTS)
        if compile_too:
            fast = rivals.value_and_grad(rivals.compiled(form), WEIGHTS)
            found[name.replace("eager", "compile")] = fast
    return found


def checked(name: str, run: Provider, inputs: Inputs, dtype: str) -> dict[str, float | None]:
    """The errors and the extra memory of a provider; ends the run where ours is red."""
    result = run(*inputs)
    gradients, scores = (result[1:], result[0].scores) if run is ours else (result, None)
    score_error, grad_error = errors_of(inputs, gradients, scores)
    del result, gradients
    red = (score_error or 0.0) > MAX_SCORE_ERROR[dtype] or grad_error > MAX_GRAD_ERROR[dtype]
    if name.startswith("ours") and red:
        sys.exit(f"reward: {name}, {dtype} is red: errors {score_error}, {grad_error}")
    result_bytes = sum(x.numel() * x.element_size() for x in inputs)
    extra = extra_mb(lambda: run(*inputs), result_bytes)
    return {"score_error": score_error, "grad_error": grad_error, "extra_mb": extra}


def measure(size: tuple[int, int, int], dtype: str, seconds: float, compile_too: bool) -> Any:
    """Rows of one case, and the copy and read times that were taken in turns with it."""
    first = inputs_of(*size, DTYPES[dtype])
    input_bytes = sum(x.numel() * x.element_size() for x in first)
    count = min(16, max(2, -(-(128 << 20) // input_bytes)))
    sets = [first, *(inputs_of(*size, DTYPES[dtype]) for _ in range(count - 1))]
    providers = providers_of(compile_too)
    facts = {name: checked(name, run, first, dtype) for name, run in providers.items()}
    ceilings = Ceilings()
    turns: dict[str, Callable[[int], Any]] = {
        name: lambda i, run=run: run(*sets[i % count]) for name, run in providers.items()
    }
    turns |= {"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}
    times = timed(turns, seconds)
    copy_gbps = 2 * BYTES / spread(times["copy"])[1] / 1e6
    eager = min(spread(times[name])[1] for name in rivals.FORMS)
    rows = []
    for name in providers:
        low, median, high = spread(times[name])
        gbps = 2 * input_bytes / median / 1e6
        row = {"shape": "x".join(map(str, size)), "dtype": dtype, "provider": name}
        row |= {"median_ms": median, "p20_ms": low, "p80_ms": high, "best_ms": min(times[name])}
        row |= {"calls": len(times[name]), "gbps": gbps, "copy_gbps": copy_gbps}
        row |= {"of_copy": gbps / copy_gbps, "times_eager": eager / median}
        rows.append(row | facts[name])
    return rows, {name: times[name] for name in ("read", "copy")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_reward", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring, per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one size in bf16, no file")
    arguments = parser.parse_args()
    reason = elva_kernels.available_backends()["cpu"]
    if reason is not None:
        sys.exit(f"benchmarks: {reason}; the package of this tree is meant: pip install -e .")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases = [(HEADLINE, "bf16")]
    if not arguments.quick:
        cases = [(size, "bf16") for size in SIZES]
        cases += [(HEADLINE, dtype) for dtype in DTYPES if dtype != "bf16"]
    rows: list[Any] = []
    ceilings: dict[str, list[float]] = {"read": [], "copy": []}
    for case in cases:
        compile_too = case == (HEADLINE, "bf16") and not arguments.quick
        more, times = measure(*case, arguments.seconds, compile_too)
        rows += more
        for name, values in times.items():
            ceilings[name] += values
    result: dict[str, Any] = {"machine": report.machine(), "ceilings": {}, "rows": rows}
    for name, factor in (("read", 1), ("copy", 2)):
        fast, median, slow = (factor * BYTES / t / 1e6 for t in spread(ceilings[name]))
        best = factor * BYTES / min(ceilings[name]) / 1e6
        result["ceilings"][name] = {"gbps": median, "fast_gbps": fast, "slow_gbps": slow}
        result["ceilings"][name]["best_gbps"] = best
    print(report.show(result))
    if not arguments.quick:
        print(report.write("reward", result))


if __name__ == "__main__":
    main()
