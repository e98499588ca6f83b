"""A micro-batch: the losses on its tokens, and the gradients that its embeddings were given."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from elva.model.prompt import PromptBatch
from elva.model.reading import wide
from elva.model.retriever import Retriever
from elva.model.rollout import Rollouts, token_log_probs
from elva.recipe import StageConfig
from elva.training import objective
from elva.training.rolled import Rolled


@dataclass(frozen=True)
class Given:
    """What the micro-batches of a step are computed from beside their rollouts.

    Args:
        embeddings: [R, D] d loss / d embeddings of this process's rows; None: of none.
        log_temperature: [1] d loss / d its logarithm, which one micro-batch hands on.
        target: [R, T] what each token should have been, -100 where nobody knows; None: of none.
        over: what sums are divided by.
        first: whether this is the first step on these rollouts.
    """

    embeddings: Tensor | None
    log_temperature: Tensor | None
    target: Tensor | None
    over: Mapping[str, float]
    first: bool


class TokenLosses:
    """The forward with gradient of a stage, a micro-batch at a time.

    Args:
        arithmetic: the autocast of every forward of the stage.
    """

    def __init__(
        self,
        retriever: Retriever,
        stage: StageConfig,
        arithmetic: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.retriever, self.stage, self.arithmetic = retriever, stage, arithmetic
        self.reference = _frozen_copy(retriever) if stage.holds else None

    @property
    def names(self) -> list[str]:
        """What is measured of a micro-batch in this stage."""
        stage = self.stage
        used = {"lm": stage.lm > 0, "ret": stage.ret > 0, "ret_share": stage.ret > 0,
                "policy": stage.policy > 0, "anchor": stage.anchor > 0,
                "kl": stage.policy + stage.anchor > 0}  # fmt: skip
        return [name for name, is_used in used.items() if is_used]

    def losses(
        self, prompts: PromptBatch, index: Tensor, rolled: Rolled, given: Given, once: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """A micro-batch's share of the loss, of each token loss, and its log-probabilities.

        Args:
            index: [R] rows of the rollouts.
            once: whether it is the one that hands on what is no row's.
        """
        stage, part, over = self.stage, rolled.rollouts.select(index), given.over
        found: dict[str, Tensor] = {}
        new = None
        with self.arithmetic():
            hidden, embeddings = self.retriever.read_out(prompts, part.ids, part.mask)
            total = embeddings.new_zeros(())
            if given.embeddings is not None:
                # A spare prompt has no row of it, and takes part all the same.
                of_rows = (
                    embeddings.new_zeros(()) if rolled.asked.spare else given.embeddings[index]
                )
                total = total + (embeddings * of_rows).sum()
            if once and given.log_temperature is not None:
                total = total + (self.retriever.log_temperature * given.log_temperature).sum()
            if given.target is not None:
                wanted = given.target[index, : part.ids.shape[1]]
                counted = wanted != -100
                logits = self.retriever.plain.lm_head(hidden[:, :-1][counted])
                lm = F.cross_entropy(wide(logits), wanted[counted], reduction="sum")
                found["lm"] = lm / over["tokens"]
                total = total + stage.lm * found["lm"]
            if stage.ret > 0:
                ret, share = self._ret(hidden, part)
                found["ret"], found["ret_share"] = ret / over["rows"], share / over["rows"]
                total = total + stage.ret * found["ret"]
            if stage.policy > 0 or stage.anchor > 0:
                known = rolled.advantages is not None and not rolled.asked.spare
                gains = rolled.advantages[index] if known else None
                loss, kl, new = self._policy(prompts, part, hidden, gains, given.first)
                name = "policy" if stage.policy > 0 else "anchor"
                found[name], found["kl"] = loss.sum() / over["policy"], kl.sum() / over["trained"]
                total = total + (stage.policy or stage.anchor) * found[name]
        return total, {name: value.detach() for name, value in found.items()}, new

    def _ret(self, hidden: Tensor, part: Rollouts) -> tuple[Tensor, Tensor]:
        """Sums over rows: the loss of [RET] as the end, and its share of the probability to end."""
        inputs = self.retriever.inputs
        last = hidden[torch.arange(len(hidden)), part.mask.sum(1) - 1]
        logits = wide(self.retriever.plain.lm_head(last))
        loss = objective.ret_loss(logits, part.finished, inputs.ret_id, inputs.end_ids)
        ends = logits.detach()[:, [inputs.ret_id, *inputs.end_ids]]
        return loss.sum(), ends.softmax(-1)[:, 0].sum()

    def _policy(
        self,
        prompts: PromptBatch,
        part: Rollouts,
        hidden: Tensor,
        advantages: Tensor | None,
        first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [R], KL [R], log-probabilities [R, T] without a graph); None: the KL alone."""
        stage, inputs = self.stage, self.retriever.inputs

        def log_probs(model: Retriever, states: Tensor) -> Tensor:
            logits = model.plain.lm_head(states[:, :-1])
            return token_log_probs(logits, part.ids, stage.temperature, inputs)

        new = log_probs(self.retriever, hidden)
        reference = None
        if stage.holds:
            with torch.no_grad(), self._as_reference() as model:
                states = model.hidden_states(prompts, part.ids, part.mask)
                reference = log_probs(model, states)
        old = new.detach() if first else part.log_probs
        beta = stage.beta
        if advantages is None:
            advantages, beta = new.new_zeros(len(new)), 1.0
        loss, kl = objective.policy_loss(
            new, old, reference, advantages, part.chosen, beta=beta,
            epsilon=stage.epsilon, epsilon_high=stage.epsilon_high, loss_type=stage.loss_type,
            importance_sampling_level=stage.importance_sampling_level,
        )  # fmt: skip
        return loss, kl, new.detach()

    @contextmanager
    def _as_reference(self) -> Iterator[Retriever]:
        """The model this stage started from: a frozen copy, or its adapter of then."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.retriever.reference() as began:
                yield began


def _frozen_copy(retriever: Retriever) -> Retriever | None:
    """The KL reference. Under LoRA none is needed: without the adapter the model is the one that
    began."""
    if isinstance(retriever.model, PeftModel):
        return None
    frozen = Retriever(copy.deepcopy(retriever.model).requires_grad_(False), retriever.inputs)
    frozen.features = retriever.features  # of the same tower
    return frozen
