"""Every kernel of a backend once or twice, for tools that look into it.

`python -m benchmarks.gpu.touch BACKEND FAMILY small`, for compute-sanitizer, or `large`, for ncu.
"""

import sys
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from benchmarks.gpu.place import Place, layouts

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def autograd(place: Place, op: Any, *inputs: Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    op(*leaves, backend=place.backend).backward()


def reward_of(place: Place, groups: int, n: int, d: int) -> None:
    """One pass and two, a bank with and without its gradient."""
    query, positive, negatives = place.groups(groups, n, d)
    elva_kernels.ranking_reward_and_grad(query, positive, negatives, backend=place.backend)
    autograd(
        place,
        lambda *x, **named: elva_kernels.ranking_reward(*x, **named).reward.sum(),
        *(query, positive, negatives),
    )
    bank = negatives.flatten(0, 1)
    index = torch.randint(-1, len(bank), (groups, n), device=place.device)
    for wrt in (("query",), ("query", "positive", "negatives")):
        elva_kernels.ranking_reward_and_grad(
            query, positive, bank, negative_index=index, wrt=wrt, backend=place.backend
        )


def odd_reward(place: Place, d: int) -> None:
    """Masks, far rows, soft ranks, a relevance, rows in every layout."""
    inputs = place.groups(3, 100 if d > 1000 else 37, d)
    mask = torch.rand(inputs[2].shape[:2], device=place.device) < 0.7
    inputs[2][1, 3] *= place.far
    for _, laid in layouts(inputs):
        for temperature in (0.0, 0.1):
            named = {"mask": mask, "rank_temperature": temperature, "backend": place.backend}
            for relevance in (None, torch.rand_like(mask, dtype=torch.float32)):
                elva_kernels.ranking_reward_and_grad(*laid, relevance=relevance, **named)


def reward(place: Place, large: bool) -> None:
    if large:
        reward_of(place, 512, 100, 1536)
        reward_of(place, 256, 100, 3584)
        return
    reward_of(place, 3, 19, 512)
    dims = (128, 768, 1536, 3584) if place.dtype == torch.bfloat16 else (768,)  # clusters of 1 to 8
    for d in dims if place.backend == "cuda" else (64,):
        odd_reward(place, d)


def in_batch(place: Place, large: bool) -> None:
    b, m, d = (4096, 4096, 1536) if large else (70, 140, 96)
    query, candidates = place.randn(b, d), place.randn(m, d)
    named = {"backend": place.backend}
    for k in (0, 10):
        elva_kernels.rank_statistics(query, candidates, k=k, temperature=0.1, **named)
    for symmetric in (False, True):
        elva_kernels.info_nce_and_grad(query, candidates, symmetric=symmetric, **named)

    def rewards(*rows: Tensor, **named: Any) -> Tensor:
        return elva_kernels.in_batch_ranking_reward(*rows, head=10, **named).reward.sum()

    autograd(place, rewards, query, candidates)
    if not large:
        target = torch.stack([torch.arange(b), torch.arange(b) + b], 1).to(place.device)
        target[3, 1], target[4] = -1, -1
        excluded = torch.tensor([[0, 5], [2, 9]], device=place.device)
        elva_kernels.info_nce_and_grad(
            query, candidates, target, excluded=excluded, symmetric=True, **named
        )


def topk(place: Place, large: bool) -> None:
    corpus = place.randn(400_000, 1536) if large else place.randn(700, 96)
    for count in (16, 1, 256) if large else (1, 5, 40):
        query = place.randn(count, corpus.shape[1])
        for metric in ("dot",) if large else ("dot", "cosine"):
            elva_kernels.topk(query, corpus, 10, metric=metric, backend=place.backend)
        for rows in (corpus, corpus[:, :77]):  # of codes on 16 bytes, and not
            codes = elva_kernels.row_codes(rows, backend=place.backend)
            asked = query[:, : rows.shape[1]]
            elva_kernels.coded_topk(asked, rows, codes, 10, backend=place.backend)


FAMILIES = {"reward": reward, "in_batch": in_batch, "topk": topk}


def main() -> None:
    backend, family, size = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for dtype in DTYPES[:1] if size == "large" else DTYPES:
        place = Place(device, backend, dtype, device == "cpu")
        FAMILIES[family](place, size == "large")
        place.wait()
    print("touched")


if __name__ == "__main__":
    main()
