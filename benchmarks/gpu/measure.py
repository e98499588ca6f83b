"""A part that measures: `python -m benchmarks.gpu.measure DIR PART BACKEND GROUP...`.

Its providers take turns with one another and with the ceilings: read, copy and a product. It leaves
out what it has begun before, so that it can be started again behind a crash, and an op that has
crashed or hung. An op that is red is measured, and `collect` does not tell it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import elva_kernels
from benchmarks import timing
from benchmarks.gpu import lines
from benchmarks.gpu.cases import Built, Case, Cases
from benchmarks.gpu.clock import Call, Clock
from benchmarks.gpu.place import backends_of

GROUPS = ("reward", "reward_paths", "topk", "in_batch", "host")
OURS = ("ours", "torch eager", "torch linear_cross_entropy")
CALLS = 100  # between two looks at the clock, for the host's time of one


class Bench:
    """Figures of one part, a line each."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.directory, self.part, self.who = given.directory, given.part, tuple(given.who)
        self.device = "cpu" if given.dry_run else "cuda"
        self.backend = given.backend
        self.clock = Clock(self.device, given.seconds)
        size, side = (1 << 20, 256) if self.clock.dry else (1 << 30, 8192)
        self.buffer = torch.ones(size // 8, dtype=torch.int64, device=self.device)
        other = torch.zeros_like(self.buffer)
        factors = [torch.randn(side, side, device=self.device).bfloat16() for _ in range(2)]
        self.operations = 2 * side**3
        self.ceilings: dict[str, Call] = {
            "read": lambda _: self.buffer.sum(),
            "copy": lambda _: other.copy_(self.buffer),
            "product": lambda _: torch.mm(*factors),
        }

    def write(self, kind: str, name: str, **fields: Any) -> None:
        lines.write(self.directory, self.part, kind, name, **fields)

    def concerns(self, provider: str, op: str) -> dict[str, Any]:
        """Whose proofs a figure needs."""
        return {"ops": [op], "backend": self.backend} if provider.startswith("ours") else {}

    def case(self, case: Case) -> None:
        red = lines.crashed(lines.read(self.directory), case.op, self.backend)
        asked = [who for who in self.who if red is None or not who.startswith("ours")]
        if red is not None and "ours" in self.who:
            self.write("not run", f"{case.title}, ours, {self.backend}", verdict=f"red: {red}")
        concerned = {"ops": [case.op], "backend": self.backend} if "ours" in asked else {}
        self.write("begun", case.title, **concerned)
        start = time.perf_counter()
        try:
            self.measure(case, case.build(), asked)
        except torch.OutOfMemoryError as error:
            self.write("not run", case.title, verdict=f"out of memory: {str(error)[:200]}")
        seconds = round(time.perf_counter() - start, 2)
        self.write("case", case.title, seconds=seconds)
        print(f"{seconds:8.2f} s  {case.title}", flush=True)
        if not self.clock.dry:
            torch.cuda.empty_cache()

    def measure(self, case: Case, built: Built, asked: list[str]) -> None:
        calls = {
            name: call
            for name, call in built.calls.items()
            if any(name == who or name.startswith((f"{who},", f"{who} ")) for who in asked)
        }
        known = {}
        for name, call in list(calls.items()):
            try:
                call(0)
                known[name] = self.clock.warm(call)
            except Exception as error:  # noqa: BLE001 - the others' figures stay
                del calls[name]
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                self.write("not run", f"{case.title}, {name}", verdict=why)
                self.clock.wait()  # raises where the device is lost to this process
        if not calls:
            return
        for name, call in self.ceilings.items():
            known[name] = self.clock.warm(call)
        times = self.clock.in_turns(calls | self.ceilings, known)
        ceilings = {name: timing.row("-", "-", name, times.pop(name)) for name in self.ceilings}
        for name, row in ceilings.items():
            self.write("ceiling", name, case=case.title, **self.speed_of(name, row))
        floor_ms = self.floor_ms(built.counted, ceilings)
        for name, taken in times.items():
            row = timing.row(case.title, "bf16", name, taken)
            row |= {
                "host_us": known[name]["host_ms"] * 1e3,
                "of_floor": floor_ms / row["median_ms"],
            }
            if not self.clock.dry:
                row["extra_mb"] = known[name]["extra_mb"]
            moved = built.counted.get("bytes", built.counted.get("read"))
            if moved:
                row["gbps"] = moved / row["median_ms"] / 1e6
            if "operations" in built.counted:
                row["tflops"] = built.counted["operations"] / row["median_ms"] / 1e9
            title = f"{case.title}, {name}"
            self.write("figure", title, **self.concerns(name, case.op), **row)

    def speed_of(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        """A ceiling's row in its unit."""
        keys = {"": "median_ms", "fast_": "p20_ms", "slow_": "p80_ms", "best_": "best_ms"}
        if name == "product":
            return {f"{x}tflops": self.operations / row[key] / 1e9 for x, key in keys.items()}
        moved = self.buffer.nbytes * (2 if name == "copy" else 1)
        return {f"{x}gbps": moved / row[key] / 1e6 for x, key in keys.items()}

    def floor_ms(self, counted: dict[str, float], ceilings: dict[str, dict[str, Any]]) -> float:
        """The slower of bytes and operations, at the speeds of copy, read and product."""
        size, ms = self.buffer.nbytes, {name: row["median_ms"] for name, row in ceilings.items()}
        copied = counted.get("bytes", 0) / (2 * size) * ms["copy"]
        read = counted.get("read", 0) / size * ms["read"]
        return max(copied, read, counted.get("operations", 0) / self.operations * ms["product"])

    def host(self) -> None:
        """The host's time of every public op, called back to back on small inputs."""

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device).bfloat16()

        groups, pair = (randn(1, 64), randn(1, 64), randn(1, 8, 64)), (randn(16, 64), randn(16, 64))
        leaves = [x.clone().requires_grad_() for x in pair]
        inputs: dict[str, tuple[Any, ...]] = {
            "ranking_reward": groups,
            "ranking_reward_and_grad": groups,
            "reward_from_scores": (randn(1, 9).float(),),
            "rank_statistics": pair,
            "in_batch_ranking_reward": pair,
            "info_nce": pair,
            "info_nce_and_grad": pair,
            "info_nce with a graph": tuple(leaves),
            "topk": (randn(1, 64), randn(1000, 64), 10),
        }
        for name, given in inputs.items():
            op = name.split()[0]
            if self.backend not in backends_of(op, self.device, torch.bfloat16):
                continue
            title = f"host time of {name}"
            red = lines.crashed(lines.read(self.directory), op, self.backend)
            if red is not None:
                self.write("not run", f"{title}, ours, {self.backend}", verdict=f"red: {red}")
                continue
            concerned = {"ops": [op], "backend": self.backend}
            self.write("begun", title, **concerned)
            times = [self.host_ms(getattr(elva_kernels, op), given) for _ in range(6)][1:]
            row = timing.row(title, "bf16", f"ours, {self.backend}", times)
            row["host_us"] = row["median_ms"] * 1e3
            self.write("figure", f"{title}, ours, {self.backend}", **concerned, **row)
            self.write("case", title)

    def host_ms(self, op: Any, given: tuple[Any, ...]) -> float:
        self.clock.wait()
        count = 3 if self.clock.dry else CALLS
        start = time.perf_counter()
        for _ in range(count):
            op(*given, backend=self.backend)
        taken = (time.perf_counter() - start) / count * 1e3
        self.clock.wait()
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("part")
    parser.add_argument("backend")
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--who", action="append", help="providers, by how they begin")
    parser.add_argument("--seconds", type=float, default=0.6)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    given.who = given.who or list(OURS)
    torch.manual_seed(0)
    known = lines.read(given.directory)
    begun = {x["name"] for x in known if x["part"] == given.part and x["kind"] == "begun"}
    bench = Bench(given)
    for group in given.groups:
        if group == "host":
            bench.host()
            continue
        for case in Cases(bench.device, given.backend).of(group):
            if case.title not in begun:
                bench.case(case)


if __name__ == "__main__":
    main()
