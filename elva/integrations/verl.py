"""Rewards in verl: a function for its reward loop, and one for its `batch` reward manager.

verl calls a function by name and passes it plain values, so embedders are named too, as
`module:function` or `file.py:function`. Every process that scores loads its own.

verl 0.9's trainer scores each rollout as it ends, on any of `reward.num_workers` processes
(`compute_score`); in-batch negatives are nowhere together there, so negatives are given with each
row, or all rows of a bank are ranked. Releases whose trainer calls the `batch` reward manager have
the batch (`compute_scores`).

Example: a row has `reward_model.ground_truth` (its positive) and `extra_info.negatives`::

    python -m verl.trainer.main_ppo ... \\
        reward.custom_reward_function.path=pkg://elva.integrations.verl \\
        reward.custom_reward_function.name=compute_score \\
        +reward.custom_reward_function.reward_kwargs.embed=my_embedder.py:embed \\
        +reward.custom_reward_function.reward_kwargs.margin=0.05
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from elva.errors import NPY_FAULTS, UserError
from elva.integrations.named import named
from elva.integrations.rollouts import RolloutReward, Together

Score = dict[str, float]
"""`score`, the reward, and the reward's parts, which verl logs."""


async def compute_score(
    data_source: Any, solution_str: str, ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None, *, reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None, **reward_kwargs: Any,
) -> Score:  # fmt: skip
    """The score of one rollout, ranked with those that wait beside it in one call of a kernel.

    Args:
        data_source: the row's data set; all are scored alike.
        solution_str: the rollout.
        ground_truth: its positive, or several of them: texts, or rows of the bank.
        extra_info: `negatives`, a list of them; may be absent where there is a bank.
        reward_router_address, reward_model_tokenizer: verl's, of a reward model beside this one;
            not used.
        reward_kwargs: `embed`, the function's name, and where wanted `embed_candidates`, that of
            candidates; `bank`, a .npy of [M, D] embeddings, mapped; `text`, the name of a function
            (solution_str, extra_info) -> what `embed` takes; `reward` and its settings, as in
            `elva.integrations.trl.RankingReward`.

    Returns:
        `score` and the reward's parts.

    Raises:
        UserError: no `embed`; no positive, or no negative; a function that is not there; a setting
            that the reward does not have.
    """
    scorer = _scorer(**reward_kwargs)
    info = extra_info or {}
    found = scorer.together(scorer.text(solution_str, info), ground_truth, info.get("negatives"))
    return _named(await asyncio.wrap_future(found))


def compute_scores(
    data_sources: Sequence, solution_strs: Sequence[str], ground_truths: Sequence,
    extra_infos: Sequence[Mapping[str, Any] | None], **reward_kwargs: Any,
) -> list[Score]:  # fmt: skip
    """The scores of a batch's rollouts, for the `batch` reward manager.

    Where no row has `extra_info["negatives"]`, the positives of the others are each one's negatives
    (with a bank, all its rows are).

    Args:
        data_sources, solution_strs, ground_truths, extra_infos: a batch's columns, each entry as
            in `compute_score`.
        reward_kwargs: as in `compute_score`.

    Returns:
        A score a rollout, as of `compute_score`.

    Raises:
        As `compute_score`; UserError: some rows have negatives and some have none.
    """
    scorer = _scorer(**reward_kwargs)
    infos = [x or {} for x in extra_infos]
    given = [x.get("negatives") is not None for x in infos]  # a table fills a column with None
    if any(given) and not all(given):
        raise UserError(
            f"verl: extra_info must have negatives in every row or in none, got them in "
            f"{sum(given)} of {len(given)}"
        )
    texts = [scorer.text(x, info) for x, info in zip(solution_strs, infos, strict=True)]
    negatives = [x["negatives"] for x in infos] if any(given) else None
    found = scorer.reward.score(texts, ground_truths, negatives)
    return [_named(x) for x in scorer.reward.numbers(found, ground_truths)]


class _Scorer:
    """A reward by plain values, made once a process."""

    def __init__(
        self, *, embed: str | None = None, embed_candidates: str | None = None,
        bank: str | None = None, text: str | None = None, reward: str = "ranking",
        **settings: float,
    ) -> None:  # fmt: skip
        if embed is None:
            raise UserError(
                "verl: reward_kwargs must name the embedder, as embed: file.py:function"
            )
        self.reward = RolloutReward(
            named("verl", "embed", embed),
            candidate_fn=None
            if embed_candidates is None
            else named("verl", "embed_candidates", embed_candidates),
            bank=None if bank is None else _bank(bank),
            reward=reward,
            **settings,
        )
        self.text: Callable[[str, Mapping], Any] = (
            (lambda solution, _: solution) if text is None else named("verl", "text", text)
        )
        self.together = Together(self.reward)


def _bank(path: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    except NPY_FAULTS as error:
        raise UserError(
            f"verl: bank must be a .npy file of [M, D] embeddings, got {path!r}; {error}"
        ) from error


def _named(found: dict[str, float]) -> Score:
    return {"score" if name == "reward" else name: x for name, x in found.items()}


def _scorer(**reward_kwargs: Any) -> _Scorer:
    for name, value in reward_kwargs.items():
        if not isinstance(value, str | int | float | None):
            raise UserError(
                f"verl: reward_kwargs must be plain values, got {name}: {value!r}; name a function "
                "or a file, or give a number"
            )
    return _made(tuple(sorted(reward_kwargs.items())))


@functools.cache
def _made(reward_kwargs: tuple) -> _Scorer:
    return _Scorer(**dict(reward_kwargs))
