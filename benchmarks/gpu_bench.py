"""Figures of a GPU beside its own ceilings and its rivals, for `benchmarks.gpu_check`.

Providers take turns call by call, timed by events on the device; inputs rotate over sets that
together exceed the caches. On the CPU, for a dry run, by the clock and at small sizes.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from benchmarks import bench_reward, in_batch_rivals, report, rivals, timing
from elva_kernels.backends.choice import launcher
from elva_kernels.backends.table import LAUNCHERS

WEIGHTS = bench_reward.WEIGHTS
CACHE_BYTES = 256 << 20  # more than a GPU's second-level cache
Call = Callable[[int], Any]


class Bench:
    """The rows and the ceilings of one device."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = torch.device(device), seconds
        self.dry = self.device.type == "cpu"
        self.rows: list[dict[str, Any]] = []
        self.not_run = in_batch_rivals.absent() | not_asked()
        self.ceilings: dict[str, list[float]] = {"read": [], "copy": [], "product": []}
        size, side = (1 << 20, 256) if self.dry else (1 << 30, 8192)
        self.buffer = torch.ones(size // 8, dtype=torch.int64, device=self.device)
        self.other = torch.zeros_like(self.buffer)
        self.factors = [self.randn(side, side) for _ in range(2)]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).bfloat16()

    def backends(self, op: str) -> list[str]:
        found = []
        for name in LAUNCHERS[op]:
            try:
                launcher(op, name, self.device, torch.bfloat16)
            except elva_kernels.BackendUnavailable:
                continue
            found.append(name)
        return [name for name in found if name != "reference"] or found

    def milliseconds(self, calls: dict[str, Call]) -> dict[str, list[float]]:
        """Of each provider's calls, in turns."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            for i in range(2):
                call(i)
        self.wait()
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
            for name, call in calls.items():
                times[name].append(self.one(call, len(times[name])))
        return times

    def one(self, call: Call, turn: int) -> float:
        if self.dry:
            start = time.perf_counter()
            call(turn)
            return (time.perf_counter() - start) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        result = call(turn)
        last.record()
        last.synchronize()
        del result
        return first.elapsed_time(last)

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def add(self, op: str, shape: str, calls: dict[str, Call], **counted: float) -> None:
        """Measures a case; `counted`: bytes, or products of matrices of that many operations."""
        ceilings: dict[str, Call] = {
            "read": lambda _: self.buffer.sum(),
            "copy": lambda _: self.other.copy_(self.buffer),
            "product": lambda _: torch.mm(*self.factors),
        }
        try:
            times = self.milliseconds(calls | {f"ceiling {k}": x for k, x in ceilings.items()})
        except torch.OutOfMemoryError:
            self.not_run[f"{op} {shape}"] = "a provider ran out of memory"
            return
        for name in ceilings:
            self.ceilings[name] += times.pop(f"ceiling {name}")
        medians = {name: timing.spread(x)[1] for name, x in times.items()}
        eager = min((x for name, x in medians.items() if "torch eager" in name), default=None)
        floor = self.floor_ms(counted)
        for name, taken in times.items():
            row = timing.row(f"{op} {shape}", "bf16", name, taken)
            row["of_floor"] = floor / row["median_ms"]
            if "bytes" in counted:
                row["gbps"] = counted["bytes"] / row["median_ms"] / 1e6
            if "operations" in counted:
                row["tflops"] = counted["operations"] / row["median_ms"] / 1e9
            if eager is not None:
                row["times_eager"] = eager / row["median_ms"]
            self.rows.append(row)

    def floor_ms(self, counted: dict[str, float]) -> float:
        """The slower of bytes and operations, at the speeds of copy, read and product."""
        size = self.buffer.nbytes
        copied = counted.get("bytes", 0) / (2 * size) * timing.spread(self.ceilings["copy"])[1]
        read = counted.get("read", 0) / size * timing.spread(self.ceilings["read"])[1]
        operations = 2 * self.factors[0].shape[0] ** 3
        product = counted.get("operations", 0) / operations
        return max(copied, read, product * timing.spread(self.ceilings["product"])[1])

    def reward(self, groups: int, dim: int, compile_too: bool) -> None:
        size = 102 * groups * dim * 2
        count = 2 if self.dry else max(2, min(8, -(-CACHE_BYTES // size)))
        sets = [
            (self.randn(groups, dim), self.randn(groups, dim), self.randn(groups, 100, dim))
            for _ in range(count)
        ]
        calls: dict[str, Call] = {}
        for name in self.backends("ranking_reward_and_grad"):
            op = functools.partial(elva_kernels.ranking_reward_and_grad, backend=name, **WEIGHTS)
            calls[f"ours, {name}"] = lambda i, op=op: op(*sets[i % count])
        for name, form in rivals.FORMS.items():
            run = rivals.value_and_grad(form, WEIGHTS)
            calls[name] = lambda i, run=run: run(*sets[i % count])
            if compile_too:
                fast = rivals.value_and_grad(rivals.compiled(form), WEIGHTS)
                calls[name.replace("eager", "compile")] = lambda i, run=fast: run(*sets[i % count])
        self.add("reward", f"{groups}x102x{dim}", calls, bytes=2 * size)

    def search(self, rows: int, queries: int, dim: int, k: int) -> None:
        corpus = self.randn(rows, dim)
        asked = [self.randn(queries, dim) for _ in range(4)]
        calls: dict[str, Call] = {}
        for name in self.backends("topk"):
            op = functools.partial(elva_kernels.topk, metric="dot", backend=name)
            calls[f"ours, {name}"] = lambda i, op=op: op(asked[i % 4], corpus, k)
        calls["torch eager, mm + topk"] = lambda i: torch.mm(asked[i % 4], corpus.mT).topk(k)
        counted = {"read": corpus.nbytes, "operations": 2 * queries * corpus.numel()}
        self.add("topk", f"{queries}x{rows}x{dim}", calls, **counted)

    def in_batch(self, size: int, dim: int) -> None:
        pairs = [(self.randn(size, dim), self.randn(size, dim)) for _ in range(2)]
        product = 2 * size * size * dim
        calls: dict[str, Call] = {}
        for name in self.backends("info_nce"):
            for symmetric in (False, True):
                run = in_batch_rivals.loss_and_grads(
                    functools.partial(elva_kernels.info_nce, symmetric=symmetric, backend=name)
                )
                title = f"ours, {name}" + (", symmetric" if symmetric else "")
                calls[title] = lambda i, run=run: run(pairs[i % 2])
        others = {
            "torch eager": in_batch_rivals.eager_loss,
            "torch eager, fp32 scores": in_batch_rivals.exact_loss,
            "torch linear_cross_entropy": in_batch_rivals.linear_loss,
            **in_batch_rivals.gpu_losses(),
        }
        for name, loss in others.items():
            if name in self.not_run:
                continue
            run = in_batch_rivals.loss_and_grads(loss)
            calls[name] = lambda i, run=run: run(pairs[i % 2])
        self.add("info_nce", f"{size}x{size}x{dim}", calls, operations=3 * product)
        calls = {
            f"ours, {name}": lambda i, name=name: elva_kernels.rank_statistics(
                *pairs[i % 2], k=10, backend=name
            )
            for name in self.backends("rank_statistics")
        }
        calls["torch eager, count + topk"] = lambda i: in_batch_rivals.statistics(*pairs[i % 2], 10)
        self.add("rank_statistics", f"{size}x{size}x{dim}", calls, operations=product)

    def overhead(self) -> None:
        """Microseconds of the host for a call on one small group, the device left to itself."""
        inputs = (self.randn(1, 64), self.randn(1, 64), self.randn(1, 8, 64))
        for name in self.backends("ranking_reward_and_grad"):
            run = functools.partial(elva_kernels.ranking_reward_and_grad, *inputs, backend=name)
            run()
            self.wait()
            start = time.perf_counter()
            for _ in range(200):
                run()
            taken = (time.perf_counter() - start) / 200 * 1e3
            self.wait()
            row = timing.row("host time of a call, 1x10x64", "bf16", f"ours, {name}", [taken] * 2)
            self.rows.append(row)


def measure(device: str, seconds: float) -> dict[str, Any]:
    """As `report` shows and keeps it; `seconds` a case."""
    bench = Bench(device, seconds)
    sizes = [(4, 64), (2, 128)] if bench.dry else [(64, 1536), (256, 1536), (1024, 1536)]
    sizes += [] if bench.dry else [(64, 3584), (256, 3584), (1024, 3584)]
    for groups, dim in sizes:
        bench.reward(groups, dim, compile_too=(groups, dim) == (256, 1536))
    for queries in (1, 16, 64, 256, 1024):
        bench.search(1000 if bench.dry else 1_000_000, queries, 64 if bench.dry else 1536, 10)
    for size in (64,) if bench.dry else (2048, 8192):
        bench.in_batch(size, 64 if bench.dry else 1536)
    bench.overhead()
    found = {}
    for name, factor in (("read", 1), ("copy", 2)):
        fast, median, slow = (
            factor * bench.buffer.nbytes / t / 1e6 for t in timing.spread(bench.ceilings[name])
        )
        best = factor * bench.buffer.nbytes / min(bench.ceilings[name]) / 1e6
        found[name] = {"gbps": median, "fast_gbps": fast, "slow_gbps": slow, "best_gbps": best}
    operations = 2 * bench.factors[0].shape[0] ** 3
    product = operations / timing.spread(bench.ceilings["product"])[1] / 1e9
    return {
        "op": "gpu",
        "machine": report.machine(bench.device.type) | {"product_tflops": round(product, 1)},
        "ceilings": found,
        "not_run": bench.not_run,
        "rows": bench.rows,
    }


def not_asked() -> dict[str, str]:
    """Rivals that are not measured here at all."""
    names = ("flashlib", "flashinfer", "quack", "cuVS", "FAISS")
    return dict.fromkeys(names, "no call of it is written yet")
