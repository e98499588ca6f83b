"""Flat search against torch, the memory and the matrix product: `python -m benchmarks.bench_topk`.

Each case is checked against float64 first; a red op gets no speed. Ours, torch and the ceilings
take turns call by call; other libraries run in processes of their own, before them. The floor of a
case is the slower of one read of the corpus and a matrix product of its size in its dtype.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import elva_kernels
from benchmarks import search_rivals, timing
from benchmarks.ceilings import BYTES, Ceilings
from benchmarks.timing import DTYPES, Tally, extra_mb, spread, timed

ROWS, DIM, K = 100_000, 1536, 10
CASES = ((1, "bf16"), (16, "bf16"), (32, "bf16"), (256, "bf16"), (1, "fp32"), (32, "fp32"))
SECONDS = 3.0  # of measuring, per case under pytest
MAX_ERROR = 1e-5  # over |q| |c|
GEMM = (1024, DIM, 2048)  # m x k x n of the product that measures the arithmetic
Search = Callable[[Tensor], Any]


def searches_of(corpus: Tensor) -> dict[str, Search]:
    """Each takes a query [Q, D] and gives scores and index [Q, K]."""
    exact = corpus.float()
    found: dict[str, Search] = {
        "ours, dot": lambda q: elva_kernels.topk(q, corpus, K, metric="dot", backend="cpu"),
        "ours, cosine": lambda q: elva_kernels.topk(q, corpus, K, backend="cpu"),
        "torch mm + topk": lambda q: torch.mm(q, corpus.mT).topk(K),
    }
    if corpus.dtype != torch.float32:
        found["torch mm + topk, fp32 copy"] = lambda q: torch.mm(q.float(), exact.mT).topk(K)
    return found


def error_of(query: Tensor, corpus: Tensor, result: Any, cosine: bool) -> float:
    """Largest |score - truth| of the rows found, and of each place's best, over |q| |c|."""
    scores, index = result
    norms = query.double().norm(dim=-1, keepdim=True) * corpus.double().norm(dim=-1)
    truth = query.double() @ corpus.double().mT
    got = truth.gather(-1, index) / norms.gather(-1, index)
    found = scores.double() if cosine else scores.double() / norms.gather(-1, index)
    error = (found - got).abs().max().item()
    if cosine:
        missed = (truth / norms).topk(K).values - got
    else:
        missed = (truth.topk(K).values - truth.gather(-1, index)) / norms.gather(-1, index)
    return max(error, missed.abs().max().item())


def checked(name: str, run: Search, query: Tensor, corpus: Tensor) -> dict[str, Any]:
    """The error and the extra memory of a search; ends the program where ours is red."""
    result = run(query)
    error = error_of(query, corpus, result, cosine="cosine" in name)
    if name.startswith("ours"):
        again = run(query)
        if error > MAX_ERROR or any(
            not torch.equal(a, b) for a, b in zip(result, again, strict=True)
        ):
            sys.exit(f"topk: {name}, {query.dtype} is red: error {error}, or its bits differ")
    return {"score_error": error, "extra_mb": extra_mb(lambda: run(query), 12 * K * len(query))}


def measure(n_queries: int, dtype: str, seconds: float) -> tuple[Any, dict[str, list[float]]]:
    """Rows of one case, and the read, copy and product times that were taken in turns with it."""
    corpus = torch.randn(ROWS, DIM).to(DTYPES[dtype])
    queries = [torch.randn(n_queries, DIM).to(DTYPES[dtype]) for _ in range(4)]
    searches = searches_of(corpus)
    facts = {name: checked(name, run, queries[0], corpus) for name, run in searches.items()}
    ceilings = Ceilings()
    left, right = (torch.randn(x).to(DTYPES[dtype]) for x in (GEMM[:2], GEMM[1:]))
    turns: dict[str, Callable[[int], Any]] = {
        name: lambda i, run=run: run(queries[i % 4]) for name, run in searches.items()
    }
    turns |= {"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}
    turns["product"] = lambda _: torch.mm(left, right)
    times = timed(turns, seconds)
    corpus_bytes = corpus.numel() * corpus.element_size()
    operations = 2 * n_queries * corpus.numel()
    read_ms = corpus_bytes / BYTES * spread(times["read"])[1]
    product_ms = operations / (2 * GEMM[0] * GEMM[1] * GEMM[2]) * spread(times["product"])[1]
    rows = []
    for name in searches:
        row = timing.row(f"{n_queries}x{ROWS}x{DIM}", dtype, name, times[name])
        median = row["median_ms"]
        row |= {"gbps": corpus_bytes / median / 1e6, "gflops": operations / median / 1e6}
        row |= {"read_ms": read_ms, "product_ms": product_ms}
        row["of_floor"] = max(read_ms, product_ms) / median
        row["times_torch"] = spread(times["torch mm + topk"])[1] / median
        rows.append(row | facts[name])
    return rows, {name: times[name] for name in ("read", "copy")}


def others(n_queries: int, threads: int, seconds: float) -> tuple[list[Any], dict[str, str]]:
    """Rows of the libraries that are installed, and why the others were not run."""
    rows, not_run = [], {}
    for name in search_rivals.RIVALS:
        sizes = (n_queries, ROWS, DIM, K, threads)
        times = search_rivals.milliseconds(name, *sizes, seconds=seconds)
        if isinstance(times, str):
            not_run[name] = times
            continue
        row = timing.row(f"{n_queries}x{ROWS}x{DIM}", "fp32", name, times)
        row["gbps"] = 4 * ROWS * DIM / row["median_ms"] / 1e6
        row["gflops"] = 2 * n_queries * ROWS * DIM / row["median_ms"] / 1e6
        rows.append(row)
    return rows, not_run


@pytest.mark.parametrize(("n_queries", "dtype"), CASES)
def test_topk(n_queries: int, dtype: str, tally: Tally, benchmark: Any) -> None:
    run_case(tally, n_queries, dtype, torch.get_num_threads(), SECONDS)
    query, corpus = torch.randn(n_queries, DIM), torch.randn(ROWS, DIM)
    benchmark(elva_kernels.topk, query.to(DTYPES[dtype]), corpus.to(DTYPES[dtype]), K)


def run_case(tally: Tally, n_queries: int, dtype: str, threads: int, seconds: float) -> None:
    if dtype == "bf16":
        more, not_run = others(n_queries, threads, seconds / 2)
        tally.rows += more
        tally.not_run |= not_run
    tally.add(*measure(n_queries, dtype, seconds))


def main() -> None:
    arguments = timing.arguments("bench_topk", __doc__, quick="one query in bf16, no file")
    tally = Tally("topk")
    for n_queries, dtype in CASES[:1] if arguments.quick else CASES:
        run_case(tally, n_queries, dtype, arguments.threads, arguments.seconds)
    tally.tell(keep=not arguments.quick)


if __name__ == "__main__":
    main()
