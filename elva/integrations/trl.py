"""Rewards in TRL's GRPOTrainer: `reward_funcs=[RankingReward(embed_fn)]`."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from elva.errors import UserError
from elva.integrations.rewards import Recipe
from elva.integrations.rollouts import EmbedFn, RolloutReward


class RankingReward(RolloutReward):
    """A reward function for TRL's `GRPOTrainer`: how well each completion's embedding ranks.

    A completion is the query; its row's `positive` column says what it should find, its `negatives`
    column among what. All groups of a batch are one call of a kernel. Where the dataset has no
    column of negatives, the positives of all other rows are a completion's negatives, of every
    process under accelerate, so that one group's completions are compared with the same candidates
    wherever they are; each process embeds its own.

    ms-swift's GRPO takes it too: a file for `--external_plugins` registers it by
    ``swift.rewards.orms["ranking"] = lambda args=None: RankingReward(embed_fn)``.

    Args:
        embed_fn: embeds completions: a list of n texts -> [n, D], floating. No gradient is taken.
        candidate_fn: embeds candidates; None: `embed_fn`.
        bank: [M, D] embeddings; the columns then hold its rows (`int`), and without a column of
            negatives every other row is one. None: the columns hold texts.
        reward: "ranking" (ELVA's), "ume_r1", "embed_rl", or a function with the signature of
            `elva.integrations.rewards.ranking`.
        positive: name of the column with a completion's positive, or a list of them.
        negatives: name of the column with a list of its negatives, of any length.
        text_fn: (prompt, completion) -> what `embed_fn` takes of a rollout, both as plain text;
            None: the completion alone.
        settings: the reward's own: `margin`, `rank_penalty`, `w_margin`, `w_rank` of "ranking",
            `temperature` of "embed_rl".

    Calling it returns a list of floats, with None for a row that has no positive or no negative,
    which TRL leaves out. The trainer logs the means of the reward's parts (`margin_reward`,
    `rank_reward`, `rank` of "ranking") and, with `log_completions`, each completion's.

    Raises:
        UserError: an unknown reward or setting; a dataset without the column; an embedding of
            another shape, or of NaN.

    Example::

        trainer = GRPOTrainer(
            model="Qwen/Qwen3-0.6B",
            reward_funcs=RankingReward(SentenceTransformer("all-MiniLM-L6-v2").encode, margin=0.05),
            train_dataset=dataset,  # columns prompt, positive and, where mined, negatives
        )
    """

    def __init__(
        self, embed_fn: EmbedFn, *, candidate_fn: EmbedFn | None = None, bank: Tensor | None = None,
        reward: str | Recipe = "ranking", positive: str = "positive", negatives: str = "negatives",
        text_fn: Callable[[str, str], Any] | None = None, **settings: float,
    ) -> None:  # fmt: skip
        super().__init__(embed_fn, candidate_fn=candidate_fn, bank=bank, reward=reward, **settings)
        self.positive, self.negatives, self.text_fn = positive, negatives, text_fn

    def __call__(
        self, completions: list, prompts: list | None = None, *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None, **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        """The rewards of a batch's completions, plain or conversational."""
        if self.positive not in columns:
            there = ", ".join(x for x in columns if x not in ("completion_ids", "trainer_state"))
            raise UserError(
                f"{type(self).__name__}: the dataset must have a column {self.positive!r}, got "
                f"{there or 'none but the prompt'}; name another with positive="
            )
        texts = [plain(x) for x in completions]
        if self.text_fn is not None:
            if prompts is None:  # ms-swift's: the whole chat
                prompts = [chat[:-1] for chat in columns["messages"]]
            texts = [self.text_fn(plain(p), x) for p, x in zip(prompts, texts, strict=True)]
        negatives = columns.get(self.negatives)
        in_batch = negatives is None and self.bank is None
        state = PartialState()
        together = in_batch and state.num_processes > 1
        found = self.score(
            texts, columns[self.positive], negatives,
            group=torch.distributed.group.WORLD if together else None,
            device=state.device if together else None,
        )  # fmt: skip
        for name, part in found.items():
            if log_extra is not None:
                log_extra(f"{self.__name__}/{name}", part)
            known = [x for x in part if x is not None]
            if log_metric is not None and known and name != "reward":
                log_metric(f"rewards/{self.__name__}/{name}", sum(known) / len(known))
        return found["reward"]


def plain(message: Any) -> str:
    """The text of a prompt or completion: a string, or the contents of a chat's messages."""
    if isinstance(message, str):
        return message
    contents = (turn.get("content") or "" for turn in message)
    return "\n".join(
        content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
        for content in contents
    )
