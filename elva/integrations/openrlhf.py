"""Rewards in OpenRLHF: the `reward_func` of a Python file that `--reward.remote_url` names."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elva.errors import UserError
from elva.integrations.rewards import Recipe
from elva.integrations.rollouts import EmbedFn, RolloutReward, Together


class RankingReward(RolloutReward):
    """A `reward_func` for OpenRLHF: how well each rollout's embedding ranks.

    OpenRLHF calls it for one rollout at a time, from many threads; those that wait are ranked in
    one call of a kernel. It has no batch to take negatives from, so a label is JSON with both:
    ``{"positive": "a red car", "negatives": ["a blue car", "a red bus"]}``. With a bank both are
    rows, and without `negatives` all its rows are ranked.

    What it raises, OpenRLHF writes to its log and goes on without a reward: look there first.

    Args:
        embed_fn, candidate_fn, bank, reward, settings: as in `elva.integrations.trl.RankingReward`.
        text_fn: (prompt, completion) -> what `embed_fn` takes of a rollout; None: the completion,
            which still holds special tokens such as ``<|im_end|>``.

    Raises:
        UserError: as there; a label that is no such JSON; a query that does not begin with its
            prompt.

    Example: a file `reward.py`, for ``--reward.remote_url reward.py``::

        from elva.integrations.openrlhf import RankingReward
        from sentence_transformers import SentenceTransformer

        reward_func = RankingReward(SentenceTransformer("all-MiniLM-L6-v2").encode)
    """

    def __init__(
        self, embed_fn: EmbedFn, *, candidate_fn: EmbedFn | None = None, bank: Tensor | None = None,
        reward: str | Recipe = "ranking", text_fn: Callable[[str, str], Any] | None = None,
        **settings: float,
    ) -> None:  # fmt: skip
        super().__init__(embed_fn, candidate_fn=candidate_fn, bank=bank, reward=reward, **settings)
        self.text_fn = text_fn
        self.together = Together(self)

    def __call__(
        self, queries: list[str], prompts: list[str], labels: list[str]
    ) -> dict[str, Any]:  # fmt: skip
        """`rewards` and `scores` [n], the same, and `extra_logs`, the reward's parts, each [n].

        Args:
            queries: prompt and completion of each rollout in one text.
            prompts: its prompt.
            labels: what it should find and among what, as JSON.
        """
        waiting = []
        for query, prompt, label in zip(queries, prompts, labels, strict=True):
            if not query.startswith(prompt):
                raise UserError(
                    f"openrlhf: a query must begin with its prompt, got {query[:80]!r} for "
                    f"{prompt[:80]!r}; raise the longest length, so that prompts are not cut"
                )
            completion = query[len(prompt) :]
            text = completion if self.text_fn is None else self.text_fn(prompt, completion)
            waiting.append(self.together(text, *_label(label)))
        found = [x.result() for x in waiting]
        parts = {name: torch.tensor([x[name] for x in found]) for name in found[0]}
        rewards = parts.pop("reward")
        return {"rewards": rewards, "scores": rewards, "extra_logs": parts}


def _label(text: Any) -> tuple[Any, Any]:
    try:
        label = json.loads(text)
        return label["positive"], label.get("negatives")
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            'openrlhf: a label must be JSON like {"positive": "...", "negatives": ["..."]}, '
            f"got {text!r}"
        ) from error
