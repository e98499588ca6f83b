"""The index: speed of exact search from the map, memory, building, and the engines' recall.

`python -m benchmarks.bench_index` builds 1,000,000 x 1536 in fp16 (3 GB on disk) and keeps
`benchmarks/results/index-<machine>.json`; `--rows` makes it smaller, `--queries 0` leaves out the
streaming pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from elva.index import Index, exact
from elva.index.engines import export, open_engine
from elva.model.identity import Identity

MODEL = Identity("random rows", "none", "none")
ENGINE_ROWS, ENGINE_DIM, ENGINE_QUERIES = 100_000, 256, 500
CHUNK = 16_384


def anonymous_mb() -> float:
    """Memory of this process that is not a mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def rows(count: int, dim: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, CHUNK):
        yield torch.randn(min(CHUNK, count - start), dim, generator=generator).half()


def seconds(call: Callable[[], Any], times: int = 7) -> float:
    """Median of a few calls after one that warms up."""
    call()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def large(place: Path, count: int, dim: int = 1536) -> dict[str, Any]:
    """Build, verify, search, and what it takes beside the map."""
    data = list(rows(count, dim))
    size = sum(part.nbytes for part in data)
    began = time.perf_counter()
    index = Index.build(place / "index", [f"14:{i}" for i in range(count)], data, model=MODEL)
    build = time.perf_counter() - began
    began = time.perf_counter()
    with open(place / "plain", "wb") as file:
        for part in data:
            file.write(part.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    plain = time.perf_counter() - began
    (place / "plain").unlink()
    del data
    began = time.perf_counter()
    index.verify()
    verify = time.perf_counter() - began
    found: dict[str, Any] = {
        "rows": count, "dim": dim, "bytes": size, "build_gbps": size / build / 1e9,
        "plain_write_gbps": size / plain / 1e9, "verify_gbps": size / verify / 1e9,
    }  # fmt: skip
    query = torch.randn(256, dim, generator=torch.Generator().manual_seed(1))
    flat = index.segments[0].embeddings.view(torch.int64).flatten()
    read = seconds(flat.sum)  # as benchmarks/ceilings.py reads, from the same map
    before = anonymous_mb()
    peak = before
    for count_of_queries in (1, 32, 256):
        asked = query[:count_of_queries]
        taken = seconds(lambda asked=asked: index.search(asked, 10), 5)
        found[f"search_q{count_of_queries}_ms"] = 1e3 * taken
        found[f"search_q{count_of_queries}_gbps"] = size / taken / 1e9
        peak = max(peak, anonymous_mb())
    found |= {
        "read_gbps": size / read / 1e9,
        "q1_of_read": read / (found["search_q1_ms"] / 1e3),
        "anonymous_mb_over": peak - before,
    }
    return found


def engines(place: Path, clustered: bool) -> list[dict[str, Any]]:
    """Recall@10 against exact and queries a second: rows in 1000 clusters, or in none (the worst
    case: nothing lies near anything)."""
    generator = torch.Generator().manual_seed(2)
    centres = clustered * torch.randn(1000, ENGINE_DIM, generator=generator)

    def drawn(count: int) -> Tensor:
        chosen = torch.randint(len(centres), (count,), generator=generator)
        return centres[chosen] + 0.7 * torch.randn(count, ENGINE_DIM, generator=generator)

    ids = [f"14:{i}" for i in range(ENGINE_ROWS)]
    place.mkdir()
    index = Index.build(place / "engines", ids, drawn(ENGINE_ROWS), model=MODEL)
    query = drawn(ENGINE_QUERIES)
    truth = index.search(query, 10).rows
    table = []
    for spec in ("exact", "faiss-ivf", "faiss-hnsw", f"milvus:{place}/items.db"):
        began = time.perf_counter()
        if spec != "exact":
            export(index, spec)
        built = time.perf_counter() - began
        engine = open_engine(index, spec)
        found = engine.search(query, 10).rows
        hits = sum(
            len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True)
        )
        one = seconds(lambda engine=engine: engine.search(query[:1], 10), 15)
        many = seconds(lambda engine=engine: engine.search(query, 10), 3)
        table.append({
            "engine": spec.split(":")[0], "clustered": clustered,
            "recall_at_10": hits / truth.numel(), "one_query_ms": 1e3 * one,
            "queries_a_second": len(query) / many, "export_seconds": built,
        })  # fmt: skip
        print(table[-1], flush=True)
    return table


def streaming(place: Path, queries: int, count: int, dim: int) -> dict[str, Any]:
    """What `elva evaluate` does: many queries against a mapped pool, one pass."""
    index = Index(place / "index", verify=False)
    asked = torch.randn(queries, dim, generator=torch.Generator().manual_seed(3))
    before = anonymous_mb()
    began = time.perf_counter()
    exact.search(asked, [s.embeddings for s in index.segments], 150)
    taken = time.perf_counter() - began
    return {"queries": queries, "rows": count, "depth": 150, "seconds": taken,
            "anonymous_mb_over": anonymous_mb() - before}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000, help="of the streaming pass")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found: dict[str, Any] = {"machine": report.machine(), "large": large(place, given.rows)}
        print(found["large"], flush=True)
        if given.queries:
            found["streaming"] = streaming(place, given.queries, given.rows, 1536)
            print(found["streaming"], flush=True)
        found["engines"] = [
            row
            for clustered in (True, False)
            for row in engines(place / f"clustered-{clustered}", clustered)
        ]
    print(report.write("index", found))


if __name__ == "__main__":
    main()
