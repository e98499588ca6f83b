"""The in-batch ops against torch and the matrix product: `python -m benchmarks.bench_in_batch`.

Each case is checked against float64 first; a red op gets no speed. Providers take turns call by
call. The floor is the product of queries and candidates alone in the inputs' dtype, whose scores
torch rounds to that dtype where ours are float32; InfoNCE with its gradients takes three of them.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import elva_kernels
from benchmarks import timing
from benchmarks.ceilings import Ceilings
from benchmarks.timing import DTYPES, Tally, extra_mb, spread, timed

DIM, K, TEMPERATURE = 1536, 10, 0.05
CASES = [
    (op, size, dtype)
    for op in ("info_nce", "rank_statistics")
    for size, dtype in ((1024, "bf16"), (4096, "bf16"), (256, "bf16"), (1024, "fp32"))
]
PRODUCTS = {"info_nce": 3, "rank_statistics": 1}
SECONDS = 6.0  # of measuring, per case under pytest
# Of the loss or the targets' scores; of the gradients over their norm, with their rounding.
MAX_SCORE_ERROR = {"bf16": 1e-5, "fp32": 1e-5}
MAX_GRAD_ERROR = {"bf16": 4e-3, "fp32": 1e-5}
Pair = tuple[Tensor, Tensor]
Provider = Callable[[Pair], Any]


def pair_of(size: int, dtype: torch.dtype) -> Pair:
    query = torch.randn(size, DIM)
    return query.to(dtype), (query + 4 * torch.randn(size, DIM)).to(dtype)


def loss_and_grads(loss: Callable[[Tensor, Tensor], Tensor]) -> Provider:
    """A pair -> the loss, then its gradients."""

    def run(pair: Pair) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in pair]
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def eager_loss(query: Tensor, candidates: Tensor) -> Tensor:
    """Scores in the inputs' dtype, the rest in float32, or in float64 for float64."""
    scores = F.normalize(query, dim=-1) @ F.normalize(candidates, dim=-1).T
    wide = torch.promote_types(scores.dtype, torch.float32)
    return F.cross_entropy(scores.to(wide) / TEMPERATURE, torch.arange(len(query)))


def exact_loss(query: Tensor, candidates: Tensor) -> Tensor:
    return eager_loss(query.float(), candidates.float())


def eager_statistics(pair: Pair) -> Tensor:
    query, candidates = (F.normalize(x, dim=-1) for x in pair)
    scores = query @ candidates.T
    target = scores.diagonal().unsqueeze(1)
    rank = (scores >= target).sum(1)
    scores.topk(K + 1)
    return torch.stack([rank, target.squeeze(1)])


def ours_loss(query: Tensor, candidates: Tensor) -> Tensor:
    return elva_kernels.info_nce(query, candidates, temperature=TEMPERATURE)


PROVIDERS: dict[str, dict[str, Provider]] = {
    "info_nce": {
        "ours": loss_and_grads(ours_loss),
        "torch eager": loss_and_grads(eager_loss),
        "torch eager, fp32 scores": loss_and_grads(exact_loss),
    },
    "rank_statistics": {
        "ours": lambda pair: elva_kernels.rank_statistics(*pair, k=K),
        "torch eager, count + topk": eager_statistics,
    },
}


def checked(op: str, name: str, run: Provider, pair: Pair, dtype: str) -> dict[str, Any]:
    """The errors against float64 and the extra memory; ends the program where ours is red."""
    result = run(pair)
    facts: dict[str, Any] = {}
    if op == "info_nce":
        loss, *gradients = result
        right, *expected = loss_and_grads(eager_loss)((pair[0].double(), pair[1].double()))
        facts["score_error"] = (loss.double() - right).abs().item()
        facts["grad_error"] = max(
            ((gradient.double() - truth).norm() / truth.norm()).item()
            for gradient, truth in zip(gradients, expected, strict=True)
        )
    elif name == "ours":
        query, candidates = (F.normalize(x.double(), dim=-1) for x in pair)
        scores = query @ candidates.T
        truth = scores.diagonal()
        facts["score_error"] = (result.target_score.double() - truth).abs().max().item()
        # Scores as near as rounding may fall on either side.
        gap, room = scores - truth.unsqueeze(1), 2 * MAX_SCORE_ERROR[dtype]
        fewest, most = (gap > room).sum(1) + 1, (gap > -room).sum(1)
        if bool(((result.rank < fewest) | (result.rank > most)).any()):
            sys.exit(f"{op}: {dtype} is red: a rank is not that of float64's scores")
    if name == "ours":
        red = facts["score_error"] > MAX_SCORE_ERROR[dtype]
        if red or facts.get("grad_error", 0.0) > MAX_GRAD_ERROR[dtype]:
            sys.exit(f"{op}: {dtype} is red: errors {facts}")
    gradient_bytes = sum(x.nbytes for x in pair) if op == "info_nce" else 0
    return facts | {"extra_mb": extra_mb(lambda: run(pair), gradient_bytes)}


def measure(
    op: str, size: int, dtype: str, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Rows of one case, and the read and copy times that were taken in turns with it."""
    pairs = [pair_of(size, DTYPES[dtype]) for _ in range(2)]
    providers = PROVIDERS[op]
    facts = {name: checked(op, name, run, pairs[0], dtype) for name, run in providers.items()}
    ceilings = Ceilings()
    turns: dict[str, Callable[[int], Any]] = {
        name: lambda i, run=run: run(pairs[i % 2]) for name, run in providers.items()
    }
    turns["product"] = lambda i: torch.mm(pairs[i % 2][0], pairs[i % 2][1].T)
    turns |= {"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}
    times = timed(turns, seconds)
    product_ms = PRODUCTS[op] * spread(times["product"])[1]
    eager = min(spread(times[name])[1] for name in providers if name != "ours")
    rows = []
    for name in providers:
        row = timing.row(f"{op} {size}x{size}x{DIM}", dtype, name, times[name])
        row["gflops"] = PRODUCTS[op] * 2 * size * size * DIM / row["median_ms"] / 1e6
        row |= {"product_ms": product_ms, "of_floor": product_ms / row["median_ms"]}
        row["times_eager"] = eager / row["median_ms"]
        rows.append(row | facts[name])
    return rows, {name: times[name] for name in ("read", "copy")}


@pytest.mark.parametrize(("op", "size", "dtype"), CASES)
def test_in_batch(op: str, size: int, dtype: str, tally: Tally, benchmark: Any) -> None:
    tally.add(*measure(op, size, dtype, SECONDS))
    benchmark(PROVIDERS[op]["ours"], pair_of(size, DTYPES[dtype]))


def main() -> None:
    arguments = timing.arguments("bench_in_batch", __doc__, quick="one size in bf16, no file")
    tally = Tally("in_batch")
    for case in CASES[:1] if arguments.quick else CASES:
        tally.add(*measure(*case, arguments.seconds))
    tally.tell(keep=not arguments.quick)


if __name__ == "__main__":
    main()
