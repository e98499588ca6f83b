"""Proofs of the in-batch ops."""

import functools
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from benchmarks.gpu.place import (
    BATCHED,
    WEIGHTS,
    Place,
    Red,
    flat,
    gradients_within,
    same_bits,
    within,
)
from benchmarks.gpu.prove_reward import repeat

TEMPERATURE = 0.1
NAMES = ("query", "candidates")


def pairs(place: Place, b: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """Queries, and candidates of which the first b fit them, in turn."""
    query = torch.randn(b, d, device=place.device)
    candidates = torch.randn(m, d, device=place.device)
    candidates[:b] += query
    return query.to(place.dtype), candidates.to(place.dtype)


def statistics_within(found: Any, right: Any, what: str) -> None:
    within(found.target_score, right.target_score, BATCHED["scores"], f"{what} targets")
    within(found.topk_scores, right.topk_scores, BATCHED["scores"], f"{what} top-k")
    within(found.hardest_score, right.hardest_score, BATCHED["scores"], f"{what} hardest")
    within(found.logsumexp, right.logsumexp, 2e-4, f"{what} logsumexp")


def values(place: Place) -> None:
    """Statistics, losses and gradients of every op; copies of positives tie with them."""
    shapes = [(17, 40, 64), (65, 130, 48)] + ([] if place.small else [(256, 600, 768)])
    if place.backend == "cuda" and not place.small:
        shapes.append((2100, 2110, 32))  # so many scores that slopes are kept in one half
    for b, m, d in shapes:
        query, candidates = pairs(place, b, m, d)
        candidates[b : b + 5] = candidates[:5]
        exact = [x.double().cpu() for x in (query, candidates)]
        options = {"k": 5, "temperature": TEMPERATURE}
        found = elva_kernels.rank_statistics(query, candidates, backend=place.backend, **options)
        right = elva_kernels.rank_statistics(*exact, backend="reference", **options)
        what = f"{b}x{m}x{d}"
        statistics_within(found, right, what)
        if not bool((found.n_equal[:5] >= 1).all()):
            raise Red(f"{what}: a copy of the positive does not tie with it")
        for symmetric in (False, True):
            check_loss(
                place,
                functools.partial(
                    elva_kernels.info_nce, temperature=TEMPERATURE, symmetric=symmetric
                ),
                (query, candidates),
                f"{what} info_nce",
            )
        if b < 100:  # among many, negatives that are nearly equal change places
            check_loss(place, reward, (query, candidates), f"{what} reward")


def reward(query: Tensor, candidates: Tensor, target: Any = None, **options: Any) -> Tensor:
    """Its mean, of a short head."""
    result = elva_kernels.in_batch_ranking_reward(
        query, candidates, target, head=7, **WEIGHTS, **options
    )
    return result.reward.mean()


def check_loss(
    place: Place, loss: Any, rows: tuple[Tensor, Tensor], what: str, **batch: Any
) -> None:
    """Value and gradients of a loss of rows, against the reference's in float64."""
    leaves = [x.detach().requires_grad_() for x in rows]
    truths = [x.detach().double().cpu().requires_grad_() for x in rows]
    on_cpu = {key: x.cpu() if isinstance(x, Tensor) else x for key, x in batch.items()}
    value = loss(*leaves, backend=place.backend, **batch)
    truth = loss(*truths, backend="reference", **on_cpu)
    within(value, truth, 2e-4, what)
    ours, theirs = torch.autograd.grad(value, leaves), torch.autograd.grad(truth, truths)
    gradients_within(leaves, ours, theirs, BATCHED["gradients"], what)


def positives(place: Place) -> None:
    """Several positives, padded; excluded pairs, ids, a limit; both directions."""
    for b, m, d in ((17, 40, 64), (33, 70, 96)):
        query, candidates = pairs(place, b, m, d)
        target = torch.stack([torch.arange(b), torch.arange(b) + 7, torch.full((b,), -1)], 1)
        target[::3, 2] = torch.arange(0, b, 3) + 3
        target[4] = -1
        target[5, 1:] = -1
        excluded = torch.tensor([[0, m - 1], [1, m - 2], [4, 8], [0, m - 1], [9, 0]])
        batch = {
            "target": target.to(place.device),
            "excluded": excluded.to(place.device),
            "candidate_ids": (torch.arange(m) % (m - 4)).to(place.device),
        }
        what = f"positives {b}x{m}x{d}"
        options = {"k": 5, "temperature": TEMPERATURE}
        found = elva_kernels.rank_statistics(
            query, candidates, backend=place.backend, **options, **batch
        )
        right = elva_kernels.rank_statistics(
            query.double().cpu(),
            candidates.double().cpu(),
            backend="reference",
            **options,
            **{key: x.cpu() for key, x in batch.items()},
        )
        statistics_within(found, right, what)
        for symmetric in (False, True):
            nce = functools.partial(
                elva_kernels.info_nce, temperature=TEMPERATURE, symmetric=symmetric
            )
            check_loss(place, nce, (query, candidates), what, **batch)
            check_loss(place, nce, (query, candidates), f"{what} limit", max_score=0.99, **batch)
        check_loss(place, reward, (query, candidates), f"{what} reward", **batch)


def wanted(place: Place) -> None:
    """`info_nce_and_grad`: the gradients, and None for what is not wanted."""
    for symmetric in (False, True):
        rows = pairs(place, 33, 70, 64)
        options: dict[str, Any] = {"temperature": TEMPERATURE, "symmetric": symmetric}
        op = functools.partial(elva_kernels.info_nce_and_grad, **options)
        exact = [x.double().cpu() for x in rows]
        truth, *gradients, _ = op(*exact, backend="reference")
        for wrt in (NAMES, NAMES[:1], NAMES[1:]):
            value, *found, _ = op(*rows, wrt=wrt, backend=place.backend)
            within(value, truth, 2e-4, f"loss wrt {wrt}")
            for name, row, gradient, right in zip(NAMES, rows, found, gradients, strict=True):
                if (gradient is not None) != (name in wrt):
                    raise Red(f"wrt {wrt}: the gradient of {name} is {gradient is not None}")
                if gradient is not None:
                    gradients_within([row], [gradient], [right], BATCHED["gradients"], name)


def far_ties(place: Place) -> None:
    """Copies of a positive in other tiles of the product, the last ragged one too."""
    shapes = [(16, 99, 64)] if place.small else [(256, 4099, 1536), (1024, 8200, 1536)]
    shapes += [] if place.small else [(64, 20000, 3584), (300, 4099, 1536)]
    for b, m, d in shapes:
        query, candidates = pairs(place, b, m, d)
        at = torch.linspace(b, m - 1, b).long().to(place.device)
        candidates[at] = candidates[:b].clone()
        found = elva_kernels.rank_statistics(query, candidates, k=3, backend=place.backend)
        missing = int((found.n_equal < 1).sum())
        if missing:
            raise Red(f"{missing} of {b} copies do not tie at {b}x{m}x{d}")


def names_out_of_range(place: Place) -> None:
    """A target that does not exist makes its own query NaN, and no illegal access."""
    query, candidates = pairs(place, 17, 40, 64)
    nce = functools.partial(
        elva_kernels.info_nce, query, candidates, reduction="none", backend=place.backend
    )
    target = torch.arange(17, device=place.device)
    right = nce(target)
    for bad in (40, 2**40, -2):
        target[3] = bad
        found = nce(target)
        if not bool(found[3].isnan()):
            raise Red(f"the loss of a query with target {bad} of 40 is not NaN")
        keep = torch.arange(17, device=place.device) != 3
        same_bits([found[keep]], [right[keep]], f"neighbours of target {bad}")


def repeats(place: Place) -> None:
    """The same bits again and again, while another stream is busy."""
    query, candidates = pairs(place, *((16, 40, 64) if place.small else (512, 1024, 1536)))
    op = functools.partial(elva_kernels.info_nce_and_grad, query, candidates, symmetric=True)
    repeat(place, lambda: flat(op(backend=place.backend))[:3])


ALL = ("rank_statistics", "info_nce", "info_nce_and_grad", "in_batch_ranking_reward")
NCE = ("info_nce", "info_nce_and_grad")
CHECKS = {
    "in-batch values": (values, ALL),
    "in-batch positives": (positives, ALL),
    "in-batch wrt": (wanted, NCE),
    "in-batch ties": (far_ties, ("rank_statistics", "in_batch_ranking_reward")),
    "in-batch names": (names_out_of_range, NCE),
    "in-batch repeats": (repeats, NCE),
}
