"""The in-batch ops against torch and the matrix product: `python -m benchmarks.bench_in_batch`.

Each case is checked against float64 first; a red op gets no speed. Providers take turns call by
call. The floor is the product of queries and candidates alone in the inputs' dtype, whose scores
torch rounds to that dtype where ours are float32; an op with its gradients takes three of them.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import elva_kernels
from benchmarks import in_batch_rivals, timing
from benchmarks.ceilings import Ceilings
from benchmarks.in_batch_rivals import TEMPERATURE, loss_and_grads
from benchmarks.timing import DTYPES, Tally, extra_mb, spread, timed

DIM, K, HEAD = 1536, 10, 100
WEIGHTS = {"margin": 0.1, "rank_penalty": 0.01, "w_margin": 0.4, "w_rank": 0.6}
SIZES = (
    (1024, "bf16"),
    (4096, "bf16"),
    (256, "bf16"),
    (64, "bf16"),
    (1024, "fp32"),
    (256, "fp32"),
    (64, "fp32"),
)
CASES = [
    (op, size, dtype)
    for op in ("info_nce", "rank_statistics", "in_batch_ranking_reward")
    for size, dtype in SIZES
]
PAIRED = [(op, dtype) for op in ("info_nce", "rank_statistics") for dtype in ("bf16", "fp32")]
PAIRED_SIZE, POSITIVES, EXCLUDED = 4096, 4, 0.01
PRODUCTS = {"info_nce": 3, "rank_statistics": 1, "in_batch_ranking_reward": 3}
SECONDS = 4.0  # of measuring, per case under pytest
# Of the loss or the targets' scores; of the gradients over their norm, with their rounding.
MAX_SCORE_ERROR = {"bf16": 1e-5, "fp32": 1e-5}
MAX_GRAD_ERROR = {
    "info_nce": {"bf16": 4e-3, "fp32": 1e-5},
    # Negatives whose scores differ by less than float32 tells may change places, and slopes.
    "in_batch_ranking_reward": {"bf16": 4e-3, "fp32": 1e-3},
}
Pair = tuple[Tensor, Tensor]
Provider = Callable[[Pair], Any]


def pair_of(size: int, dtype: torch.dtype) -> Pair:
    query = torch.randn(size, DIM)
    return query.to(dtype), (query + 4 * torch.randn(size, DIM)).to(dtype)


def our_loss(query: Tensor, candidates: Tensor) -> Tensor:
    return elva_kernels.info_nce(query, candidates, temperature=TEMPERATURE)


def our_reward_loss(query: Tensor, candidates: Tensor) -> Tensor:
    result = elva_kernels.in_batch_ranking_reward(query, candidates, head=HEAD, **WEIGHTS)
    return -result.reward.mean()


eager_reward_loss = functools.partial(in_batch_rivals.reward_loss, weights=WEIGHTS, head=HEAD)


def exact_reward_loss(query: Tensor, candidates: Tensor) -> Tensor:
    return eager_reward_loss(query.float(), candidates.float())


PROVIDERS: dict[str, dict[str, Provider]] = {
    "info_nce": {
        "ours": loss_and_grads(our_loss),
        "torch eager": loss_and_grads(in_batch_rivals.eager_loss),
        "torch eager, fp32 scores": loss_and_grads(in_batch_rivals.exact_loss),
        "torch linear_cross_entropy": loss_and_grads(in_batch_rivals.linear_loss),
        "sentence-transformers": in_batch_rivals.sentence_transformers,
    },
    "rank_statistics": {
        "ours": lambda pair: elva_kernels.rank_statistics(*pair, k=K),
        "torch eager, count + topk, fp32 scores": lambda pair: in_batch_rivals.statistics(
            pair[0].float(), pair[1].float(), K
        ),
        "torch eager, count + topk": lambda pair: in_batch_rivals.statistics(*pair, K),
    },
    "in_batch_ranking_reward": {
        "ours": loss_and_grads(our_reward_loss),
        "torch eager": loss_and_grads(eager_reward_loss),
        "torch eager, fp32 scores": loss_and_grads(exact_reward_loss),
    },
}
TRUTHS = {"info_nce": in_batch_rivals.eager_loss, "in_batch_ranking_reward": eager_reward_loss}


def providers_of(op: str, compile_too: bool) -> tuple[dict[str, Provider], dict[str, str]]:
    """Those that can run here, and why the others cannot."""
    providers = dict(PROVIDERS[op])
    if op != "info_nce":
        return providers, {}
    not_run = in_batch_rivals.absent()
    for name in not_run:
        providers.pop(name, None)
    if compile_too:
        fast = in_batch_rivals.compiled(in_batch_rivals.eager_loss)
        providers["torch compile"] = loss_and_grads(fast)
    return providers, not_run


def truth_of(op: str, pair: Pair) -> Any:
    """In float64: a loss and its gradients, or the scores."""
    query, candidates = (x.double() for x in pair)
    if op in TRUTHS:
        return loss_and_grads(TRUTHS[op])((query, candidates))
    return F.normalize(query, dim=-1) @ F.normalize(candidates, dim=-1).T


def checked(
    op: str, name: str, run: Provider, pair: Pair, truth: Any, dtype: str
) -> dict[str, Any]:
    """The errors and the extra memory of a provider; ends the program where ours is red."""
    result = run(pair)
    facts: dict[str, Any] = {}
    if op in TRUTHS:
        (loss, *gradients), (right, *expected) = result, truth
        facts["score_error"] = (loss.double() - right).abs().item()
        facts["grad_error"] = max(
            ((gradient.double() - exact).norm() / exact.norm()).item()
            for gradient, exact in zip(gradients, expected, strict=True)
        )
    elif name == "ours":
        targets = truth.diagonal()
        facts["score_error"] = (result.target_score.double() - targets).abs().max().item()
        # Scores as near as rounding may fall on either side.
        gap, room = truth - targets.unsqueeze(1), 2 * MAX_SCORE_ERROR[dtype]
        fewest, most = (gap > room).sum(1) + 1, (gap > -room).sum(1)
        if bool(((result.rank < fewest) | (result.rank > most)).any()):
            sys.exit(f"{op}: {dtype} is red: a rank is not that of float64's scores")
    if name == "ours":
        red = facts["score_error"] > MAX_SCORE_ERROR[dtype]
        if red or (op in TRUTHS and facts["grad_error"] > MAX_GRAD_ERROR[op][dtype]):
            sys.exit(f"{op}: {dtype} is red: errors {facts}")
    gradient_bytes = sum(x.nbytes for x in pair) if op in TRUTHS else 0
    return facts | {"extra_mb": extra_mb(lambda: run(pair), gradient_bytes)}


def measure(tally: Tally, op: str, size: int, dtype: str, seconds: float) -> None:
    """Adds the rows of one case, and the read and copy times that were taken in turns with it."""
    pairs = [pair_of(size, DTYPES[dtype]) for _ in range(2)]
    providers, not_run = providers_of(op, compile_too=(size, dtype) == SIZES[0])
    tally.not_run |= not_run
    truth = truth_of(op, pairs[0])
    facts = {
        name: checked(op, name, run, pairs[0], truth, dtype) for name, run in providers.items()
    }
    del truth
    ceilings = Ceilings()
    turns: dict[str, Callable[[int], Any]] = {
        name: lambda i, run=run: run(pairs[i % 2]) for name, run in providers.items()
    }
    turns["product"] = lambda i: torch.mm(pairs[i % 2][0], pairs[i % 2][1].T)
    turns |= {"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}
    times = timed(turns, seconds)
    product_ms = PRODUCTS[op] * spread(times["product"])[1]
    eager = min(spread(times[name])[1] for name in providers if "eager" in name)
    rows = []
    for name in providers:
        row = timing.row(f"{op} {size}x{size}x{DIM}", dtype, name, times[name])
        row["gflops"] = PRODUCTS[op] * 2 * size * size * DIM / row["median_ms"] / 1e6
        row |= {"product_ms": product_ms, "of_floor": product_ms / row["median_ms"]}
        row["times_eager"] = eager / row["median_ms"]
        rows.append(row | facts[name])
    tally.add(rows, {name: times[name] for name in ("read", "copy")})


def pairs_of(size: int) -> dict[str, dict[str, Tensor]]:
    """What else a call is told: several positives, and pairs in no order that are no negatives."""
    target = (torch.arange(size).unsqueeze(1) + torch.arange(POSITIVES) * (size // 7)) % size
    pairs = torch.randint(size, (int(EXCLUDED * size * size), 2))
    excluded = pairs[(target[pairs[:, 0]] != pairs[:, 1:]).all(1)]
    return {
        "ours": {},
        f"ours, {POSITIVES} positives": {"target": target},
        f"ours, {EXCLUDED:.0%} excluded": {"excluded": excluded},
        "ours, both": {"target": target, "excluded": excluded},
    }


def measure_pairs(tally: Tally, op: str, dtype: str, seconds: float) -> None:
    """Adds what positives and excluded pairs cost beside the plain call."""
    pair = pair_of(PAIRED_SIZE, DTYPES[dtype])

    def call(told: dict[str, Tensor]) -> Any:
        if op == "rank_statistics":
            return elva_kernels.rank_statistics(*pair, **told)
        loss = functools.partial(elva_kernels.info_nce, temperature=TEMPERATURE, **told)
        return loss_and_grads(loss)(pair)

    turns: dict[str, Callable[[int], Any]] = {
        name: lambda _, told=told: call(told) for name, told in pairs_of(PAIRED_SIZE).items()
    }
    ceilings = Ceilings()
    turns |= {"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}
    times = timed(turns, seconds)
    plain = spread(times["ours"])[1]
    case = f"{op} {PAIRED_SIZE}x{PAIRED_SIZE}x{DIM}, told"
    rows = [timing.row(case, dtype, name, times[name]) for name in turns if name.startswith("ours")]
    for row in rows:
        row["times_plain"] = row["median_ms"] / plain
    tally.add(rows, {name: times[name] for name in ("read", "copy")})


@pytest.mark.parametrize(("op", "dtype"), PAIRED)
def test_in_batch_pairs(op: str, dtype: str, tally: Tally) -> None:
    measure_pairs(tally, op, dtype, SECONDS)


@pytest.mark.parametrize(("op", "size", "dtype"), CASES)
def test_in_batch(op: str, size: int, dtype: str, tally: Tally, benchmark: Any) -> None:
    measure(tally, op, size, dtype, SECONDS)
    benchmark(PROVIDERS[op]["ours"], pair_of(size, DTYPES[dtype]))


def main() -> None:
    most = "queries, in a case that is measured"
    quick = "one size in bf16, no file"
    arguments = timing.arguments("bench_in_batch", __doc__, quick=quick, most=most)
    tally = Tally("in_batch")
    cases = [case for case in CASES if case[1] <= arguments.most]
    for case in cases[:1] if arguments.quick else cases:
        measure(tally, *case, arguments.seconds)
    for paired in [] if arguments.quick or arguments.most < PAIRED_SIZE else PAIRED:
        measure_pairs(tally, *paired, arguments.seconds)
    tally.tell(keep=not arguments.quick)


if __name__ == "__main__":
    main()
