"""Flat search by other libraries, each in a process of its own: beside torch they slow each other.

`python -m benchmarks.search_rivals NAME QUERIES ROWS DIM K THREADS SECONDS` prints a list of
milliseconds as JSON.
"""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RIVALS = {
    "faiss IndexFlatIP fp32": "faiss",
    "usearch exact fp32": "usearch",
    "sentence-transformers semantic_search fp32": "sentence_transformers",
}


def milliseconds(name: str, *sizes: int, seconds: float) -> list[float] | str:
    """The times of rival `name` for (queries, rows, dim, k, threads), or why there are none."""
    package = RIVALS[name]
    if importlib.util.find_spec(package) is None:
        return "not installed; pip install 'elva[rivals]'"
    command = [sys.executable, "-m", __spec__.name, package, *map(str, (*sizes, seconds))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return done.stderr.strip().rsplit("\n", 1)[-1] or f"exit status {done.returncode}"
    times: list[float] = json.loads(done.stdout)
    return times


def _faiss(corpus: Any, k: int, threads: int) -> Callable[[Any], Any]:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(corpus.shape[1])
    index.add(corpus)
    return lambda query: index.search(query, k)


def _usearch(corpus: Any, k: int, threads: int) -> Callable[[Any], Any]:
    from usearch.index import MetricKind, search

    return lambda query: search(corpus, query, k, MetricKind.IP, exact=True, threads=threads)


def _sentence_transformers(corpus: Any, k: int, threads: int) -> Callable[[Any], Any]:
    import torch
    from sentence_transformers.util import dot_score, semantic_search

    torch.set_num_threads(threads)
    rows = torch.from_numpy(corpus)
    return lambda query: semantic_search(query, rows, top_k=k, score_function=dot_score)


SEARCHES = {
    "faiss": _faiss,
    "usearch": _usearch,
    "sentence_transformers": _sentence_transformers,
}


def _faiss_on_a_gpu(corpus: Any, k: int) -> Callable[[Any], Any]:
    """Its search without an index, of tensors in float16: it takes no bfloat16."""
    import faiss
    import faiss.contrib.torch_utils  # lets it take tensors

    resources, rows = faiss.StandardGpuResources(), corpus.half()
    resources.setDefaultNullStreamAllDevices()  # torch's own
    score = faiss.METRIC_INNER_PRODUCT
    return lambda query: faiss.knn_gpu(resources, query.half(), rows, k, metric=score)


def _cuvs(corpus: Any, k: int) -> Callable[[Any], Any]:
    """Of float16: it takes no bfloat16. A call ends when its result is there."""
    from cuvs.neighbors import brute_force

    index = brute_force.build(corpus.half(), metric="inner_product")
    return lambda query: brute_force.search(index, query.half(), k)


# Beside torch in its process: their module, and what takes a corpus on the GPU and gives a search.
ON_A_GPU: dict[str, tuple[str, Callable[[Any, int], Callable[[Any], Any]]]] = {
    "FAISS knn_gpu fp16": ("faiss", _faiss_on_a_gpu),
    "cuVS brute force fp16": ("cuvs", _cuvs),
}


def main() -> None:
    package, *sizes, seconds = sys.argv[1:]
    n_queries, n_rows, dim, k, threads = map(int, sizes)
    random = np.random.default_rng(0)
    corpus = random.standard_normal((n_rows, dim), dtype=np.float32)
    query = random.standard_normal((n_queries, dim), dtype=np.float32)
    run = SEARCHES[package](corpus, k, threads)
    run(query)
    times: list[float] = []
    end = time.perf_counter() + float(seconds)
    while time.perf_counter() < end or len(times) < 7:
        start = time.perf_counter()
        run(query)
        times.append((time.perf_counter() - start) * 1e3)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
