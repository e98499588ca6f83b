"""InfoNCE over two gloo processes, against torch's all_gather: `python -m benchmarks.bench_group`.

Each process holds half of the queries and of the candidates and has one thread. Bytes are those
that the loopback interface carried, a process, over the rows of the other process. The losses are
checked against one another first; where they differ there is no speed.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
import torch.nn.functional as F
from torch import Tensor

import elva_kernels
from benchmarks import timing
from benchmarks.ceilings import Ceilings
from benchmarks.timing import DTYPES, Tally, timed

WORLD = 2
CASES = (  # queries of a process, candidates of a process, D, dtype
    (512, 512, 1536, "bf16"),
    (512, 512, 1536, "fp32"),
    (1024, 4096, 1536, "bf16"),
)
TEMPERATURE = 0.05
MAX_DIFFERENCE = 1e-4  # of the losses: a rival's scores are in float32 too
Provider = Callable[[Tensor, Tensor], Any]


def ours(query: Tensor, candidates: Tensor) -> Any:
    group = dist.group.WORLD
    options = {"temperature": TEMPERATURE, "symmetric": True, "group": group}
    return elva_kernels.info_nce_and_grad(query, candidates, **options)[:3]


def gathered(query: Tensor, candidates: Tensor) -> Any:
    """What a lab writes: unit rows of all processes by an all_gather that autograd follows."""
    leaves = [x.detach().requires_grad_() for x in (query, candidates)]
    mine = [F.normalize(x.float(), dim=-1) for x in leaves]
    q, c = (torch.cat(collectives.all_gather(x)) for x in mine)
    own = torch.arange(len(query)) + dist.get_rank() * len(query)
    target = own % len(query) + own // len(query) * len(candidates)
    columns = torch.arange(len(q)) % len(query) + torch.arange(len(q)) // len(query) * len(
        candidates
    )
    rows = F.cross_entropy(mine[0] @ c.T / TEMPERATURE, target)
    back = F.cross_entropy((c[columns] @ q.T / TEMPERATURE)[own], own)
    loss = (rows + back) / 2
    return loss.detach(), *torch.autograd.grad(loss, leaves)


PROVIDERS: dict[str, Provider] = {"ours": ours, "torch, all_gather + cross_entropy": gathered}


def carried() -> int:
    """Bytes that the loopback interface has received."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(x for x in lines if x.strip().startswith("lo:")).split(":")[1].split()[0])


def share(rank: int, folder: str, case: tuple[int, int, int, str], calls: int) -> None:
    """One process: leaves its times, bytes and losses in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    b, m, dim, dtype = case
    torch.manual_seed(rank)
    query = torch.randn(b, dim)
    candidates = torch.cat([query + torch.randn(b, dim), torch.randn(m - b, dim)])
    inputs = [x.to(DTYPES[dtype]) for x in (query, candidates)]
    found: dict[str, Any] = {}
    for name, run in PROVIDERS.items():
        loss = run(*inputs)[0]
        dist.all_reduce(loss)
        dist.barrier()
        before, times = carried(), []
        for _ in range(calls):
            start = time.perf_counter()
            run(*inputs)
            times.append((time.perf_counter() - start) * 1e3)
        dist.barrier()
        received = (carried() - before) / calls / WORLD
        rows = sum(x.nbytes for x in inputs) * (WORLD - 1)
        found[name] = {"times": times, "of_rows": received / rows, "loss": float(loss) / WORLD}
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def measure(case: tuple[int, int, int, str], calls: int) -> Any:
    """Rows of one case, and the read and copy times taken after it."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(share, (folder, case, calls), nprocs=WORLD)
        found = json.loads(Path(folder, "0.json").read_text(encoding="utf-8"))
    losses = [of["loss"] for of in found.values()]
    if max(losses) - min(losses) > MAX_DIFFERENCE:
        sys.exit(f"info_nce over processes: {case} is red: losses {losses}")
    ceilings = Ceilings()
    times = timed({"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}, 0.5)
    b, m, dim, dtype = case
    rows = []
    for name, of in found.items():
        row = timing.row(f"{WORLD} x {b}x{m}x{dim}", dtype, name, of["times"])
        rows.append(row | {"received_of_rows": of["of_rows"]})
    slowest = max(row["median_ms"] for row in rows)
    return [row | {"times_slowest": slowest / row["median_ms"]} for row in rows], times


def main() -> None:
    arguments = timing.arguments("bench_group", __doc__, quick="one size, no file")
    tally = Tally("group")
    for case in CASES[:1] if arguments.quick else CASES:
        tally.add(*measure(case, 5 if arguments.quick else 15))
    tally.tell(keep=not arguments.quick)


if __name__ == "__main__":
    main()
