"""The cases of a GPU's figures: an op on a shape, and who computes it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import elva_kernels
from benchmarks import in_batch_rivals, rivals, search_rivals
from benchmarks.gpu.clock import Call
from elva_kernels.backends.choice import launcher
from elva_kernels.reference import FineCodes, RowCodes

WEIGHTS = {"margin": 0.1, "rank_penalty": 0.01, "w_margin": 0.4, "w_rank": 0.6}
CACHE_BYTES = 256 << 20  # more than a GPU's second-level cache
K = 10
COMPILED = (1024, 1536)  # groups and dim of the one reward that torch.compile gets


class Built(NamedTuple):
    """Providers' calls, and what a call must move or multiply at least."""

    calls: dict[str, Call]
    counted: dict[str, float]  # bytes read and written, "read" alone, or operations


class Case(NamedTuple):
    title: str
    op: str  # whose proofs must be green
    build: Callable[[], Built]


class Cases:
    """Of one of our backends on a device."""

    def __init__(self, device: str, backend: str) -> None:
        self.device, self.backend = device, backend
        self.dry = device == "cpu"

    def of(self, group: str) -> Iterator[Case]:
        yield from getattr(self, group)()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).bfloat16()

    def ours(self, op: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return functools.partial(op, backend=self.backend, **options)

    def rotating(self, sets: list[Any], run: Callable[..., Any]) -> Call:
        """`run` of another set each time."""
        return lambda i: run(*sets[i % len(sets)])

    # The grouped reward.

    def reward(self) -> Iterator[Case]:
        sizes = [(1024, 1536), (256, 1536), (64, 1536), (4096, 1536)]
        sizes += [(1024, 3584), (256, 3584), (64, 3584)]
        for groups, dim in [(4, 64), (2, 128)] if self.dry else sizes:
            title = f"reward {groups}x102x{dim}"
            build = functools.partial(self.value_and_grad, groups, dim)
            yield Case(title, "ranking_reward_and_grad", build)

    def groups(self, groups: int, dim: int) -> list[tuple[Tensor, ...]]:
        """Sets that together exceed the cache."""
        count = 2 if self.dry else max(2, min(8, -(-CACHE_BYTES // (102 * groups * dim * 2))))
        shapes = ((groups, dim), (groups, dim), (groups, 100, dim))
        return [tuple(self.randn(*shape) for shape in shapes) for _ in range(count)]

    def value_and_grad(self, groups: int, dim: int) -> Built:
        sets = self.groups(groups, dim)
        op = self.ours(elva_kernels.ranking_reward_and_grad, **WEIGHTS)
        calls = {f"ours, {self.backend}": self.rotating(sets, op)}
        for name, form in rivals.FORMS.items():
            calls[name] = self.rotating(sets, rivals.value_and_grad(form, WEIGHTS))
            if (groups, dim) != COMPILED:
                continue
            fast = functools.cache(functools.partial(torch.compile, form, dynamic=False))
            calls[name.replace("eager", "compile")] = self.rotating(
                sets, lambda *x, fast=fast: rivals.value_and_grad(fast(), WEIGHTS)(*x)
            )
        return Built(calls, {"bytes": 2 * 102 * groups * dim * 2})

    def reward_paths(self) -> Iterator[Case]:
        """Forward alone, autograd, a mask, banks."""
        for groups, dim in [(4, 64)] if self.dry else [(1024, 1536), (64, 1536), (1024, 3584)]:
            size = f"{groups}x102x{dim}"
            forward = functools.partial(self.forward, groups, dim)
            yield Case(f"reward forward {size}", "ranking_reward", forward)
            autograd = functools.partial(self.autograd, groups, dim)
            yield Case(f"reward autograd {size}", "ranking_reward", autograd)
            masked = functools.partial(self.masked, groups, dim)
            yield Case(f"reward masked {size}", "ranking_reward_and_grad", masked)
        for groups, dim in [(4, 64)] if self.dry else [(1024, 1536)]:
            for frozen in (True, False):
                kind = "frozen bank" if frozen else "bank"
                bank = functools.partial(self.bank, groups, dim, frozen)
                title = f"reward {kind} {groups}x102x{dim}"
                yield Case(title, "ranking_reward_and_grad", bank)

    def forward(self, groups: int, dim: int) -> Built:
        sets = self.groups(groups, dim)
        calls = {
            f"ours, {self.backend}": self.rotating(
                sets, self.ours(elva_kernels.ranking_reward, **WEIGHTS)
            )
        }
        for name, form in rivals.FORMS.items():
            calls[name] = self.rotating(sets, lambda *x, form=form: form(*x, WEIGHTS))
        return Built(calls, {"read": 102 * groups * dim * 2})

    def autograd(self, groups: int, dim: int) -> Built:
        sets = self.groups(groups, dim)
        op = self.ours(elva_kernels.ranking_reward)

        def ours(*inputs: Tensor, weights: dict[str, float]) -> Tensor:
            return op(*inputs, **weights).reward

        form = lambda *x: ours(*x[:3], weights=x[3])  # noqa: E731
        calls = {f"ours, {self.backend}": self.rotating(sets, rivals.value_and_grad(form, WEIGHTS))}
        for name, other in rivals.FORMS.items():
            calls[name] = self.rotating(sets, rivals.value_and_grad(other, WEIGHTS))
        return Built(calls, {"bytes": 2 * 102 * groups * dim * 2})

    def masked(self, groups: int, dim: int) -> Built:
        """Half of the negatives; the others' gradients are written as zeros."""
        mask = torch.rand(groups, 100, device=self.device) < 0.5
        op = self.ours(elva_kernels.ranking_reward_and_grad, mask=mask, **WEIGHTS)
        calls = {f"ours, {self.backend}": self.rotating(self.groups(groups, dim), op)}
        return Built(calls, {"bytes": (52 + 102) * groups * dim * 2})

    def bank(self, groups: int, dim: int, frozen: bool) -> Built:
        """100 rows of a bank a group, by index; frozen: the query's gradient alone."""
        rows = self.randn(1000 if self.dry else 100_000, dim)
        sets = [
            (
                self.randn(groups, dim),
                self.randn(groups, dim),
                torch.randint(len(rows), (groups, 100), device=self.device),
            )
            for _ in range(4)
        ]
        wrt = ("query",) if frozen else ("query", "positive", "negatives")
        op = self.ours(elva_kernels.ranking_reward_and_grad, wrt=wrt, **WEIGHTS)
        calls: dict[str, Call] = {
            f"ours, {self.backend}": self.rotating(
                sets, lambda q, p, index: op(q, p, rows, negative_index=index)
            )
        }
        for name, form in rivals.FORMS.items():

            def eager(q: Tensor, p: Tensor, index: Tensor, form: Any = form) -> Any:
                leaves = [x.detach().requires_grad_() for x in (q, p, rows)]
                value = form(leaves[0], leaves[1], leaves[2][index], WEIGHTS).sum()
                return torch.autograd.grad(value, leaves[: len(wrt)])

            def eager_frozen(q: Tensor, p: Tensor, index: Tensor, form: Any = form) -> Any:
                leaf = q.detach().requires_grad_()
                return torch.autograd.grad(form(leaf, p, rows[index], WEIGHTS).sum(), leaf)

            calls[name] = self.rotating(sets, eager_frozen if frozen else eager)
        named = 102 * groups * dim * 2
        return Built(calls, {"read": named} if frozen else {"bytes": named + rows.nbytes})

    # Exact search.

    def topk(self) -> Iterator[Case]:
        rows, dim = (1000, 64) if self.dry else (1_000_000, 1536)
        corpus = functools.cache(lambda: self.randn(rows, dim))
        for queries in (1, 16) if self.dry else (1, 16, 64, 256, 1024):
            build = functools.partial(self.search, corpus, queries)
            yield Case(f"topk {queries}x{rows}x{dim}", "topk", build)
        codes = functools.cache(lambda: elva_kernels.row_codes(corpus(), backend=self.backend))
        for queries in (1, 16) if self.dry else (1, 32, 64, 256):
            build = functools.partial(self.coded_search, corpus, codes, queries)
            yield Case(f"coded_topk {queries}x{rows}x{dim}", "nearest_codes", build)

    def coded_search(
        self, corpus: Callable[[], Tensor], codes: Callable[[], RowCodes], queries: int
    ) -> Built:
        """Of random rows, the bounds alone too, and the search that reads all rows.

        A search by codes waits for the device between its steps, and that is in its time.
        """
        rows, coded = corpus(), codes()
        asked = [(self.randn(queries, rows.shape[1]),) for _ in range(4)]
        device = torch.device(self.device)
        code = launcher("row_codes", self.backend, device, rows.dtype)
        bounds = launcher("nearest_codes", self.backend, device, torch.float32)
        fine = [(FineCodes(*code(query, True)),) for (query,) in asked]
        ours = f"ours, {self.backend}"
        calls = {
            f"{ours}, codes": self.rotating(
                asked, self.ours(elva_kernels.coded_topk, corpus=rows, codes=coded, k=K)
            ),
            f"{ours}, bounds of codes alone": self.rotating(
                fine, lambda query: bounds(query, coded, 256, mask=None, floor=None)
            ),
            f"{ours}, all rows": self.rotating(
                asked, self.ours(elva_kernels.topk, corpus=rows, k=K, metric="cosine")
            ),
        }
        read = sum(x.nbytes for x in coded)
        return Built(calls, {"read": read, "operations": 2 * queries * rows.numel()})

    def search(self, corpus: Callable[[], Tensor], queries: int) -> Built:
        rows = corpus()
        asked = [(self.randn(queries, rows.shape[1]),) for _ in range(4)]
        op = self.ours(elva_kernels.topk, corpus=rows, k=K, metric="dot")
        calls = {f"ours, {self.backend}": self.rotating(asked, op)}
        calls["torch eager, mm + topk"] = self.rotating(
            asked, lambda query: torch.mm(query, rows.mT).topk(K)
        )
        for name, (_, prepare) in search_rivals.ON_A_GPU.items():
            ready = functools.cache(functools.partial(prepare, rows, K))
            calls[name] = self.rotating(asked, lambda query, ready=ready: ready()(query))
        return Built(calls, {"read": rows.nbytes, "operations": 2 * queries * rows.numel()})

    # The in-batch ops.

    def in_batch(self) -> Iterator[Case]:
        for size in (64,) if self.dry else (2048, 8192):
            dim = 64 if self.dry else 1536
            shape = f"{size}x{size}x{dim}"
            for title, op, build in (
                (f"info_nce {shape}", "info_nce", self.info_nce),
                (f"info_nce_and_grad {shape}", "info_nce_and_grad", self.info_nce_and_grad),
                (f"rank_statistics {shape}", "rank_statistics", self.statistics),
                (f"rank_statistics k=10 {shape}", "rank_statistics", self.hardest),
                (f"in_batch_ranking_reward {shape}", "in_batch_ranking_reward", self.batch_reward),
            ):
                yield Case(title, op, functools.partial(build, size, dim))

    def pairs(self, size: int, dim: int) -> list[tuple[Tensor, Tensor]]:
        return [(self.randn(size, dim), self.randn(size, dim)) for _ in range(4)]

    def losses(self, size: int, dim: int, losses: dict[str, Any], products: int) -> Built:
        pairs = self.pairs(size, dim)
        calls: dict[str, Call] = {}
        for name, loss in losses.items():
            run = in_batch_rivals.loss_and_grads(loss)
            calls[name] = lambda i, run=run: run(pairs[i % len(pairs)])
        return Built(calls, {"operations": products * 2 * size * size * dim})

    def info_nce(self, size: int, dim: int) -> Built:
        """By autograd; symmetric ones beside, of 4 products."""
        ours = self.ours(elva_kernels.info_nce)
        losses: dict[str, Any] = {
            f"ours, {self.backend}": ours,
            f"ours, {self.backend}, symmetric": functools.partial(ours, symmetric=True),
            "torch eager": in_batch_rivals.eager_loss,
            "torch eager, fp32 scores": in_batch_rivals.exact_loss,
            "torch compile": self.compiled_loss(),
            **{name: loss for name, (_, loss) in in_batch_rivals.ON_A_GPU.items()},
        }
        losses["torch linear_cross_entropy"] = in_batch_rivals.linear_loss
        return self.losses(size, dim, losses, 3)

    def compiled_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        fast = functools.cache(lambda: torch.compile(in_batch_rivals.eager_loss, dynamic=False))
        return lambda query, candidates: fast()(query, candidates)

    def info_nce_and_grad(self, size: int, dim: int) -> Built:
        op = self.ours(elva_kernels.info_nce_and_grad)
        calls = {f"ours, {self.backend}": self.rotating(self.pairs(size, dim), op)}
        return Built(calls, {"operations": 6 * size * size * dim})

    def statistics(self, size: int, dim: int, k: int = 0) -> Built:
        pairs = self.pairs(size, dim)
        calls = {
            f"ours, {self.backend}": self.rotating(
                pairs, self.ours(elva_kernels.rank_statistics, k=k)
            ),
            "torch eager, count + topk": self.rotating(
                pairs, lambda q, c: in_batch_rivals.statistics(q, c, k)
            ),
        }
        return Built(calls, {"operations": 2 * size * size * dim})

    def hardest(self, size: int, dim: int) -> Built:
        return self.statistics(size, dim, K)

    def batch_reward(self, size: int, dim: int) -> Built:
        op = self.ours(elva_kernels.in_batch_ranking_reward, **WEIGHTS)
        losses = {
            f"ours, {self.backend}": lambda q, c: -op(q, c).reward.mean(),
            "torch eager": lambda q, c: in_batch_rivals.reward_loss(q, c, WEIGHTS, 100),
        }
        return self.losses(size, dim, losses, 1)  # its gradients are of the head alone
