"""Proofs of the grouped reward."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from benchmarks.gpu.place import (
    GROUPED,
    WEIGHTS,
    Place,
    Red,
    exact_gradients,
    flat,
    gradients_within,
    layouts,
    same_bits,
    within,
)

ALLOWED = 2 * GROUPED["gradients"]


def run(place: Place, *inputs: Tensor, **options: Any) -> tuple[Any, ...]:
    """Values, then gradients, with a margin that keeps the hinge open."""
    return elva_kernels.ranking_reward_and_grad(*inputs, backend=place.backend, **WEIGHTS | options)


def values(place: Place) -> None:
    """Values and gradients by both paths, masks, hard and soft ranks, odd sizes."""
    shapes = [(3, 7, 33), (2, 100, 1536), (1, 1, 1), (4, 0, 16), (2, 37, 2048), (1, 300, 64)]
    shapes += [] if place.small else [(8, 100, 3584), (2, 1000, 256), (1, 20, 8192)]
    for shape in shapes:
        inputs = place.groups(*shape)
        exact = [x.double().cpu().requires_grad_() for x in inputs]
        mask = torch.rand(shape[:2], device=place.device) < 0.8
        weight = torch.randn(shape[0], device=place.device)
        weight = weight.to(torch.promote_types(place.dtype, torch.float32))
        for temperature in (0.0, 0.1):
            what = "x".join(map(str, shape))
            options = {**WEIGHTS, "rank_temperature": temperature, "mask": mask}
            _values_of(place, what, inputs, exact, weight, options)


def _values_of(
    place: Place,
    what: str,
    inputs: Any,
    exact: list[Tensor],
    weight: Tensor,
    options: dict[str, Any],
) -> None:
    found, *ours = run(place, *inputs, weight=weight, **options)
    on_cpu = {key: x.cpu() if isinstance(x, Tensor) else x for key, x in options.items()}
    on_cpu["backend"] = "reference"
    right = elva_kernels.ranking_reward(*(x.detach() for x in exact), **on_cpu)
    within(found.scores, right.scores, GROUPED["scores"], f"{what} scores")
    own = elva_kernels.reward_from_scores(found.scores.double().cpu(), **on_cpu)
    if not torch.equal(found.rank.cpu(), own.rank):
        raise Red(f"{what}: the rank is not that of the scores")
    within(found.reward, own.reward, 1e-5, f"{what} reward")
    gradients = exact_gradients(exact, tuple(exact), found.scores, weight, options)
    gradients_within(inputs, ours, gradients, ALLOWED, what)
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = elva_kernels.ranking_reward(*leaves, backend=place.backend, **options)
    same_bits([result.reward, result.scores], [found.reward, found.scores], "autograd's forward")
    by_autograd = torch.autograd.grad(result.reward, leaves, weight)
    gradients_within(inputs, by_autograd, gradients, ALLOWED, f"{what} autograd's")


def relevances(place: Place) -> None:
    """Negatives that are relevant themselves, by both paths; at 0 the bits of no relevance."""
    shapes = [(3, 7, 33), (3, 100, 1536)] if place.small else [(3, 7, 33), (6, 100, 1536)]
    shapes += [] if place.small else [(8, 100, 3584), (2, 1000, 256)]
    for groups, n, d in shapes:
        inputs, what = place.groups(groups, n, d), f"graded {groups}x{n}x{d}"
        exact = [x.double().cpu().requires_grad_() for x in inputs]
        mask = torch.rand(groups, n, device=place.device) < 0.8
        weight = torch.randn(groups, device=place.device)
        weight = weight.to(torch.promote_types(place.dtype, torch.float32))
        relevance = 0.3 * torch.rand(groups, n, device=place.device)  # the hinge stays open
        relevance[:, ::5], relevance[:, n // 3] = 0, 1
        relevance[~mask] = math.nan
        for temperature in (0.0, 0.1):
            options = {**WEIGHTS, "rank_temperature": temperature, "mask": mask}
            graded = options | {"relevance": relevance}
            _values_of(place, what, inputs, exact, weight, graded)
            spread = torch.stack([relevance, relevance], -1)[..., 0]
            found = run(place, *inputs, **options, relevance=spread)
            same_bits(flat(found), flat(run(place, *inputs, **graded)), f"{what}, spread")
            none = flat(run(place, *inputs, **options))
            found = run(place, *inputs, **options, relevance=torch.zeros_like(relevance))
            same_bits(flat(found), none, f"{what}, of 0")


def same_in_every_layout(place: Place) -> None:
    """Dense, strided and misaligned rows give the same bits: so do two passes and a cluster."""
    shapes = [(7, 8), (20, 96)] if place.small else [(7, 8), (300, 64), (100, 1536), (100, 2048)]
    shapes += [] if place.small else [(100, 3584), (20, 8192)]
    for n, d in shapes:
        inputs = place.groups(3, n, d)
        dense = flat(run(place, *inputs))
        for name, laid in layouts(inputs):
            same_bits(flat(run(place, *laid)), dense, f"{name} rows of {n}x{d}")


def odd_rows(place: Place) -> None:
    """NaN, inf, zero and far rows spoil or change their own group alone."""
    clean = place.groups(3, 19, 64 if place.small else 512)
    before, *_ = run(place, *clean)
    far = 2.0 ** (12 if place.dtype == torch.float16 else 100)
    for bad in (math.nan, math.inf, 0.0, far):
        for which in range(3):
            inputs = [x.clone() for x in clean]
            row = inputs[which][1] if which < 2 else inputs[2][1, 4]
            row.mul_(bad) if math.isfinite(bad) else row[3].fill_(bad)
            found, *ours = run(place, *inputs)
            right, *gradients = elva_kernels.ranking_reward_and_grad(
                *(x.double().cpu() for x in inputs), backend="reference", **WEIGHTS
            )
            within(found.reward, right.reward, 1e-5, f"reward beside {bad}")
            for gradient, truth in zip(ours, gradients, strict=True):
                if not torch.equal(gradient.isnan().cpu(), truth.isnan()):
                    raise Red(f"NaN lies elsewhere in a gradient beside {bad}")
            for i in (0, 2):
                same_bits([found.scores[i]], [before.scores[i]], f"a neighbour of {bad}")


def many_groups(place: Place) -> None:
    """More groups than a device holds clusters: each as it is alone, to the bit."""
    inputs = place.groups(*((9, 20, 64) if place.small else (700, 100, 1536)))
    together = flat(run(place, *inputs))
    alone = [flat(run(place, *(x[i : i + 1] for x in inputs))) for i in range(len(inputs[0]))]
    found = [torch.cat(x) for x in zip(*alone, strict=True)]
    same_bits(together, found, "a group alone")


def clusters(place: Place) -> None:
    """Clusters of 1, 2, 4 and 8 blocks: masked NaN rows are not read, far rows are rescaled."""
    dims = (32, 64) if place.small else (128, 256, 384, 768, 1536, 3584)
    for d in dims:
        query, positive, negatives = place.groups(6, 100, d)
        mask = torch.rand(6, 100, device=place.device) < 0.5
        mask[0] = False
        hurt = negatives.masked_fill(~mask.unsqueeze(-1), math.nan)
        right = run(place, query, positive, negatives, mask=mask)
        found = run(place, query, positive, hurt, mask=mask)
        same_bits(flat(found), flat(right), f"masked rows of {d}")
        far = negatives.clone()
        far[1, ::7] *= place.far
        if place.dtype != torch.float16:  # its small numbers lose bits
            far[3, ::5] /= place.far
        options = {**WEIGHTS, "mask": torch.ones_like(mask)}
        found, *ours = run(place, query, positive, far, **options)
        near, *_ = run(place, query, positive, negatives, **options)
        same_bits(found, near, f"values of far rows of {d}")
        exact = [x.double().cpu().requires_grad_() for x in (query, positive, far)]
        weight = torch.ones(6, dtype=torch.float64)
        truths = exact_gradients(exact, tuple(exact), found.scores, weight, options)
        gradients_within((query, positive, far), ours, truths, ALLOWED, f"far rows of {d}")


def banks(place: Place) -> None:
    """Negatives by index, some named twice and some masked; gradients that are wanted alone."""
    sizes = ((5, 7, 33, 40), (3, 20, 64, 30))
    sizes += () if place.small else ((6, 100, 1536, 900), (4, 50, 3584, 300))
    for groups, n, d, rows in sizes:
        query, positive, bank = place.groups(groups, rows, d)
        bank = bank[0]
        index = torch.randint(-1, rows, (groups, n), device=place.device)
        index[1, :3] = index[0, :3].clamp(min=0)
        mask = index >= 0
        inputs, what = (query, positive, bank), f"{groups}x{n}x{d} of {rows}"
        found, *ours = run(place, *inputs, negative_index=index)
        gathered, *_ = run(place, query, positive, bank[index.clamp(min=0)], mask=mask)
        same_bits(found, gathered, f"{what}, gathered")
        exact = [x.double().cpu().requires_grad_() for x in inputs]
        named = exact[2][index.clamp(min=0).cpu()]
        options = {**WEIGHTS, "mask": mask}
        weight = torch.ones(groups, dtype=torch.float64)
        truths = exact_gradients(exact, (*exact[:2], named), found.scores, weight, options)
        gradients_within(inputs, ours, truths, groups * ALLOWED, what)
        for wrt in (("query",), ("query", "positive"), ("negatives",), ("positive", "negatives")):
            _, *some = run(place, *inputs, negative_index=index, wrt=wrt)
            for name, gradient, whole in zip(
                ("query", "positive", "negatives"), some, ours, strict=True
            ):
                same_bits([gradient], [whole if name in wrt else None], f"{what} wrt {wrt}")


def names_out_of_range(place: Place) -> None:
    """A row of a bank that does not exist makes its own group NaN, and no illegal access. So does a
    relevance out of range."""
    query, positive, bank = place.groups(4, 50, 64)
    relevance = torch.rand(4, 50, device=place.device)
    right, *_ = run(place, query, positive, bank, relevance=relevance)
    for bad in (math.nan, 1.5, -0.1):
        relevance[2, 49] = bad
        found, *gradients = run(place, query, positive, bank, relevance=relevance)
        if not all(bool(x[2].isnan().all()) for x in (found.reward, *gradients)):
            raise Red(f"a group with a relevance of {bad} is not NaN")
        same_bits(found[3:], right[3:], f"ranks and scores by a relevance of {bad}")
        for i in (0, 1, 3):
            same_bits([found.reward[i]], [right.reward[i]], f"a neighbour of a relevance of {bad}")
    index = torch.randint(0, 50, (4, 9), device=place.device)
    right, *_ = run(place, query, positive, bank[0], negative_index=index)
    for bad in (50, 2**40, -2):
        index[2, 3] = bad
        found, *_ = run(place, query, positive, bank[0], negative_index=index)
        if not bool(found.reward[2].isnan()):
            raise Red(f"the reward of a group that names row {bad} of 50 is not NaN")
        for i in (0, 1, 3):
            same_bits([found.reward[i]], [right.reward[i]], f"a neighbour of row {bad}")


def repeats(place: Place) -> None:
    """The same bits again and again, while another stream is busy."""
    inputs = place.groups(*((4, 20, 64) if place.small else (16, 100, 1536)))
    repeat(place, functools.partial(run, place, *inputs))


def repeat(place: Place, op: Any) -> None:
    first = flat(op())
    busy = torch.randn(1024, 1024, device=place.device)
    for i in range(5 if place.dry else 1000):
        if not place.dry and i % 10 == 0:
            with torch.cuda.stream(torch.cuda.Stream()):
                busy @ busy
        same_bits(flat(op()), first, f"repeat {i}")


def offsets(place: Place) -> None:
    """Negatives that lie more than 2^31 elements apart give what they give side by side."""
    apart = 2**20 if place.dry else 2**30 + 8
    query, positive, negatives = place.groups(1, 3, 256)
    wide = torch.empty(2 * apart + 256, dtype=place.dtype, device=place.device)
    far = wide.as_strided((1, 3, 256), (3 * apart, apart, 1)).copy_(negatives)
    near = flat(run(place, query, positive, negatives))
    same_bits(flat(run(place, query, positive, far)), near, "far offsets")


BOTH = ("ranking_reward_and_grad", "ranking_reward")
CHECKS = {
    "reward values": (values, BOTH),
    "reward relevance": (relevances, BOTH),
    "reward layouts": (same_in_every_layout, BOTH),
    "reward odd rows": (odd_rows, BOTH),
    "reward many groups": (many_groups, BOTH),
    "reward clusters": (clusters, BOTH),
    "reward banks": (banks, BOTH),
    "reward names": (names_out_of_range, BOTH),
    "reward repeats": (repeats, BOTH),
    "reward offsets": (offsets, BOTH),
}
