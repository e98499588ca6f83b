"""Milliseconds of calls on a device, in turns, without the host's own time in them."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.place import flat

Call = Callable[[int], Any]
QUEUED = 5  # calls between two events
CYCLES_PER_MS = 2_000_000  # of the device's clock, about
MOST_SPIN_MS = 20.0


class Clock:
    """Of one device; on a CPU, for a dry run, a clock on the wall."""

    def __init__(self, device: str, seconds: float) -> None:
        self.dry, self.seconds = device == "cpu", seconds

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def warm(self, call: Call) -> dict[str, float]:
        """The milliseconds of a call that has run before, its host's part, its extra memory."""
        call(0)
        self.wait()
        extra_mb = float("nan") if self.dry else self.extra_mb(call)
        start = time.perf_counter()
        result = call(1)
        host = time.perf_counter() - start
        self.wait()
        whole = time.perf_counter() - start
        del result
        return {"ms": whole * 1e3, "host_ms": host * 1e3, "extra_mb": extra_mb}

    def extra_mb(self, call: Call) -> float:
        """Peak memory of a call beyond its inputs and results, by torch's allocator."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(0)
        self.wait()
        own = sum(x.nbytes for x in flat(result))
        return max(0.0, (torch.cuda.max_memory_allocated() - before - own) / 1e6)

    def in_turns(
        self, calls: dict[str, Call], known: dict[str, dict[str, float]]
    ) -> dict[str, list[float]]:
        """Of each provider's calls; `known` from `warm`, whose host's part is kept the least."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
            for name, call in calls.items():
                taken, host = self.one(call, len(times[name]), known[name])
                times[name].append(taken)
                known[name]["host_ms"] = min(known[name]["host_ms"], host)
        return times

    def one(self, call: Call, turn: int, known: dict[str, float]) -> tuple[float, float]:
        """The device's and the host's milliseconds of a call.

        Several are queued while the device spins, so that it waits for no launch.
        """
        if self.dry:
            start = time.perf_counter()
            call(turn)
            taken = (time.perf_counter() - start) * 1e3
            return taken, taken
        count = max(1, min(QUEUED, int(10 / max(known["ms"], 1e-3))))
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spin = min(MOST_SPIN_MS, 1.5 * count * known["host_ms"] + 0.05)
        torch.cuda._sleep(int(spin * CYCLES_PER_MS))
        first.record()
        start = time.perf_counter()
        for i in range(count):
            result = call(turn * count + i)
        host = (time.perf_counter() - start) * 1e3
        last.record()
        last.synchronize()
        del result
        return first.elapsed_time(last) / count, host / count
