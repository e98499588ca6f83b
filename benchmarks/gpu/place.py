"""Where the proofs run, how much they take, and what a right result is.

Bounds are the contract's; truths are the reference's in float64, on the CPU.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from elva_kernels import reference
from elva_kernels.backends.choice import launcher, obstacle_to

WEIGHTS = {"margin": -0.9, "rank_penalty": 0.05, "w_margin": 0.4, "w_rank": 0.6}
# The contract's: of scores; of gradients times their rows' norms, beyond half an ulp.
GROUPED = {"scores": 1e-6, "gradients": 2e-6}
BATCHED = {"scores": 1e-5, "gradients": 2e-5}


class Red(Exception):
    """A check found a wrong result."""


@dataclass(frozen=True)
class Place:
    """A device, a backend, a dtype; `small` where a shape costs a compilation, or on a CPU."""

    device: str
    backend: str
    dtype: torch.dtype
    dry: bool = False

    @property
    def small(self) -> bool:
        return self.dry or self.backend == "triton"

    @property
    def far(self) -> float:
        """A power of two that takes a row out of a kernel's range, if the dtype has any."""
        return 2.0 ** (8 if self.dtype == torch.float16 else 70)

    def obstacle(self, ops: tuple[str, ...]) -> str | None:
        """Why the backend cannot compute one of `ops` here."""
        device = torch.device(self.device)
        found = (obstacle_to(op, self.backend, device.type, self.dtype) for op in ops)
        return next((reason for reason in found if reason is not None), None)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def groups(self, groups: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, positive and negatives whose scores are spread from -0.7 to 0.7."""
        query = torch.randn(groups, d, device=self.device)
        positive = query + torch.randn(groups, d, device=self.device)
        negatives = torch.randn(groups, n, d, device=self.device)
        negatives += torch.linspace(-1, 1, n, device=self.device).view(1, n, 1) * query[:, None]
        return query.to(self.dtype), positive.to(self.dtype), negatives.to(self.dtype)

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()


def backends_of(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """Those that can compute `op`, the reference left out where there is another."""
    found = []
    for name in ("cpu", "cuda", "triton", "reference"):
        try:
            launcher(op, name, torch.device(device), dtype)
        except elva_kernels.BackendUnavailable:
            continue
        found.append(name)
    return [name for name in found if name != "reference"] or found


def within(found: Tensor, right: Tensor, allowed: Any, what: str) -> None:
    """Red where |found - right| is over `allowed` or NaN lies elsewhere; both to the CPU."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    same = (found == right) | (found.isnan() & right.isnan())
    error = torch.where(same, 0.0, (found - right).abs())
    excess = torch.where(error.isnan(), math.inf, error - allowed)
    if excess.numel() and excess.max() > 0:
        raise Red(f"{what} is {excess.max().item():.2e} over its bound")


def gradient_bound(row: Tensor, right: Tensor, allowed: float) -> Tensor:
    """Per element: the contract's bound over the row's norm, and half an ulp of what is stored."""
    norm = row.double().cpu().norm(dim=-1, keepdim=True)
    half_ulp = torch.finfo(row.dtype).eps / 2 * right.double().cpu().abs()
    return allowed / norm.clamp(min=1e-30) + half_ulp + torch.finfo(row.dtype).tiny


def gradients_within(rows: Any, found: Any, right: Any, allowed: float, what: str) -> None:
    """Of each of `rows` that has one."""
    for row, gradient, truth in zip(rows, found, right, strict=True):
        within(gradient, truth, gradient_bound(row.detach(), truth, allowed), f"{what} gradient")


def same_bits(found: Any, right: Any, what: str) -> None:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for a, b in zip(found, right, strict=True):
        if a is None and b is None:
            continue
        word = words[a.element_size()]
        if a.dtype != b.dtype or not torch.equal(a.view(word), b.view(word)):
            raise Red(f"{what}: bits differ")


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, tuples and lists in it opened."""
    if isinstance(result, tuple | list):
        return [x for part in result for x in flat(part)]
    return [result] if isinstance(result, Tensor) else []


def layouts(inputs: Any) -> Iterator[tuple[str, Any]]:
    """The same values as they may lie: every second element; rows off 16 bytes."""
    yield "dense", inputs
    yield "strided", tuple(torch.stack([x, x], -1)[..., 0] for x in inputs)
    yield (
        "misaligned",
        tuple(torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in inputs),
    )


def exact_gradients(
    leaves: list[Tensor],
    rows: tuple[Tensor, Tensor, Tensor],
    scores: Tensor,
    weight: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    """By autograd from `rows` to `leaves`, in float64, at the ranks of the scores found: nearly
    equal ones may change places."""
    weights = {key: options[key] for key in reference.Weights._fields if key in options}
    mask, found = options["mask"].cpu(), scores.double().cpu()
    found = torch.where(found.isfinite(), found, 0.0)
    relevance = options.get("relevance")
    slopes = reference.reward_from_scores_backward(
        found,
        mask,
        weight.double().cpu(),
        reference.Weights(**weights),
        None if relevance is None else relevance.double().cpu(),
    )
    return torch.autograd.grad(reference.cosine_scores(*rows, mask), leaves, slopes)
