"""The index: exact search by codes and by rows, memory, building, and other libraries beside it.

`python -m benchmarks.bench_index` builds 1,000,000 x 1536 in fp16 (3 GB on disk) and keeps
`benchmarks/results/index-<machine>.json`; `--rows` makes it smaller, `--queries 0` leaves out the
streaming pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import elva_kernels
from benchmarks import index_rivals, report
from elva.index import Index, exact
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


class Peak:
    """The most memory of this process, beside mapped files, while the block runs."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous_mb()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.most = max(self.most, anonymous_mb())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def over_mb(self) -> float:
        return self.most - self.before


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
    found["read_gbps"], found["searches"] = size / read / 1e9, []
    codes_bytes = sum(one.size for one in index.codes)
    for count_of_queries in (1, 32, 256):
        asked = query[:count_of_queries]
        with Peak() as memory:  # of both ways
            by_codes, by_rows, answer = in_turns(index, asked, 5)
        found["searches"].append({
            "queries": count_of_queries, "codes_ms": 1e3 * by_codes, "rows_ms": 1e3 * by_rows,
            "codes_over_rows": by_rows / by_codes, "rows_read": answer.rows_read,
            "proven": float(answer.by_codes.double().mean()),
            "codes_gbps": codes_bytes / by_codes / 1e9, "rows_gbps": size / by_rows / 1e9,
            "anonymous_mb_over": memory.over_mb,
        })  # fmt: skip
        print(found["searches"][-1], flush=True)
    return {**found, "codes_bytes": codes_bytes}


def in_turns(index: Index, query: Tensor, times: int) -> tuple[float, float, exact.Found]:
    """Median seconds by codes and by rows, of calls in turns, and the answer, which is one."""
    parts = [s.embeddings for s in index.segments]
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(times + 1):
        began = time.perf_counter()
        answer = index.search(query, 10)
        middle = time.perf_counter()
        right = exact.search(query, parts, 10)
        if turn:  # the first one warms up
            taken[0].append(middle - began)
            taken[1].append(time.perf_counter() - middle)
        assert torch.equal(answer.rows, right.rows)
        assert torch.equal(answer.scores, right.scores)
    return statistics.median(taken[0]), statistics.median(taken[1]), answer


def hard_cases(place: Path, count: int = 100_000, dim: int = 1536) -> list[dict[str, Any]]:
    """Where codes prove less: clusters, one large element, a collapsed model, copies."""
    plain = torch.cat([*rows(count, dim)]).float()
    generator = torch.Generator().manual_seed(4)
    centre = torch.randn(100, dim, generator=generator)
    kinds = {
        "random": plain,
        "100 clusters": centre[torch.randint(0, 100, (count,), generator=generator)] + 0.3 * plain,
        "an element of 40": torch.cat([plain[:, :-1], torch.full((count, 1), 40.0)], 1),
        "a collapsed model": 1 + 1e-3 * plain,
        "copies of one row": plain[:1].expand(count, dim),
    }
    table = []
    for kind, embeddings in kinds.items():
        ids = [f"14:{i}" for i in range(count)]
        index = Index.build(place / kind.replace(" ", "-"), ids, embeddings, model=MODEL)
        query = embeddings[:32] + 0.5 * embeddings.std() * torch.randn(32, dim, generator=generator)
        for queries in (1, 32):
            by_codes, by_rows, answer = in_turns(index, query[:queries], 3)
            table.append({
                "kind": kind, "queries": queries, "codes_ms": 1e3 * by_codes,
                "rows_ms": 1e3 * by_rows, "codes_over_rows": by_rows / by_codes,
                "rows_read": answer.rows_read,
                "proven": float(answer.by_codes.double().mean()),
            })  # fmt: skip
            print(table[-1], flush=True)
    return table


def rivals(place: Path, clustered: bool) -> list[dict[str, Any]]:
    """Recall@10, bytes read and queries a second: rows in 1000 clusters, or in none (the worst case
    for cells and graphs: nothing lies near anything)."""
    generator = torch.Generator().manual_seed(2)
    centres = clustered * torch.randn(1000, ENGINE_DIM, generator=generator)

    def drawn(count: int) -> Tensor:
        chosen = torch.randint(len(centres), (count,), generator=generator)
        one = centres[chosen] + 0.7 * torch.randn(count, ENGINE_DIM, generator=generator)
        return torch.nn.functional.normalize(one)

    place.mkdir()
    embeddings, query = drawn(ENGINE_ROWS), drawn(ENGINE_QUERIES)
    ids = [f"14:{i}" for i in range(ENGINE_ROWS)]
    index = Index.build(place / "index", ids, embeddings, model=MODEL)
    truth = index.search(query, 10)
    for name, x in (("rows", embeddings), ("query", query), ("truth", truth.rows)):
        np.save(place / f"{name}.npy", x.numpy())
    parts = [s.embeddings for s in index.segments]
    codes = [one.codes for one in index.codes]
    own = {
        # Of so small an index Index.search reads rows.
        "elva, codes": (
            lambda q: elva_kernels.coded_topk(q, parts, codes, 10),
            sum(one.size for one in index.codes),
        ),
        "elva, rows": (lambda q: exact.search(q, parts, 10), sum(p.nbytes for p in parts)),
    }
    table: list[dict[str, Any]] = []
    for name, (call, read) in own.items():
        one = seconds(lambda call=call: call(query[:1]), 15)
        many = seconds(lambda call=call: call(query), 3)
        rows_read = getattr(call(query[:1]), "rows_read", None) or 0
        table.append({
            "library": name, "clustered": clustered, "recall_at_10": 1.0, "one_query_ms": 1e3 * one,
            "queries_a_second": len(query) / many,
            "bytes_a_query": read + 2 * ENGINE_DIM * rows_read,
        })  # fmt: skip
    threads = torch.get_num_threads()
    for name in index_rivals.RIVALS:
        found = index_rivals.figures(name, place, 10, threads, 2.0)
        table.append({"library": name, "clustered": clustered, **found})
    for row in table:
        print(row, flush=True)
    return table


def streaming(place: Path, queries: int, count: int, dim: int) -> dict[str, Any]:
    """Many queries, many answers each."""
    index = Index(place / "index", verify=False)
    asked = torch.randn(queries, dim, generator=torch.Generator().manual_seed(3))
    with Peak() as memory:
        began = time.perf_counter()
        index.search(asked, 150)
        taken = time.perf_counter() - began
    return {"queries": queries, "rows": count, "depth": 150, "seconds": taken,
            "anonymous_mb_over": memory.over_mb}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000, help="of the streaming pass")
    parser.add_argument("--rivals", action="store_true", help="only these, into the kept file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found: dict[str, Any] = {"machine": report.machine()}
        if given.rivals:
            found = json.loads(report.path("index", found).read_text()) | {
                "machine of rivals": found["machine"]
            }
        else:
            found["large"] = large(place, given.rows)
            print(found["large"], flush=True)
        if given.queries and not given.rivals:
            found["streaming"] = streaming(place, given.queries, given.rows, 1536)
            print(found["streaming"], flush=True)
        if not given.rivals:
            found["hard cases"] = hard_cases(place)
        found["rivals"] = [
            row
            for clustered in (True, False)
            for row in rivals(place / f"clustered-{clustered}", clustered)
        ]
    print(report.write("index", found))


if __name__ == "__main__":
    main()
