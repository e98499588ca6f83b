"""Inputs that are made to go wrong: what others were bitten by, drawn together.

Rows of every magnitude, subnormal and at the end of the range, mixed within a row; zero and -0,
constant, one-hot, on a lattice; copies, opposites, neighbours by one ulp; NaN and inf; in every
layout that a tensor may have. Shapes around every width of a vector, empty ones too.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 257)
KINDS = (
    "scaled", "tiny", "huge", "subnormal", "mixed", "zero", "signed zeros", "constant", "one-hot",
    "lattice", "copy", "opposite", "neighbour", "near", "nan", "inf",
)  # fmt: skip
LAYOUTS = ("dense", "every other", "misaligned", "transposed", "reversed", "offset rows")


class Draw:
    """A case's randomness, of a seed and a number."""

    def __init__(self, seed: int, number: int, dtypes: Sequence[torch.dtype], largest: int) -> None:
        """`largest`: elements that a tensor of rows has at most."""
        self.random = random.Random(f"{seed}-{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.dtype = self.random.choice(dtypes)
        self.largest = largest
        self.words: list[str] = [str(self.dtype)[6:]]
        self.flushed, self.threads = self.maybe(0.1), self.one_of((1, 1, 1, 2, 3))
        self.cast = self.maybe(0.1)
        self.words += ["flushed"] * self.flushed + ["autocast"] * self.cast

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """The case's threads, autocast and flushing of subnormals, as a program may have them."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(self.flushed)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
                yield
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)

    def maybe(self, share: float) -> bool:
        return self.random.random() < share

    def one_of(self, values: Sequence[Any]) -> Any:
        return self.random.choice(values)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def size(self) -> int:
        return int(self.one_of(SIZES)) if self.maybe(0.5) else self.random.randint(1, 40)

    def count(self, *values: int) -> int:
        """How many there are: of `values`, or about as many as a vector's width; seldom none."""
        return 0 if self.maybe(0.02) else int(self.one_of([*values, self.size()]))

    def rows(self, *leading: int, size: int, near: Tensor | None = None, bad: bool) -> Tensor:
        """[*leading, size] in the case's dtype, hazards among them.

        Args:
            near: [*, size] in float64, what rows lie near, at all distances.
            bad: whether rows may hold NaN or inf.
        """
        count = math.prod(leading)
        rows = self.randn(count, size)
        if near is not None and near.numel():
            others = near.reshape(-1, size)
            others = others[self.randint(0, len(others), count)]
            largest = others.abs().amax(1, keepdim=True)
            rows = rows + self.randn(count, 1) * torch.where(largest > 0, others / largest, 0.0)
        rows = rows.to(self.dtype)
        share = self.one_of((0.0, 0.1, 0.5, 1.0))
        kinds = KINDS if bad and self.maybe(0.4) else KINDS[:-2]
        for i in range(count):
            if self.maybe(share):
                kind = self.one_of(kinds)
                rows[i] = self.hazard(kind, rows, i)
                self.words.append(kind)
        return rows.reshape(*leading, size)

    def hazard(self, kind: str, rows: Tensor, at: int) -> Tensor:
        """A row in the place of `rows[at]`."""
        row, info = rows[at].double(), torch.finfo(self.dtype)
        row = torch.where(row.isfinite(), row, 1.0)
        row = row / row.abs().amax().clamp(min=2.0**-40)
        low, high = math.log2(info.tiny), math.log2(info.max)
        other = rows[self.random.randrange(len(rows))]
        if kind in ("copy", "opposite", "neighbour"):
            if kind == "opposite":
                return -other
            if kind == "copy" or not other.isfinite().all():
                return other.clone()
            return (
                torch.where(
                    self.rand(len(row)) < 0.2, other.nextafter(torch.full_like(other, 9.0)), other
                )
                if self.dtype not in (torch.float16, torch.bfloat16)
                else other * (1 + info.eps)
            )
        if kind == "near":
            scale = 2.0 ** -self.random.randint(5, 30)
            return (other.double().nan_to_num() * (1 + scale * self.randn(len(row)))).to(self.dtype)
        if kind == "lattice":
            return (self.randint(0, 2, len(row)) * 2 - 1).to(self.dtype)
        if kind in ("constant", "one-hot"):
            every = kind == "constant"
            here = torch.arange(len(row)) == self.random.randrange(len(row))
            value = torch.tensor(2.0 ** self.random.uniform(low, high - 1), dtype=torch.float64)
            return torch.where(here | every, value, 0.0).to(self.dtype)
        if kind == "zero":
            return torch.zeros_like(rows[at])
        if kind == "signed zeros":
            return torch.where(self.rand(len(row)) < 0.5, -0.0, 0.0).to(self.dtype)
        if kind in ("nan", "inf"):
            value = math.nan if kind == "nan" else self.one_of((math.inf, -math.inf))
            here = torch.arange(len(row)) == self.random.randrange(len(row))
            return torch.where(here, value, row).to(self.dtype)
        smallest = low + math.log2(info.eps)
        power = {
            "scaled": lambda: self.random.uniform(-10, 10),
            "tiny": lambda: self.random.uniform(low, low + 6),
            "huge": lambda: self.random.uniform(high - 3, high - 0.01),
            "subnormal": lambda: self.random.uniform(smallest, low),
            "mixed": lambda: 0.0,
        }[kind]()
        if kind == "mixed":
            spread = torch.rand(len(row), generator=self.generator, dtype=torch.float64)
            return (row * torch.exp2(smallest + (high - 0.01 - smallest) * spread)).to(self.dtype)
        half = power / 2
        return (row * 2.0**half * 2.0 ** (power - half)).to(self.dtype)

    def laid(self, x: Tensor) -> Tensor:
        """The same values, as they may lie in memory; what lies between them is NaN."""
        kind = self.one_of(LAYOUTS)
        if x.dim() == 0 or x.numel() == 0 or kind == "dense" or not x.is_floating_point():
            return x
        self.words.append(kind)
        if kind == "every other":
            padded = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan)
            padded[..., 1 : 2 * x.shape[-1] + 1 : 2] = x
            return padded[..., 1 : 2 * x.shape[-1] + 1 : 2]
        if kind == "misaligned":
            flat = x.new_full((x.numel() + 2,), math.nan)
            flat[1:-1] = x.flatten()
            return flat[1:-1].view(x.shape)
        if kind == "transposed":
            return x.movedim(-1, 0).contiguous().movedim(0, -1)
        if kind == "reversed":
            turned = tuple(reversed(range(x.dim())))
            return x.permute(turned).contiguous().permute(turned)
        padded = x.new_full((*x.shape[:-1], x.shape[-1] + 5), math.nan)
        padded[..., 3:-2] = x
        return padded[..., 3:-2]

    def mask(self, *shape: int) -> Tensor | None:
        """Bool, True = live; all, none, or some of them."""
        if self.maybe(0.5):
            return None
        return self.rand(*shape) < self.one_of((0.0, 0.3, 0.8, 1.1))

    def weights(self, *, soft: bool) -> dict[str, float]:
        """Scalars of the reward: the defaults, or drawn."""
        if self.maybe(0.3):
            return {"margin": 0.1, "rank_penalty": 0.01, "w_margin": 0.4, "w_rank": 0.6}
        found = {
            "margin": self.one_of((-2.0, -1.0, -0.1, 0.0, 0.1, 0.5, 2.0)),
            "rank_penalty": self.one_of((0.0, 0.01, 0.1, 0.5)),
            "w_margin": self.one_of((0.0, 0.4, 1.0)),
            "w_rank": self.one_of((0.0, 0.6, 1.0)),
        }
        if soft and self.maybe(0.4):
            found["rank_temperature"] = self.one_of((0.01, 0.05, 0.3, 2.0))
        return found
