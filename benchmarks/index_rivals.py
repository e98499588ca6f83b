"""Search of one index by other libraries, each in a process of its own: beside torch they slow each
other.

`python -m benchmarks.index_rivals NAME DIRECTORY K THREADS SECONDS` reads `rows.npy`, `query.npy`
(float32, unit rows) and `truth.npy` of DIRECTORY and prints what it found as JSON.
"""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Search(NamedTuple):
    """One library's index.

    Args:
        find: queries [Q, D] -> rows [Q, k].
        bytes_a_query: of vectors read, after a search of so many queries; None where it does not
            say.
    """

    find: Callable[[Any], Any]
    bytes_a_query: Callable[[int], float | None]


RIVALS = {
    "FAISS flat": "faiss",
    "FAISS SQ8 + refine": "faiss",
    "FAISS IVF": "faiss",
    "FAISS HNSW": "faiss",
    "usearch i8": "usearch",
    "milvus-lite FLAT": "pymilvus",
}


def figures(name: str, directory: Path, k: int, threads: int, seconds: float) -> dict[str, Any]:
    """What rival `name` found and how fast, or `error`: why there is nothing."""
    if importlib.util.find_spec(RIVALS[name]) is None:
        return {"error": "not installed; pip install 'elva[rivals,milvus]'"}
    command = [sys.executable, "-m", __spec__.name, name, str(directory)]
    command += map(str, (k, threads, seconds))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return {"error": done.stderr.strip().rsplit("\n", 1)[-1] or f"status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _flat(rows: Any, k: int, threads: int) -> Search:
    faiss = _faiss(threads)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return Search(lambda query: index.search(query, k)[1], lambda _: rows.nbytes)


def _sq8(rows: Any, k: int, threads: int) -> Search:
    """8-bit codes propose 4 k rows, whose float32 rows decide."""
    faiss = _faiss(threads)
    coded = faiss.IndexScalarQuantizer(
        rows.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index = faiss.IndexRefineFlat(coded)
    index.train(rows)
    index.add(rows)
    index.k_factor = 4
    read = rows.size + 4 * k * rows.shape[1] * 4
    return Search(lambda query: index.search(query, k)[1], lambda _: read)


def _ivf(rows: Any, k: int, threads: int) -> Search:
    """4 sqrt(n) lists, of which a sixteenth is read, as elva's own engine does."""
    faiss = _faiss(threads)
    dim, lists = rows.shape[1], int(4 * len(rows) ** 0.5)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.train(rows[: 64 * lists])
    index.add(rows)
    index.nprobe = lists // 16
    stats = faiss.cvar.indexIVF_stats
    stats.reset()
    return Search(lambda query: index.search(query, k)[1], lambda n: 4 * dim * stats.ndis / n)


def _hnsw(rows: Any, k: int, threads: int) -> Search:
    """M = 32, efConstruction = 200, efSearch = 64, as elva's own engine has them."""
    faiss = _faiss(threads)
    dim = rows.shape[1]
    index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 200, 64
    index.add(rows)
    stats = faiss.cvar.hnsw_stats
    stats.reset()
    return Search(lambda query: index.search(query, k)[1], lambda n: 4 * dim * stats.ndis / n)


def _usearch(rows: Any, k: int, threads: int) -> Search:
    from usearch.index import Index

    index = Index(ndim=rows.shape[1], metric="cos", dtype="i8")
    index.add(np.arange(len(rows)), rows, threads=threads)
    computed = []

    def find(query: Any) -> Any:
        found = index.search(query, k, threads=threads)
        computed.append(found.computed_distances)
        return found.keys.reshape(len(query), k)

    return Search(find, lambda n: rows.shape[1] * sum(computed) / n)


def _milvus(rows: Any, k: int, threads: int) -> Search:
    import tempfile

    from pymilvus import MilvusClient

    client = MilvusClient(str(Path(tempfile.mkdtemp()) / "items.db"))
    client.create_collection("items", dimension=rows.shape[1], metric_type="IP", auto_id=False)
    for first in range(0, len(rows), 4096):
        block = rows[first : first + 4096]
        client.insert(
            "items",
            [{"id": first + i, "vector": row} for i, row in enumerate(block.tolist())],
        )

    client.flush("items")
    client.load_collection("items")

    def find(query: Any) -> Any:
        found = client.search("items", data=query.tolist(), limit=k)
        return np.array([[hit["id"] for hit in hits] for hits in found])

    return Search(find, lambda _: None)


def _faiss(threads: int) -> Any:
    import faiss

    faiss.omp_set_num_threads(threads)
    return faiss


SEARCHES: dict[str, Callable[[Any, int, int], Search]] = {
    "FAISS flat": _flat,
    "FAISS SQ8 + refine": _sq8,
    "FAISS IVF": _ivf,
    "FAISS HNSW": _hnsw,
    "usearch i8": _usearch,
    "milvus-lite FLAT": _milvus,
}


def main() -> None:
    name, directory, *sizes, seconds = sys.argv[1:]
    k, threads = map(int, sizes)
    rows, query, truth = (np.load(Path(directory) / f"{x}.npy") for x in ("rows", "query", "truth"))
    began = time.perf_counter()
    search = SEARCHES[name](rows, k, threads)
    built = time.perf_counter() - began
    found = search.find(query)
    read = search.bytes_a_query(len(query))
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True))
    print(json.dumps({
        "recall_at_10": hits / truth.size,
        "bytes_a_query": read,
        "one_query_ms": 1e3 * _median(lambda: search.find(query[:1]), float(seconds)),
        "queries_a_second": len(query) / _median(lambda: search.find(query), float(seconds)),
        "build_seconds": built,
    }))  # fmt: skip


def _median(call: Callable[[], Any], seconds: float) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
