"""What every benchmark of an op shares: its options, its clock, and the figures of its calls."""

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import elva_kernels
from benchmarks import report
from benchmarks.ceilings import BYTES

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass
class Tally:
    """What the cases of an op have measured so far."""

    op: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[str, list[float]] = field(default_factory=lambda: {"read": [], "copy": []})
    not_run: dict[str, str] = field(default_factory=dict)

    def add(self, rows: list[dict[str, Any]], ceilings: dict[str, list[float]]) -> None:
        """Rows of one case, and the milliseconds of the reads and copies taken in turns with it."""
        self.rows += rows
        for name, values in ceilings.items():
            self.ceilings[name] += values

    def result(self) -> dict[str, Any]:
        """As `report` shows and keeps it."""
        return {
            "op": self.op,
            "machine": report.machine(),
            "ceilings": ceilings_of(self.ceilings),
            "not_run": self.not_run,
            "rows": self.rows,
        }

    def tell(self, keep: bool) -> None:
        """Print the report, and keep it among the results."""
        result = self.result()
        print(report.show(result))
        if keep:
            print(report.write(self.op, result))


def arguments(
    name: str, doc: str | None, *, quick: str, most: str | None = None
) -> argparse.Namespace:
    """The command line of `benchmarks.<name>`, obeyed: threads and seed are set.

    most: what `--most` limits, where there is one.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc)
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring, per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help=quick)
    if most is not None:
        parser.add_argument("--most", type=int, default=sys.maxsize, help=most)
    parsed = parser.parse_args()
    reason = elva_kernels.available_backends()["cpu"]
    if reason is not None:
        sys.exit(f"benchmarks: {reason}; the package of this tree is meant: pip install -e .")
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    return parsed


def extra_mb(run: Callable[[], Any], result_bytes: int) -> float:
    """Peak memory of a call beyond its inputs and results, from Linux's own account.

    Memory of earlier results must not lie idle meanwhile, or it would be counted out.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")

    def field(name: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    with mock.patch.dict(os.environ, ELVA_KERNELS_CACHE_MB="0"):
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


def row(shape: str, dtype: str, provider: str, times: list[float]) -> dict[str, Any]:
    """A report's row: who computed what, and the milliseconds of its calls."""
    low, median, high = spread(times)
    known = {"shape": shape, "dtype": dtype, "provider": provider, "calls": len(times)}
    return known | {"median_ms": median, "p20_ms": low, "p80_ms": high, "best_ms": min(times)}


def ceilings_of(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """GB/s of the reads and copies of `Ceilings` that took these milliseconds."""
    found = {}
    for name, factor in (("read", 1), ("copy", 2)):
        fast, median, slow = (factor * BYTES / t / 1e6 for t in spread(times[name]))
        best = factor * BYTES / min(times[name]) / 1e6
        found[name] = {"gbps": median, "fast_gbps": fast, "slow_gbps": slow, "best_gbps": best}
    return found
