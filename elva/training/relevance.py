"""How relevant a negative is itself: what a graded reward counts it by.

Liu et al., ELVA, arXiv:2606.20280, abstract: negatives should be treated differently according to
their similarity to the positive. The paper gives no formula; both measures here are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import elva_kernels
from elva.recipe import StageConfig
from elva.training.comparison import Comparison
from elva.training.examples import Examples
from elva.training.negatives import Embed, embedded

Measure = Callable[[np.ndarray, np.ndarray], Tensor]
"""Rows of candidates [A], positives, and [A, N], their negatives, -1 where fewer -> [A, N]."""


class Relevance:
    """The relevance of a step's negatives to their positives, in [0, 1].

    Args:
        measure: of rows of candidates.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    @classmethod
    def of(cls, stage: StageConfig, examples: Examples, embed: Embed) -> Relevance | None:
        """As the stage asks for it; None where it asks for none.

        Args:
            embed: by the model that the stage starts from.
        """
        if stage.relevance == "start":
            rows = range(len(examples.candidates))
            return cls(similarity(embedded(embed, examples.candidates, rows)))
        if stage.relevance == "grains":
            return cls(shared_grains(examples.candidate_grains()))
        return None

    def __call__(self, comparison: Comparison, asks: Tensor, answers: Tensor) -> Tensor:
        """[A, N] of each negative to one right answer of its query, 0 where there is none.

        Args:
            asks, answers: [A] queries, and columns of `comparison.target`.
        """
        b, p = asks.cpu().numpy(), answers.cpu().numpy()
        places = comparison.negatives[b]
        rows = np.where(places >= 0, comparison.candidates[places], -1)
        found = self.measure(comparison.candidates[comparison.target[b, p]], rows)
        return found.to(asks.device)


def similarity(embeddings: Tensor) -> Measure:
    """The cosine of a negative's and its positive's embeddings, 0 where it is below.

    Args:
        embeddings: [candidates, D], which stay as they are.
    """

    def measure(positives: np.ndarray, negatives: np.ndarray) -> Tensor:
        own = embeddings[torch.from_numpy(positives).to(embeddings.device)]
        index = torch.from_numpy(negatives).to(embeddings.device)
        found = elva_kernels.ranking_reward(own, own, embeddings, negative_index=index)
        return found.scores[:, 1:].clamp(min=0)

    return measure


def shared_grains(grains: Sequence[frozenset[tuple[str, str]]]) -> Measure:
    """The grains that a negative shares with its positive, over those that either has.

    Args:
        grains: (type, text) of each candidate's.
    """

    def of(one: frozenset[tuple[str, str]], row: int) -> float:
        either = one | grains[row] if row >= 0 else frozenset()
        return len(one & grains[row]) / len(either) if either else 0.0

    def measure(positives: np.ndarray, negatives: np.ndarray) -> Tensor:
        return torch.tensor([
            [of(grains[one], row) for row in some]
            for one, some in zip(positives.tolist(), negatives.tolist(), strict=True)
        ])  # fmt: skip

    return measure
