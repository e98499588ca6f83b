"""One stage of training: roll out, score, differentiate, step.

Every stage is the same four steps, with its own weights (`StageConfig`):

1. rollout: summaries of the batch's queries and candidates -> tokens and embeddings;
2. embeddings: InfoNCE and the ranking reward, with their gradients on the [RET] embeddings;
3. tokens: advantages of the rewards (GRPO), KL to the model the stage started from, captions;
4. backward in micro-batches: the forward with gradient, to which step 2's gradients are handed as
   sum(embedding * gradient), so that memory does not grow with the number of candidates.

Sampler, reference and learner compute under one autocast. The old log-probabilities are those of
the learner's own first forward, so the first ratio is exactly 1.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

import elva_kernels
from elva.data import Item
from elva.model.inputs import Prompt, PromptBatch
from elva.model.retriever import Retriever
from elva.model.rollout import Rollouts, token_log_probs
from elva.recipe import StageConfig
from elva.run import title_of
from elva.training import objective, ranking
from elva.training.comparison import Comparison, compare
from elva.training.examples import Examples
from elva.training.guards import Guards
from elva.training.loop import Length, ResumableTrainer, autocast
from elva.training.negatives import Negatives
from elva.training.plan import Batch, plan
from elva.training.summaries import Summaries


@dataclass
class _Rolled:
    """A batch after its rollouts.

    Prompts are queries [B], then, where the stage embeds, the candidates that are rolled out.
    """

    batch: Batch
    comparison: Comparison
    prompts: list[Prompt]
    rollouts: Rollouts  # len(prompts) * G rows
    captions: Tensor | None  # [len(prompts), S], -100 padded
    bank: Tensor | None  # [K, D], the candidates that are not rolled out

    @property
    def count(self) -> int:
        return len(self.comparison.queries)


class StageTrainer(ResumableTrainer):
    """Trainer for one stage: `training_step` is the module's four steps."""

    def __init__(
        self,
        retriever: Retriever,
        stage: StageConfig,
        examples: Examples,
        length: Length,
        *,
        directory: Path,
        seed: Sequence[int | str],
        save_seconds: float,
        extra: Mapping[str, Any],
        on_step: Callable[[int, dict[str, float]], None],
        say: Callable[[str], None],
    ) -> None:
        """`say` takes what a person should know of the stage, a line each."""
        started = time.perf_counter()
        self.retriever, self.stage, self.examples = retriever, stage, examples
        self.seed, self.on_step = tuple(seed), on_step
        self.guards = Guards(title_of(directory), stage, say)
        self.arithmetic = autocast(retriever.device, extra)
        retriever.train_in_fp32()
        self.reference = _frozen_copy(retriever) if stage.holds else None
        self.remembers = retriever.remember(examples.items(), at_most=examples.pictures)
        self.summaries = Summaries(retriever, stage, self.seed, self.arithmetic)
        self.negatives = Negatives(stage, examples, self.seed, self.summaries.embed)
        neighbours = None
        if stage.hard_batches:
            self.negatives.mine()
            neighbours = self.negatives.neighbours()
        self._last: _Rolled | None = None
        steps = -(-length.steps // stage.num_iterations)
        super().__init__(
            retriever.model,
            stage,
            [
                batch
                for batch in plan(stage, examples, steps, self.seed, neighbours)
                for _ in range(stage.num_iterations)
            ],
            length,
            started=started,
            directory=directory,
            save_seconds=save_seconds,
            extra=extra,
        )

    def further_state(self) -> dict[str, dict[str, Tensor]]:
        state = self.negatives.state()
        return {"mined": state} if state else {}

    def further_facts(self) -> dict[str, Any]:
        return {"guards": self.guards.state()}

    def restore_further(
        self, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
    ) -> None:
        self.negatives.restore(tensors.get("mined", {}), self.retriever.device)
        self.guards.restore(facts["guards"])

    # -- the four steps ----------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        self.clear_temperature()
        batch: Batch = inputs["batch"]
        first = self._last is None or self._last.batch.step != batch.step
        if first:
            self.negatives.prepare(batch.step)
            self._last = self._roll(batch)
        elif self.stage.embeds:
            self._last.rollouts.embeddings = self.summaries.embeddings(
                self._last.prompts, self._last.rollouts
            )
        gradient, advantages, metrics = self._score(self._last)
        metrics.update(self._backward(self._last, gradient, advantages, first))
        stage = self.stage
        weights = {
            "lm": stage.lm, "ret": stage.ret, "infonce": stage.infonce, "policy": stage.policy,
            "kl": stage.anchor,
        }  # fmt: skip
        metrics["loss"] = sum(w * metrics[name] for name, w in weights.items() if name in metrics)
        metrics["loss"] -= stage.pathwise * metrics.get("reward", 0.0)
        self.on_step(self.state.global_step + 1, metrics)
        self.guards.watch(self.state.global_step + 1, metrics)
        return torch.tensor(metrics["loss"], device=self.args.device)

    def _roll(self, batch: Batch) -> _Rolled:
        stage, examples = self.stage, self.examples
        own, sources = self.negatives.of(batch)
        found = compare(stage, examples, batch, own, sources, self.seed)
        answers = [examples.candidates[found.candidates[places[0]]] for places in found.target]
        items: list[Item] = [*found.queries]
        shown = [*answers]
        bank = None
        if stage.embeds:
            rolled = [examples.candidates[row] for row in found.candidates[: found.rolled].tolist()]
            items += rolled
            shown += rolled
            if found.rolled < len(found.candidates):
                assert self.negatives.bank is not None
                rows = torch.from_numpy(found.candidates[found.rolled :])
                bank = self.negatives.bank[rows.to(self.negatives.bank.device)]
        if not self.remembers and not self.retriever.train_vision:
            self.retriever.forget()  # a step's own pictures once, for all its forwards
            self.retriever.remember(items)
        prompts = [self.retriever.inputs.prompt(i) for i in items]
        gold = None
        if examples.captions is not None:
            gold = self.summaries.caption_ids(examples.captions.of(shown))
        rollouts = self.summaries.write(batch.step, prompts, gold)
        return _Rolled(batch, found, prompts, rollouts, gold, bank)

    def _score(self, rolled: _Rolled) -> tuple[Tensor | None, Tensor | None, dict[str, float]]:
        """Step 2: d loss / d embeddings [R, D], advantages [R] and what to log."""
        stage = self.stage
        metrics = _summary_metrics(rolled.rollouts)
        if not stage.embeds:
            return None, None, metrics
        leaf = rolled.rollouts.embeddings.detach().requires_grad_()
        embedded = _embedded(rolled, leaf)
        loss = leaf.new_zeros(())
        advantages = None
        if stage.infonce > 0:
            t = stage.temperature if self.log_temperature is None else self.log_temperature.exp()
            nce, found = ranking.info_nce(stage, rolled.comparison, embedded, t)
            metrics.update(found)
            loss = loss + stage.infonce * nce
            if self.log_temperature is not None:
                metrics["temperature"] = self.log_temperature.exp().item()
        if stage.ranks:
            reward, found = ranking.reward(stage, rolled.comparison, embedded)
            metrics.update(found)
            group = elva_kernels.group_advantages(reward.detach(), scale=stage.scale_rewards)
            advantages = self._per_row(group, rolled)  # of [B, G]
            if stage.pathwise > 0:
                loss = loss - stage.pathwise * reward.mean()
        if loss.requires_grad:
            loss.backward()
        return leaf.grad, advantages, metrics

    def _per_row(self, group: Tensor, rolled: _Rolled) -> Tensor:
        """[B, G] -> [R]: every sequence shares the advantages of the actions that it is part of."""
        found, count = rolled.comparison, rolled.count
        own = found.negatives[:, : self.stage.negatives.count]
        shared = group.new_zeros(len(rolled.prompts), group.shape[1])
        shared[:count] = group
        for b in range(count):
            members = {*found.target[b].tolist(), *own[b].tolist()}
            rows = [count + place for place in members if 0 <= place < found.rolled]
            shared[rows] += group[b]
        return shared.flatten()

    def _backward(
        self, rolled: _Rolled, gradient: Tensor | None, advantages: Tensor | None, first: bool
    ) -> dict[str, float]:
        """Steps 3 and 4; returns the token losses, each as a mean."""
        stage, rollouts = self.stage, rolled.rollouts
        groups = len(rollouts.ids) // len(rolled.prompts)
        target = None
        if stage.lm > 0:
            assert rolled.captions is not None
            captions = rolled.captions.repeat_interleave(groups, 0)
            target = objective.caption_targets(rollouts.ids, captions)
        tokens = None if target is None else (target != -100).sum().clamp(min=1)
        trained = rollouts.finished.sum().clamp(min=1)
        parts: defaultdict[str, float] = defaultdict(float)
        for rows, prompts in self.summaries.micro_batches(rolled.prompts, rollouts.mask):
            index = torch.tensor(rows, device=self.retriever.device)
            part = rollouts.select(index)
            with self.arithmetic():
                hidden = self.retriever.hidden_states(prompts, part.ids, part.mask)
                total = hidden.new_zeros((), dtype=torch.float32)
                if gradient is not None:
                    at_ret = hidden[torch.arange(len(rows)), part.mask.sum(1)].float()
                    total = total + (at_ret * gradient[index]).sum()
                if target is not None and tokens is not None:
                    wanted = target[index, : part.ids.shape[1]]
                    counted = wanted != -100
                    logits = self.retriever.plain.lm_head(hidden[:, :-1][counted])
                    lm = F.cross_entropy(logits.float(), wanted[counted], reduction="sum") / tokens
                    parts["lm"] += lm.item()
                    total = total + stage.lm * lm
                if stage.ret > 0:
                    ret, share = self._ret(hidden, part)
                    parts["ret"] += ret.item() / len(rollouts.ids)
                    parts["ret_share"] += share / len(rollouts.ids)
                    total = total + stage.ret * ret / len(rollouts.ids)
                if stage.policy > 0 or stage.anchor > 0:
                    gains = None if stage.policy == 0 else advantages[index]
                    policy, kl, new = self._policy(prompts, part, hidden, gains, first)
                    policy, kl = (x[part.finished].sum() / trained for x in (policy, kl))
                    parts["kl"] += kl.item()
                    total = total + stage.policy * policy + stage.anchor * kl
                    if stage.policy > 0:
                        parts["policy"] += policy.item()
                    if first:
                        rollouts.log_probs[index, : new.shape[1]] = new
            self.accelerator.backward(total)
        return dict(parts)

    def _ret(self, hidden: Tensor, part: Rollouts) -> tuple[Tensor, float]:
        """Sums over rows: the loss of [RET] as the end, and its share of the probability to end."""
        inputs = self.retriever.inputs
        last = hidden[torch.arange(len(hidden)), part.mask.sum(1) - 1]
        logits = self.retriever.plain.lm_head(last).float()
        loss = objective.ret_loss(logits, part.finished, inputs.ret_id, inputs.end_ids)
        ends = logits.detach()[:, [inputs.ret_id, *inputs.end_ids]]
        return loss.sum(), ends.softmax(-1)[:, 0].sum().item()

    def _policy(
        self,
        prompts: PromptBatch,
        part: Rollouts,
        hidden: Tensor,
        advantages: Tensor | None,
        first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [R], KL [R], log-probabilities [R, T] without a graph); None: no advantages."""
        stage, inputs = self.stage, self.retriever.inputs

        def log_probs(model: Retriever, states: Tensor) -> Tensor:
            logits = model.plain.lm_head(states[:, :-1])
            return token_log_probs(logits, part.ids, stage.sampling_temperature, inputs)

        new = log_probs(self.retriever, hidden)
        reference = new.detach()
        if self.stage.holds:
            with torch.no_grad(), self._as_reference() as model:
                states = model.hidden_states(prompts, part.ids, part.mask)
                reference = log_probs(model, states)
        old = new.detach() if first else part.log_probs
        if advantages is None:
            advantages = new.new_zeros(len(new))
        loss, kl = objective.policy_loss(
            new, old, reference, advantages, part.mask,
            clip_epsilon=stage.clip_epsilon, beta=stage.beta,
        )  # fmt: skip
        return loss, kl, new.detach()

    @contextmanager
    def _as_reference(self) -> Iterator[Retriever]:
        """The model this stage started from: a frozen copy, or the weights under a fresh
        adapter."""
        if self.reference is not None:
            yield self.reference
        else:
            assert isinstance(self.retriever.model, PeftModel)
            with self.retriever.model.disable_adapter():
                yield self.retriever


def _embedded(rolled: _Rolled, leaf: Tensor) -> ranking.Embedded:
    """Where the step's embeddings stand: its rollouts, then rows of the bank."""
    b, found = rolled.count, rolled.comparison
    groups = len(leaf) // len(rolled.prompts)
    rows = leaf[b * groups :]
    table = rows if rolled.bank is None else torch.cat([rows, rolled.bank.to(rows.dtype)])
    columns = torch.arange(found.rolled * groups, device=leaf.device).view(-1, groups)
    kept = torch.arange(len(rows), len(table), device=leaf.device)[:, None].expand(-1, groups)
    return ranking.Embedded(leaf[: b * groups].unflatten(0, (b, groups)), table,
                            torch.cat([columns, kept]))  # fmt: skip


def _frozen_copy(retriever: Retriever) -> Retriever | None:
    """The KL reference. Under LoRA none is needed: without the adapter the model is the one that
    began."""
    if isinstance(retriever.model, PeftModel):
        return None
    frozen = Retriever(copy.deepcopy(retriever.model).requires_grad_(False), retriever.inputs)
    frozen._features = retriever._features  # of the same tower
    return frozen


def _summary_metrics(rollouts: Rollouts) -> dict[str, float]:
    return {
        "completion_length": rollouts.mask.sum(1).float().mean().item(),
        "frac_no_ret": 1.0 - rollouts.finished.float().mean().item(),
    }
