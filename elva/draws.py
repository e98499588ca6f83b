"""Seeded draws: pure functions of their seed, so that a resumed run draws what an unkilled one
would have. numpy draws, so that what only reads data loads no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Seed = Sequence[int | str]


def uniforms(seed: Seed, shape: Sequence[int]) -> Tensor:
    """[*shape] float64 in [0, 1)."""
    import torch

    return torch.from_numpy(_uniforms(seed, shape))


def permutation(seed: Seed, count: int) -> list[int]:
    """0 to count - 1 in an order drawn by the seed."""
    found: list[int] = _uniforms(seed, (count,)).argsort().tolist()
    return found


def multinomial(seed: Seed, count: int, shares: np.ndarray, times: int) -> np.ndarray:
    """[times, n] how often each of n outcomes comes up in `count` draws.

    Args:
        shares: [n] their probabilities, of sum 1.
    """
    return _generator(seed).multinomial(count, shares, times)


def _uniforms(seed: Seed, shape: Sequence[int]) -> np.ndarray:
    """The bits of `torch.rand` in float64 from a generator of this seed: 53 of each 64."""
    words = _generator(seed).randint(0, 2**32, 2 * prod(shape), dtype=np.uint32).astype(np.uint64)
    bits = (words[::2] << np.uint64(32) | words[1::2]) & np.uint64(2**53 - 1)
    return (bits * 2.0**-53).reshape(shape)


def _generator(seed: Seed) -> np.random.RandomState:
    digest = hashlib.sha256(repr(tuple(seed)).encode()).digest()
    return np.random.RandomState(int.from_bytes(digest[:4], "little"))
