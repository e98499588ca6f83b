"""The grouped reward against torch and the memory: `python -m benchmarks.bench_reward`.

Each case is checked against float64 first; a red op gets no speed. Providers take turns call by
call, so that what else the machine does meets all of them alike; inputs rotate over sets that
together exceed the caches. Every call allocates its results, as a user's does.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import elva_kernels
from benchmarks import rivals, timing
from benchmarks.ceilings import BYTES, Ceilings
from benchmarks.timing import DTYPES, Tally, extra_mb, spread, timed

WEIGHTS = {"margin": 0.1, "rank_penalty": 0.01, "w_margin": 0.4, "w_rank": 0.6}
# groups x rows x D: one query, one positive and rows - 2 negatives a group.
SIZES = (
    (1, 10, 64),
    (8, 10, 256),
    (1, 102, 1536),
    (8, 102, 1536),
    (64, 102, 1536),
    (64, 102, 3584),
)
HEADLINE = (64, 102, 1536)  # the size that every dtype and torch.compile are measured at
CASES = [
    (HEADLINE, "bf16"),
    *((size, "bf16") for size in SIZES if size != HEADLINE),
    *((HEADLINE, dtype) for dtype in DTYPES if dtype != "bf16"),
]
# groups x rows x D out of a bank of so many rows, bfloat16: a fresh draw for each call.
BANK = (64, 101, 1536, 100_000)
SECONDS = 3.0  # of measuring, per case under pytest
MAX_SCORE_ERROR = {"bf16": 1e-6, "fp16": 1e-6, "fp32": 1e-6, "fp64": 1e-13}
MAX_GRAD_ERROR = {"bf16": 2e-6, "fp16": 2e-6, "fp32": 2e-6, "fp64": 1e-13}
Inputs = tuple[Tensor, Tensor, Tensor]
Provider = Callable[..., Any]


def inputs_of(groups: int, rows: int, dim: int, dtype: torch.dtype) -> Inputs:
    query = torch.randn(groups, dim)
    positive = query + torch.randn(groups, dim)
    return query.to(dtype), positive.to(dtype), torch.randn(groups, rows - 2, dim).to(dtype)


def ours(*inputs: Tensor) -> Any:
    return elva_kernels.ranking_reward_and_grad(*inputs, **WEIGHTS)


def ours_autograd(*inputs: Tensor) -> Any:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(elva_kernels.ranking_reward(*leaves, **WEIGHTS).reward.sum(), leaves)


def errors_of(inputs: Inputs, gradients: Any, scores: Tensor | None) -> tuple[float | None, float]:
    """Largest |score - truth|, and |gradient - truth| * |row| beyond half an ulp of the dtype."""
    exact = tuple(x.double() for x in inputs)
    truth, *expected = elva_kernels.ranking_reward_and_grad(*exact, **WEIGHTS, backend="reference")
    half_ulp = torch.finfo(inputs[0].dtype).eps / 2
    grad_error = 0.0
    for row, gradient, right in zip(exact, gradients, expected, strict=True):
        excess = (gradient.double() - right).abs() - half_ulp * right.abs()
        grad_error = max(grad_error, (excess * row.norm(dim=-1, keepdim=True)).max().item())
    score_error = None if scores is None else (scores.double() - truth.scores).abs().max().item()
    return score_error, grad_error


def providers_of(compile_too: bool) -> dict[str, Provider]:
    found: dict[str, Provider] = {"ours, value and grad": ours, "ours, autograd": ours_autograd}
    for name, form in rivals.FORMS.items():
        found[name] = rivals.value_and_grad(form, WEIGHTS)
        if compile_too:
            fast = rivals.value_and_grad(rivals.compiled(form), WEIGHTS)
            found[name.replace("eager", "compile")] = fast
    return found


def checked(name: str, run: Provider, inputs: Inputs, dtype: str) -> dict[str, float | None]:
    """The errors and the extra memory of a provider; ends the run where ours is red."""
    result = run(*inputs)
    gradients, scores = (result[1:], result[0].scores) if run is ours else (result, None)
    score_error, grad_error = errors_of(inputs, gradients, scores)
    del result, gradients
    red = (score_error or 0.0) > MAX_SCORE_ERROR[dtype] or grad_error > MAX_GRAD_ERROR[dtype]
    if name.startswith("ours") and red:
        sys.exit(f"reward: {name}, {dtype} is red: errors {score_error}, {grad_error}")
    result_bytes = sum(x.numel() * x.element_size() for x in inputs)
    extra = extra_mb(lambda: run(*inputs), result_bytes)
    return {"score_error": score_error, "grad_error": grad_error, "extra_mb": extra}


def measure(size: tuple[int, int, int], dtype: str, seconds: float, compile_too: bool) -> Any:
    """Rows of one case, and the copy and read times that were taken in turns with it."""
    first = inputs_of(*size, DTYPES[dtype])
    input_bytes = sum(x.numel() * x.element_size() for x in first)
    count = min(16, max(2, -(-(128 << 20) // input_bytes)))
    sets = [first, *(inputs_of(*size, DTYPES[dtype]) for _ in range(count - 1))]
    providers = providers_of(compile_too)
    facts = {name: checked(name, run, first, dtype) for name, run in providers.items()}
    ceilings = Ceilings()
    turns: dict[str, Callable[[int], Any]] = {
        name: lambda i, run=run: run(*sets[i % count]) for name, run in providers.items()
    }
    turns |= {"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}
    times = timed(turns, seconds)
    copy_gbps = 2 * BYTES / spread(times["copy"])[1] / 1e6
    eager = min(spread(times[name])[1] for name in rivals.FORMS)
    rows = []
    for name in providers:
        row = timing.row("x".join(map(str, size)), dtype, name, times[name])
        gbps = 2 * input_bytes / row["median_ms"] / 1e6
        row |= {"gbps": gbps, "copy_gbps": copy_gbps}
        row |= {"of_copy": gbps / copy_gbps, "times_eager": eager / row["median_ms"]}
        rows.append(row | facts[name])
    return rows, {name: times[name] for name in ("read", "copy")}


def bank_providers(query: Tensor, positive: Tensor, bank: Tensor) -> dict[str, Provider]:
    """By what is asked for: `index` -> the gradients, of a bank that is frozen or learnt."""

    def named(wrt: tuple[str, ...]) -> Provider:
        return lambda index: elva_kernels.ranking_reward_and_grad(
            query, positive, bank, negative_index=index, wrt=wrt, **WEIGHTS
        )

    def gathered(wrt: tuple[str, ...]) -> Provider:
        return lambda index: elva_kernels.ranking_reward_and_grad(
            query, positive, bank[index], wrt=wrt, **WEIGHTS
        )

    def eager(form: Callable[..., Tensor], frozen: bool) -> Provider:
        def run(index: Tensor) -> Any:
            leaf, rows = query.detach().requires_grad_(), bank.detach().requires_grad_(not frozen)
            reward = form(leaf, positive, rows[index], WEIGHTS)
            return torch.autograd.grad(reward.sum(), [leaf] if frozen else [leaf, rows])

        return run

    every = ("query", "positive", "negatives")
    found = {"ours, index, query alone": named(("query",)), "ours, index, all": named(every)}
    found["ours, gather, query alone"] = gathered(("query",))
    found["ours, gather, gathered rows' all"] = gathered(every)
    for name, form in rivals.FORMS.items():
        found[f"{name}, query alone"] = eager(form, frozen=True)
    found["torch eager, bmm + norms, query and bank"] = eager(rivals.bmm_norms, frozen=False)
    return found


def check_bank(providers: dict[str, Provider], index: Tensor, query: Tensor) -> None:
    """Ends the run where an index and a gather differ."""
    by_index, by_gather = (
        providers[f"ours, {way}, query alone"](index) for way in ("index", "gather")
    )
    if not torch.equal(by_index[0].scores, by_gather[0].scores):
        sys.exit("reward: the scores of an index are not those of the gathered rows")
    excess = (by_index[1] - by_gather[1]).abs() * query.norm(dim=-1, keepdim=True)
    if excess.max() > MAX_GRAD_ERROR["bf16"]:
        sys.exit("reward: the gradient by an index is not that of the gathered rows")


def measure_bank(size: tuple[int, int, int, int], seconds: float) -> Any:
    """Rows of the providers of a bank, by what the groups read of it: `gbps` counts one read."""
    groups, rows, dim, m = size
    query, positive, _ = inputs_of(groups, 2, dim, torch.bfloat16)
    bank = torch.randn(m, dim).bfloat16()
    draws = [torch.randint(m, (groups, rows - 1)) for _ in range(16)]
    providers = bank_providers(query, positive, bank)
    check_bank(providers, draws[0], query)
    ceilings = Ceilings()
    turns: dict[str, Callable[[int], Any]] = {
        name: lambda i, run=run: run(draws[i % len(draws)]) for name, run in providers.items()
    }
    turns |= {"read": lambda _: ceilings.read(), "copy": lambda _: ceilings.copy()}
    times = timed(turns, seconds)
    read_gbps = BYTES / spread(times["read"])[1] / 1e6
    named_bytes = (groups * (rows + 1)) * dim * bank.element_size()
    found = []
    for name, run in providers.items():
        row = timing.row("x".join(map(str, size)), "bf16", name, times[name])
        gbps = named_bytes / row["median_ms"] / 1e6
        row |= {"gbps": gbps, "read_gbps": read_gbps, "of_read": gbps / read_gbps}
        gradients = [x for x in run(draws[0]) if isinstance(x, Tensor)]
        result_bytes = sum(x.nbytes for x in gradients)
        del gradients
        row |= {"extra_mb": extra_mb(lambda run=run: run(draws[0]), result_bytes)}
        found.append(row)
    return found, {name: times[name] for name in ("read", "copy")}


@pytest.mark.parametrize(
    ("size", "dtype"), CASES, ids=["x".join(map(str, (*size, dtype))) for size, dtype in CASES]
)
def test_reward(size: Any, dtype: str, tally: Tally, benchmark: Any) -> None:
    tally.add(*measure(size, dtype, SECONDS, compile_too=(size, dtype) == CASES[0]))
    benchmark(ours, *inputs_of(*size, DTYPES[dtype]))


def test_bank(tally: Tally) -> None:
    tally.add(*measure_bank(BANK, SECONDS))


def main() -> None:
    arguments = timing.arguments("bench_reward", __doc__, quick="one size in bf16, no file")
    tally = Tally("reward")
    for case in CASES[:1] if arguments.quick else CASES:
        compile_too = case == CASES[0] and not arguments.quick
        tally.add(*measure(*case, arguments.seconds, compile_too))
    if not arguments.quick:
        tally.add(*measure_bank(BANK, arguments.seconds))
    tally.tell(keep=not arguments.quick)


if __name__ == "__main__":
    main()
