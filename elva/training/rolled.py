"""A step's batch after its rollouts: what its losses are computed from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from elva.model.rollout import Rollouts
from elva.training.plan import Batch
from elva.training.prompts import StepPrompts
from elva.training.ranking import Embedded


@dataclass
class Rolled:
    """What was asked in a step, and what the model wrote."""

    batch: Batch
    asked: StepPrompts
    rollouts: Rollouts  # len(asked.prompts) * G rows
    captions: Tensor | None  # [len(asked.prompts), S], -100 padded
    bank: Tensor | None  # [K, D], the candidates that are not rolled out
    advantages: Tensor | None = None  # [len(asked.prompts) * G], those of the first pass

    @property
    def count(self) -> int:
        """The step's queries."""
        return len(self.asked.comparison.queries)

    @property
    def shown(self) -> int:
        """The step's candidates that are rolled out, where it embeds them."""
        return self.asked.comparison.rolled

    def own_rows(self, groups: int) -> Tensor:
        """[R] of this process's rollouts among those of all: queries' first, then candidates'."""
        device = self.rollouts.ids.device
        places = [*self.asked.asks, *(self.count + i for i in self.asked.shows)]
        first = torch.tensor(places, device=device, dtype=torch.long)[:, None] * groups
        return (first + torch.arange(groups, device=device)).flatten()

    def embedded(self, rows: Tensor) -> Embedded:
        """Where the step's embeddings stand, those [(queries + candidates) * G, D] of all processes
        and then rows of the bank."""
        groups = len(rows) // (self.count + self.shown)
        query, shown = rows.split([self.count * groups, self.shown * groups])
        table = shown if self.bank is None else torch.cat([shown, self.bank.to(rows.dtype)])
        columns = torch.arange(len(shown), device=rows.device).view(-1, groups)
        kept = torch.arange(len(shown), len(table), device=rows.device)[:, None].expand(-1, groups)
        return Embedded(query.unflatten(0, (-1, groups)), table, torch.cat([columns, kept]))

    def per_row(self, asked: Tensor, shown: Tensor, negatives: int) -> Tensor:
        """Advantages of actions as those [(B + candidates) * G] of sequences: each shares the
        advantages of the actions that it is part of.

        Args:
            asked: [B, G], of the queries' rollouts.
            shown: [B, G], of their candidates'.
            negatives: a query's own, the first of those that it is compared with.
        """
        found, count = self.asked.comparison, self.count
        own = found.negatives[:, :negatives]
        shared = asked.new_zeros(count + self.shown, asked.shape[1])
        shared[:count] = asked
        for b in range(count):
            members = {*found.target[b].tolist(), *own[b].tolist()}
            rows = [count + place for place in members if 0 <= place < found.rolled]
            shared[rows] += shown[b]
        return shared.flatten()
