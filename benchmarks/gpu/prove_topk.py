"""Proofs of exact search."""

import functools
import math

import torch
from torch import Tensor

import elva_kernels
from benchmarks.gpu.place import BATCHED, Place, Red, within
from benchmarks.gpu.prove_reward import repeat
from elva_kernels.backends.choice import launcher
from elva_kernels.reference import FineCodes, RowCodes, score_bounds


def values(place: Place) -> None:
    """Scores of random rows, a tie, a row with NaN and one out of range, both metrics."""
    rows = 3000 if place.small else 50_000
    corpus = place.randn(rows, 96)
    corpus[7] = corpus[rows - 1]
    corpus[11, 0] = math.nan
    corpus[13] *= 2.0 ** (-12 if place.dtype == torch.float16 else -70)
    exact = corpus.double().cpu()
    for count in (1, 5, 33, 200):
        query = corpus[7:8].expand(count, -1) + place.randn(count, 96)
        for metric in ("cosine", "dot"):
            found = elva_kernels.topk(query, corpus, 20, metric=metric, backend=place.backend)
            right = elva_kernels.topk(
                query.double().cpu(), exact, 20, metric=metric, backend="reference"
            )
            unit = query.double().norm(dim=-1, keepdim=True).cpu() * 20
            allowed = BATCHED["scores"] * (1 if metric == "cosine" else unit)
            within(found.scores, right.scores, allowed, f"{count} {metric} scores")
            if bool((found.index == 11).any()):
                raise Red("a row with NaN was found")


def order(place: Place) -> None:
    """On a lattice, where every score is exact: a stable sort's order, whatever k is."""
    for rows in (200, 5000) if place.small else (200, 5000, 70_001):
        corpus = (place.randn(rows, 64) >= 0).to(place.dtype) * 2 - 1
        for count in (1, 7) if place.dry else (1, 7, 40, 130):
            query = (place.randn(count, 64) >= 0).to(place.dtype) * 2 - 1
            dots = query.float().cpu() @ corpus.float().cpu().T  # whole numbers below 64
            right = dots.sort(stable=True, dim=-1, descending=True)
            for k in (1, 10, 100, 300):
                for metric, unit in (("cosine", 64), ("dot", 1)):
                    found = elva_kernels.topk(
                        query, corpus, k, metric=metric, backend=place.backend
                    )
                    what = f"{count} queries of {rows} rows, k = {k}, {metric}"
                    if not torch.equal(found.index.cpu(), right.indices[:, :k]):
                        raise Red(f"{what}: not a stable sort's order")
                    if not torch.equal(found.scores.cpu().float(), right.values[:, :k] / unit):
                        raise Red(f"{what}: scores are not exact")


def far_copies(place: Place) -> None:
    """Copies of a row far apart, on both sides of every border between chunks that we use."""
    rows = 20_000 if place.small else 1_200_000
    corpus = place.randn(rows, 64)
    starts = torch.tensor([0, 1000, 4096 - 150, 16384 - 150])
    if not place.small:
        more = torch.tensor([2**16 - 150, 2**17 - 150, 2**18 - 150, 2**19 - 150, 2**20 - 150])
        starts = torch.cat([starts, more, torch.tensor([10**6, rows - 300])])
    starts = starts.sort().values.to(place.device)  # of copies the lower index comes first
    for count in (1, 16, 64, 300):
        query = place.randn(count, 64)
        right = starts + torch.arange(count, device=place.device).unsqueeze(1)
        corpus[right.flatten()] = 2 * query.repeat_interleave(len(starts), 0)
        for metric in ("cosine", "dot"):
            for k in (3, len(starts)):
                found = elva_kernels.topk(query, corpus, k, metric=metric, backend=place.backend)
                if not torch.equal(found.index, right[:, :k]):
                    raise Red(f"{count} queries, k = {k}, {metric}: copies in another order")


def repeats(place: Place) -> None:
    """The same bits again and again, while another stream is busy."""
    corpus = place.randn(2000 if place.small else 100_000, 64 if place.small else 768)
    for count in (1, 40):
        query = place.randn(count, corpus.shape[1])
        op = functools.partial(elva_kernels.topk, query, corpus, 10, backend=place.backend)
        repeat(place, op)


def codes(place: Place) -> None:
    """Bounds by codes are the reference's, and what they prove is what reading all rows gives."""
    for dim in (96, 100):  # rows of codes on 16 bytes and not
        corpus = place.randn(3000 if place.small else 50_000, dim)
        corpus[1000:2000] = corpus[7] + 2.0**-6 * place.randn(1000, dim)
        corpus[11], corpus[13, 0] = corpus[7], math.nan
        coded = elva_kernels.row_codes(corpus, backend=place.backend)
        mask = torch.arange(len(corpus), device=place.device) % 5 != 2
        live = mask.nonzero()[:, 0]
        for count in (1, 5, 33, 200):
            query = corpus[7:8] + 2.0**-4 * place.randn(count, dim)
            bounds_of_codes(place, query, coded)
            for k in (1, 10, 100):
                found = elva_kernels.coded_topk(
                    query, corpus, coded, k, mask=mask, backend=place.backend
                )
                for some in torch.arange(count, device=place.device).split(128):
                    right = elva_kernels.topk(
                        query[some], corpus[live], k, metric="cosine", backend=place.backend
                    )
                    same = torch.equal(found.index[some], live[right.index])
                    if not (same and torch.equal(found.scores[some], right.scores)):
                        raise Red(f"{count} queries, D = {dim}, k = {k}: codes give other answers")


def bounds_of_codes(place: Place, query: Tensor, coded: RowCodes) -> None:
    """Of all rows, as many as two ways of choosing take."""
    device = torch.device(place.device)
    asked = FineCodes(*launcher("row_codes", place.backend, device, place.dtype)(query, True))
    search = launcher("nearest_codes", place.backend, device, torch.float32)
    exact = score_bounds(
        FineCodes(*(x.cpu() for x in asked)), RowCodes(*(x.cpu() for x in coded))
    ).double()
    for depth in (20, 300):
        found, index = (x.cpu() for x in search(asked, coded, depth, mask=None, floor=None))
        right = exact.sort(dim=1, descending=True, stable=True).values[:, :depth]
        what = f"{len(query)} queries, D = {query.shape[1]}, {depth} bounds"
        # SCORE_ERROR leaves room for this much.
        within(found[:, 1:], right[:, 1:], 2e-6, what)
        within(exact.gather(1, index)[:, 1:], right[:, 1:], 2e-6, f"{what} of these rows")


CHECKS = {
    "topk values": (values, ("topk",)),
    "topk order": (order, ("topk",)),
    "topk copies": (far_copies, ("topk",)),
    "topk repeats": (repeats, ("topk",)),
    "topk codes": (codes, ("row_codes", "nearest_codes")),
}
