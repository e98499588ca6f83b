"""The same bits again: however many threads, under load, in other layouts, alone, elsewhere.

A case is computed once, then by each number of threads, in every memory layout, and for a few of
its rows alone; while half of the cases are tried all cores are busy with something else. The
digests of all results are those of a second process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import elva_kernels as ek
from benchmarks.reliability.adversarial.draw import Draw
from benchmarks.reliability.child import spoken
from benchmarks.reliability.row import Outcome, Row, Trials
from tests.kernels.cases import same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
THREADS = tuple(range(1, 2 * (os.cpu_count() or 1) + 1))
Results = Sequence[Tensor | None]


class Case(NamedTuple):
    """An op on drawn inputs.

    apart: a tensor for each query or group, by whose rows results are, too.
    shared: what all of them look at.
    compute: results of `apart` and `shared`, one row a query or group.
    whole: of the same, results that are sums over rows.
    """

    apart: list[Tensor]
    shared: list[Tensor]
    compute: Callable[[list[Tensor], list[Tensor]], Results]
    whole: Callable[[list[Tensor], list[Tensor]], Results]


def reward(draw: Draw) -> Case:
    groups, n, size = 1 + draw.size() % 9, draw.size(), draw.size()
    query = draw.rows(groups, size=size, bad=True)
    rows = [draw.rows(groups, *x, size=size, near=None, bad=True) for x in ((), (n,))]
    scalars = draw.weights(soft=True)
    mask = draw.rand(groups, n) < 0.8

    def compute(apart: list[Tensor], _: list[Tensor]) -> Results:
        *inputs, live = apart
        found, *gradients = ek.ranking_reward_and_grad(*inputs, mask=live, backend="cpu", **scalars)
        return [*found, *gradients]

    return Case([query, *rows, mask], [], compute, lambda *_: [])


def bank(draw: Draw) -> Case:
    groups, n, m, size = 1 + draw.size() % 9, draw.size(), draw.size(), draw.size()
    query, positive = (draw.rows(groups, size=size, bad=False) for _ in range(2))
    index, scalars = draw.randint(-1, m, groups, n), draw.weights(soft=True)

    def compute(apart: list[Tensor], shared: list[Tensor]) -> Results:
        *inputs, index = apart
        found, *gradients = ek.ranking_reward_and_grad(
            *inputs, *shared, negative_index=index, backend="cpu", **scalars
        )
        return [*found, *gradients]

    return Case(
        [query, positive, index], [draw.rows(m, size=size, bad=False)],
        lambda *x: compute(*x)[:-1], lambda *x: compute(*x)[-1:],
    )  # fmt: skip


def batch(draw: Draw) -> Case:
    """Statistics, the reward and InfoNCE of queries among all candidates."""
    b, m, size = 1 + draw.size() % 40, draw.size(), draw.size()
    query = draw.rows(b, size=size, bad=False)
    candidates = draw.rows(m, size=size, near=query.double(), bad=False)
    target, scalars = draw.randint(0, m, b), draw.weights(soft=False)

    def compute(apart: list[Tensor], shared: list[Tensor]) -> Results:
        (query, target), (candidates,) = apart, shared
        statistics = ek.rank_statistics(query, candidates, target, k=3, backend="cpu")
        found, grad_query, _ = ek.in_batch_ranking_reward_and_grad(
            query, candidates, target, backend="cpu", **scalars
        )
        loss, grad_of_loss, *_ = ek.info_nce_and_grad(
            query, candidates, target, temperature=0.05, reduction="none", backend="cpu"
        )
        return [*statistics, *found, grad_query, loss, grad_of_loss]

    def whole(apart: list[Tensor], shared: list[Tensor]) -> Results:
        (query, target), (candidates,) = apart, shared
        _, _, grad_candidates = ek.in_batch_ranking_reward_and_grad(
            query, candidates, target, backend="cpu", **scalars
        )
        both = ek.info_nce_and_grad(
            query, candidates, target, temperature=0.05, symmetric=True, backend="cpu"
        )
        return [grad_candidates, *both]

    return Case([query, target], [candidates], compute, whole)


def search(draw: Draw) -> Case:
    q, p, size = 1 + draw.size() % 40, 3 * draw.size(), draw.size()
    query = draw.rows(q, size=size, bad=False)
    corpus = draw.rows(p, size=size, near=query.double(), bad=True)
    k = draw.one_of((1, 5, p))

    def compute(apart: list[Tensor], shared: list[Tensor]) -> Results:
        (query,), (corpus,) = apart, shared
        codes = ek.row_codes(corpus, backend="cpu")
        found = ek.topk(query, corpus, k, backend="cpu")
        return [*found, *ek.coded_topk(query, corpus, codes, k, backend="cpu")[:2]]

    return Case([query], [corpus], compute, lambda *_: [])


def advantages(draw: Draw) -> Case:
    reward = draw.randn(1 + draw.size() % 9, draw.size()).to(draw.dtype)

    def compute(apart: list[Tensor], _: list[Tensor]) -> Results:
        return [ek.group_advantages(*apart, scale=scale) for scale in ("std", "none")]

    def whole(apart: list[Tensor], _: list[Tensor]) -> Results:
        return [ek.group_advantages(*apart, scale="batch")]

    return Case([reward], [], compute, whole)


OPS = (reward, bank, batch, search, advantages)


def case_of(number: int, seed: int) -> tuple[Draw, Case]:
    draw = Draw(seed, number, DTYPES, 20_000)
    return draw, OPS[number % len(OPS)](draw)


def differing(found: Results, right: Results) -> int:
    """Of how many tensors the bits differ."""
    return sum(
        (a is None) != (b is None) or (a is not None and b is not None and not same_bits(a, b))
        for a, b in zip(found, right, strict=True)
    )


def _bytes(x: Tensor) -> bytes:
    """Of its values; NaN is one of them, whatever its sign and payload."""
    x = torch.where(x.isnan(), math.nan, x) if x.is_floating_point() else x
    dense = x.detach().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def again(draw: Draw, case: Case, right: Results, sums: Results) -> Iterator[tuple[str, int]]:
    """Ways to compute the case once more, and how many tensors then differ."""
    apart, shared = case.apart, case.shared
    for threads in THREADS:
        torch.set_num_threads(threads)
        yield "threads", differing(case.compute(apart, shared), right)
        yield "threads", differing(case.whole(apart, shared), sums)
    for _ in range(3):
        laid = [[draw.laid(x) for x in some] for some in (apart, shared)]
        yield "layouts", differing(case.compute(*laid), right)
        yield "layouts", differing(case.whole(*laid), sums)
    rows = torch.randperm(len(apart[0]), generator=draw.generator)[:3]
    of_rows = [None if x is None else x[rows] for x in right]
    yield "alone", differing(case.compute([x[rows] for x in apart], shared), of_rows)


def trials(wanted: Trials) -> Outcome:
    outcome, digests = Outcome(), []
    threads = torch.get_num_threads()
    try:
        for number in wanted.numbers:
            draw, case = case_of(number, wanted.seed)
            with busy() if number % 2 else contextlib.nullcontext():
                right, sums = (f(case.apart, case.shared) for f in (case.compute, case.whole))
                for way, differences in again(draw, case, right, sums):
                    outcome.counts[way] += 1
                    if differences:
                        op = OPS[number % len(OPS)].__name__
                        outcome.wrong.append(
                            f"seed {wanted.seed} number {number} ({op} in {draw.words[0]}): "
                            f"{differences} tensors differ by {way}"
                        )
            digests.append(digest([*right, *sums]))
            outcome.tried += 1
    finally:
        torch.set_num_threads(threads)
    for number, other in zip(wanted.numbers, elsewhere(wanted), strict=True):
        outcome.counts["processes"] += 1
        if other != digests[number - wanted.first]:
            outcome.wrong.append(f"seed {wanted.seed} number {number}: another process differs")
    return outcome


def digest(results: Results) -> str:
    return hashlib.sha256(b"".join(_bytes(x) for x in results if x is not None)).hexdigest()


def elsewhere(wanted: Trials) -> list[str]:
    """The digests of the cases in a process of its own."""
    return list(json.loads(spoken(__name__, *map(str, wanted))))


def main() -> None:
    """What such a process does."""
    wanted = Trials(*map(int, sys.argv[1:]))
    found = []
    for number in wanted.numbers:
        _, case = case_of(number, wanted.seed)
        found.append(digest([*case.compute(case.apart, case.shared),
                             *case.whole(case.apart, case.shared)]))  # fmt: skip
    print(json.dumps(found))


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Every core has other work."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def missing() -> str:
    return ek.available_backends()["cpu"] or ""


ROWS = {
    "repeats": Row(
        title="a case again: with every number of threads to twice the cores, beside other work, "
        "in other layouts, some of its rows alone, in another process",
        goal="1,000, 0 differing bits",
        unit="cases",
        amount=1_000,
        smoke=5,
        chunk=100,
        run=trials,
        said=lambda kept: f"{sum(kept['counts'].values()):,} repeats",
        missing=missing,
    ),
}
