"""Mining at scale: a pool of 1 M candidates, 100 k queries planned, a tenth of them mined.

`python -m benchmarks.bench_mine` generates the data and embeddings of 1536 dimensions (3 GB on
disk), plans both sizes, mines the smaller one, and keeps `benchmarks/results/mine-<machine>.json`.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.bench_index import CHUNK, anonymous_mb
from elva.commands.mine import Mining, mine, plan
from elva.data import mbeir
from elva.data.instructions import write_instructions
from elva.data.layout import file_stem
from elva.index import segment as segment_file
from elva.index.embeddings import Embeddings
from elva.model.identity import Identity

MODEL = Identity("clustered rows", "none", "none")
DIM, CLUSTERS, SPLIT = 1536, 20_000, "train"
STEM = file_stem("made", "t2t")


def clustered(count: int, seed: int) -> Iterator[Tensor]:
    """Rows around shared centres: rows of one cluster have a cosine of about 0.8."""
    centres = torch.randn(CLUSTERS, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        chosen = torch.arange(start, start + size) % CLUSTERS
        yield centres[chosen] + 0.5 * torch.randn(size, DIM, generator=generator)


def write_data(root: Path, queries: int, pool: int) -> None:
    """Query i asks for candidate i, of its own cluster; a fifth of the texts are copies."""
    pool_rows = (
        {
            "txt": f"Candidate number {i - CLUSTERS if i // CLUSTERS % 5 == 1 else i}.",
            "img_path": None,
            "modality": "text",
            "did": f"9:{i + 1}",
        }
        for i in range(pool)
    )
    mbeir.write_pool(root, STEM, pool_rows)
    rows = [
        {"qid": f"9:{i + 1}", "query_txt": f"Query number {i}.", "query_img_path": None,
         "query_modality": "text", "pos_cand_list": [f"9:{i + 1}"], "neg_cand_list": [],
         "task_id": 1}
        for i in range(queries)
    ]  # fmt: skip
    mbeir.write_queries(root, STEM, SPLIT, rows)
    write_instructions(root, "made", 9, {("text", "text"): ["Find its candidate."]})


def write_embeddings(place: Path, queries: int, pool: int) -> None:
    """What `elva embed` would have left, one shard each."""
    for name, side, count, seed in (
        (f"mbeir_{STEM}_{SPLIT}", "queries", queries, 1),
        (f"mbeir_{STEM}_cand_pool", "pool", pool, 2),
    ):
        made = Embeddings(place / name, count, count, MODEL, {"side": side})
        table = pa.table({"id": [f"9:{i + 1}" for i in range(count)]})
        made.shards[0].parent.mkdir(parents=True)
        chunks = clustered(count, seed)
        segment_file.write(made.shards[0], chunks, table, dim=DIM, dtype="float16", model=MODEL)
        made.save()


def measured(place: Path, queries: int, pool: int) -> dict[str, Any]:
    """Plan `queries` and mine a tenth of them."""
    write_data(place / "whole", queries, pool)
    write_data(place / "tenth", queries // 10, pool)
    write_embeddings(place / "embeddings", queries // 10, pool)
    mbeir.load(place / "tenth", split=SPLIT)  # the pool's table is made once, not mining's work
    found: dict[str, Any] = {}
    for name in ("whole", "tenth"):
        began = time.perf_counter()
        found[f"plan_{name}"] = plan(place / name, Mining(), split=SPLIT, dim=DIM)[STEM]
        found[f"plan_{name}_seconds"] = time.perf_counter() - began
    before, began = anonymous_mb(), time.perf_counter()
    counts = mine(place / "embeddings", place / "tenth", place / "mined", Mining(), split=SPLIT)
    return found | {
        "seconds": time.perf_counter() - began,
        "counts": asdict(counts[STEM]),
        "anonymous_mb_before": before,
        "anonymous_mb_after": anonymous_mb(),
        "peak_mb_with_the_map": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=100_000, help="planned; a tenth is mined")
    parser.add_argument("--pool", type=int, default=1_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measured(Path(name), given.queries, given.pool)
    print(found)
    print(report.write("mine", {"machine": report.machine(), **found}))


if __name__ == "__main__":
    main()
