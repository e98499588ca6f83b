"""One stage of training: roll out, score, differentiate.

Every stage is the same four steps, with its own weights (`StageConfig`):

1. rollout: summaries of the batch's queries and candidates -> tokens and embeddings;
2. embeddings: InfoNCE and the ranking reward, with their gradients on the [RET] embeddings;
3. tokens: advantages of the rewards (GRPO), KL to the model the stage started from, captions;
4. backward in micro-batches: the forward with gradient, to which step 2's gradients are handed as
   sum(embedding * gradient), so that memory does not grow with the number of candidates.

Of several processes each rolls out its share of the step's queries and candidates. Embeddings are
gathered without their graphs, each process computes the step's rewards from all of them and keeps
its own rows' gradients: nothing is differentiated through an exchange. A process's loss is its
share of the step's times their number, of which wrappers take the mean.

Sampler, reference and learner compute under one autocast. The old log-probabilities are those of
the learner's own first forward, so the first ratio is exactly 1.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from elva.data import Item
from elva.model.inputs import Prompt, PromptBatch
from elva.model.retriever import Retriever, whole_weights
from elva.model.rollout import Rollouts, token_log_probs, wide
from elva.processes import Processes
from elva.recipe import StageConfig
from elva.training import objective, ranking
from elva.training.comparison import Comparison, compare
from elva.training.examples import Examples
from elva.training.guards import Guards
from elva.training.negatives import Negatives
from elva.training.optimizer import autocast, checkpoint_gradients
from elva.training.plan import Batch, plan
from elva.training.states import whole
from elva.training.summaries import Summaries

LEAST_TEMPERATURE = 0.01
"""Of one that is learnt: what CLIP allows (arXiv:2103.00020, sec. 2.5)."""


@dataclass
class _Rolled:
    """A batch after its rollouts.

    Prompts are this process's queries, then, where the stage embeds, its candidates of those that
    are rolled out.
    """

    batch: Batch
    comparison: Comparison
    asks: range  # of the step's queries
    shows: range  # of its candidates
    prompts: list[Prompt]
    rollouts: Rollouts  # len(prompts) * G rows
    captions: Tensor | None  # [len(prompts), S], -100 padded
    bank: Tensor | None  # [K, D], the candidates that are not rolled out
    spare: bool = False  # a prompt that is nobody's, where there are fewer than processes
    advantages: Tensor | None = None  # [len(prompts) * G], those of the first pass

    @property
    def count(self) -> int:
        """The step's queries."""
        return len(self.comparison.queries)

    @property
    def shown(self) -> int:
        """The step's candidates that are rolled out, where it embeds them."""
        return self.comparison.rolled


@dataclass(frozen=True)
class _Gradients:
    """What the losses on embeddings hand to the backward."""

    embeddings: Tensor | None = None  # [R, D], this process's rows
    log_temperature: Tensor | None = None  # [1]


class Stage:
    """A stage's data, plan and losses: what the loop repeats (`loop.Work`)."""

    def __init__(
        self,
        retriever: Retriever,
        stage: StageConfig,
        examples: Examples,
        steps: int,
        *,
        seed: Sequence[int | str],
        arguments: Mapping[str, Any],
        title: str,
        processes: Processes,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            steps: of the optimiser, at most.
            arguments: the recipe's `trainer`.
            say: takes what a person should know of the stage, a line each.
        """
        self.retriever, self.stage, self.examples = retriever, stage, examples
        self.seed, self.processes = tuple(seed), processes
        self.guards = Guards(title, stage, say)
        self.arithmetic = autocast(retriever.device, arguments)
        # A step without a picture, a head that no loss reads, micro-batches but one of a step.
        heads = stage.lm + stage.ret + stage.policy + stage.anchor > 0
        self.leaves_unused = stage.train_vision or stage.learn_infonce_temperature or not heads
        checkpoint_gradients(retriever.plain, arguments)
        retriever.train_in_fp32()
        self.reference = _frozen_copy(retriever) if stage.holds else None
        if stage.learn_infonce_temperature:
            start = torch.tensor(
                [math.log(stage.infonce_temperature)],
                dtype=retriever.embedding_dtype, device=retriever.device,
            )  # fmt: skip
            retriever.log_temperature = nn.Parameter(start)
        self.summaries = Summaries(retriever, stage, self.seed, self.arithmetic, processes)
        self.negatives = Negatives(stage, examples, self.seed, self.summaries.embed)
        neighbours = None
        if stage.hard_batches:
            self.negatives.mine()
            neighbours = self.negatives.neighbours()
        self.plan = plan(stage, examples, -(-steps // stage.num_iterations), self.seed, neighbours)
        self._last: _Rolled | None = None

    # -- what the loop asks ------------------------------------------------------------------------

    def step(self, number: int, accelerator: Accelerator, model: nn.Module) -> dict[str, float]:
        """The module's four steps; gradients are left in the parameters.

        Args:
            model: the retriever, wrapped for the processes.
        """
        batch = self.plan[number // self.stage.num_iterations]
        first = self._last is None or self._last.batch.step != batch.step
        with torch.no_grad(), whole_weights(self.retriever):
            if first:
                self._last = self.retriever(self._roll, batch)
            elif self.stage.embeds:
                assert self._last is not None
                self._last.rollouts.embeddings = self.retriever(
                    self.summaries.embeddings, self._last.prompts, self._last.rollouts
                )
        assert self._last is not None
        gradients, metrics = self._score(self._last, first)
        metrics.update(self._backward(self._last, gradients, first, accelerator, model))
        stage = self.stage
        weights = {
            "lm": stage.lm, "ret": stage.ret, "infonce": stage.infonce, "policy": stage.policy,
            "anchor": stage.anchor,
        }  # fmt: skip
        metrics["loss"] = sum(w * metrics[name] for name, w in weights.items() if name in metrics)
        metrics["loss"] -= stage.pathwise * metrics.get("reward", 0.0)
        return metrics

    def stepped(self, number: int, metrics: Mapping[str, float]) -> None:
        """Bound the temperature, and look at what was measured."""
        if self.stage.learn_infonce_temperature:
            with torch.no_grad():
                self.retriever.log_temperature.clamp_(min=math.log(LEAST_TEMPERATURE))
        self.guards.watch(number, metrics)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What was mined, and what the guards have seen."""
        mined = self.negatives.state()
        return {"mined": mined} if mined else {}, {"guards": self.guards.state()}

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.negatives.restore(groups.get("mined", {}), self.retriever.device)
        self.guards.restore(facts["guards"])

    # -- the four steps ----------------------------------------------------------------------------

    def _roll(self, batch: Batch) -> _Rolled:
        stage, examples, share = self.stage, self.examples, self.processes.share
        self.negatives.prepare(batch.step)
        own, sources = self.negatives.of(batch)
        found = compare(stage, examples, batch, own, sources, self.seed)
        asks = share(len(found.queries))
        shows = share(found.rolled) if stage.embeds else range(0)
        items: list[Item] = [found.queries[i] for i in asks]
        answers = [examples.candidates[int(found.candidates[t[0]])] for t in found.target]
        shown = [answers[i] for i in asks]
        bank = None
        if stage.embeds:
            rolled = [examples.candidates[int(found.candidates[i])] for i in shows]
            items += rolled
            shown += rolled
            if found.rolled < len(found.candidates):
                assert self.negatives.bank is not None
                rows = torch.from_numpy(found.candidates[found.rolled :])
                bank = self.negatives.bank[rows.to(self.negatives.bank.device)]
        asked = len(found.queries)
        places = [*asks, *(asked + i for i in shows)]  # of the step's prompts
        everyone = asked + (found.rolled if stage.embeds else 0)
        spare = not items  # it takes part in every exchange all the same
        if spare:
            items, shown, places = [found.queries[0]], [answers[0]], [0]
        prompts = [self.retriever.inputs.prompt(i) for i in items]
        self.retriever.hold(prompts)
        gold = None
        if examples.captions is not None:
            gold = self.summaries.caption_ids(examples.captions.of(shown))
        rollouts = self.summaries.write(batch.step, prompts, places, everyone, gold)
        return _Rolled(batch, found, asks, shows, prompts, rollouts, gold, bank, spare)

    def _score(self, rolled: _Rolled, first: bool) -> tuple[_Gradients, dict[str, float]]:
        """Step 2: d loss / d embeddings and what to log; advantages are kept in `rolled`."""
        stage = self.stage
        metrics = self._summary_metrics(rolled)
        if not stage.embeds:
            return _Gradients(), metrics
        leaf, rows = self._gathered(rolled)
        embedded = _embedded(rolled, leaf)
        loss = leaf.new_zeros(())
        log_temperature = None
        if stage.infonce > 0:
            temperature: float | Tensor = stage.infonce_temperature
            if stage.learn_infonce_temperature:
                log_temperature = whole(self.retriever.log_temperature.detach()).clone()
                log_temperature.requires_grad_()
                temperature = log_temperature.exp()
                metrics["infonce_temperature"] = temperature.item()
            shares = ranking.Shares(self.processes, rolled.asks, rolled.shows)
            nce, found = ranking.info_nce(stage, rolled.comparison, embedded, temperature, shares)
            metrics.update(found)
            loss = loss + stage.infonce * nce
        if stage.ranks:
            reward, found = ranking.reward(stage, rolled.comparison, embedded)
            metrics.update(found)
            if first and stage.policy > 0:
                group = objective.advantages(reward, stage.scale_rewards)  # [B, G]
                rolled.advantages = self._per_row(group, rolled)[rows]
            if stage.pathwise > 0:
                loss = loss - stage.pathwise * self.processes.count * reward.mean()
        if loss.requires_grad:
            loss.backward()
        of_rows = None if leaf.grad is None else leaf.grad[rows]
        of_temperature = None if log_temperature is None else log_temperature.grad
        return _Gradients(of_rows, of_temperature), metrics

    def _gathered(self, rolled: _Rolled) -> tuple[Tensor, Tensor]:
        """All processes' embeddings [R, D], a leaf: queries, then candidates; this one's rows."""
        own, groups = rolled.rollouts.embeddings, self.stage.num_generations
        first, second = rolled.asks, rolled.shows
        own = own[: (len(first) + len(second)) * groups]
        asked, shown = own.unflatten(0, (-1, groups)).split([len(first), len(second)])
        gather = self.processes.gather
        parts = [gather(asked, rolled.count), gather(shown, rolled.shown)]
        places = [*first, *(rolled.count + i for i in second)]
        rows = torch.tensor(places, device=own.device, dtype=torch.long)[:, None] * groups
        rows = (rows + torch.arange(groups, device=own.device)).flatten()
        return torch.cat(parts).flatten(0, 1).detach().requires_grad_(), rows

    def _per_row(self, group: Tensor, rolled: _Rolled) -> Tensor:
        """[B, G] -> [R]: every sequence shares the advantages of the actions that it is part of."""
        found, count = rolled.comparison, rolled.count
        own = found.negatives[:, : self.stage.negatives.count]
        shared = group.new_zeros(count + rolled.shown, group.shape[1])
        shared[:count] = group
        for b in range(count):
            members = {*found.target[b].tolist(), *own[b].tolist()}
            rows = [count + place for place in members if 0 <= place < found.rolled]
            shared[rows] += group[b]
        return shared.flatten()

    def _backward(
        self, rolled: _Rolled, gradients: _Gradients, first: bool, accelerator: Accelerator,
        model: nn.Module,
    ) -> dict[str, float]:  # fmt: skip
        """Steps 3 and 4; returns the token losses, each as a mean."""
        stage, rollouts = self.stage, rolled.rollouts
        groups = stage.num_generations
        target = None
        if stage.lm > 0:
            assert rolled.captions is not None
            captions = rolled.captions.repeat_interleave(groups, 0)
            target = objective.caption_targets(rollouts.ids, captions)
        real = not rolled.spare
        trained = rollouts.mask & rollouts.finished[:, None]
        policy = objective.normaliser(stage.loss_type, trained, stage.max_completion_length)
        counts = self.processes.total({
            "rows": real * len(rollouts.ids),
            "tokens": 0 if target is None else real * int((target != -100).sum()),
            "policy": real * int(policy),
            "trained": real * int(trained.sum()),
        })  # fmt: skip
        over = {name: max(1.0, count) / self.processes.count for name, count in counts.items()}
        parts = dict.fromkeys(self._token_losses(), 0.0)
        batches = [*self.summaries.micro_batches(rolled.prompts, rollouts.mask)]
        turns = self.processes.most(len(batches))  # as many for each: forwards may exchange weights
        for turn in range(turns):
            idle = rolled.spare or turn >= len(batches)  # takes part, and adds nothing
            rows, prompts = batches[turn % len(batches)]
            index = torch.tensor(rows, device=self.retriever.device)
            last = turn == turns - 1
            with nullcontext() if last else accelerator.no_sync(model):
                of_temperature = gradients.log_temperature if turn == 0 else None
                total, found, new = model(
                    self._losses, prompts, index, rolled, gradients.embeddings, of_temperature,
                    target, over, first,
                )  # fmt: skip
                if idle:
                    total = total * 0.0
                else:
                    for name, value in found.items():
                        parts[name] += value.item()
                    if new is not None and first:
                        rollouts.log_probs[index, : new.shape[1]] = new
                accelerator.backward(total)
        return {n: v / self.processes.count for n, v in self.processes.total(parts).items()}

    def _token_losses(self) -> list[str]:
        """What `_losses` measures in this stage."""
        stage = self.stage
        used = {"lm": stage.lm > 0, "ret": stage.ret > 0, "ret_share": stage.ret > 0,
                "policy": stage.policy > 0, "anchor": stage.anchor > 0,
                "kl": stage.policy + stage.anchor > 0}  # fmt: skip
        return [name for name, is_used in used.items() if is_used]

    def _losses(
        self, prompts: PromptBatch, index: Tensor, rolled: _Rolled, gradient: Tensor | None,
        of_temperature: Tensor | None, target: Tensor | None, over: Mapping[str, float],
        first: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:  # fmt: skip
        """A micro-batch's share of the loss, of each token loss, and its log-probabilities.

        Args:
            index: [R] rows of the rollouts.
            gradient: d loss / d embeddings, of every row.
            of_temperature: [1] d loss / d its logarithm, for one micro-batch of a step.
            over: what sums are divided by.
        """
        stage, part = self.stage, rolled.rollouts.select(index)
        found: dict[str, Tensor] = {}
        new = None
        with self.arithmetic():
            hidden = self.retriever.hidden_states(prompts, part.ids, part.mask)
            total = wide(hidden).new_zeros(())
            if gradient is not None:
                at_ret = wide(hidden[torch.arange(len(index)), part.mask.sum(1)])
                # A spare prompt has no row of it, and takes part all the same.
                of_rows = gradient.new_zeros(()) if rolled.spare else gradient[index]
                total = total + (at_ret * of_rows).sum()
            if of_temperature is not None:
                total = total + (self.retriever.log_temperature * of_temperature).sum()
            if target is not None:
                wanted = target[index, : part.ids.shape[1]]
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
                known = rolled.advantages is not None and not rolled.spare
                gains = rolled.advantages[index] if known else None
                loss, kl, new = self._policy(prompts, part, hidden, gains, first)
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
            new, old, reference, advantages, part.mask & part.finished[:, None], beta=beta,
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

    def _summary_metrics(self, rolled: _Rolled) -> dict[str, float]:
        rollouts, real = rolled.rollouts, not rolled.spare
        sums = self.processes.total({
            "rows": real * len(rollouts.ids),
            "length": real * int(rollouts.mask.sum()),
            "finished": real * int(rollouts.finished.sum()),
        })  # fmt: skip
        return {
            "completion_length": sums["length"] / sums["rows"],
            "frac_no_ret": 1.0 - sums["finished"] / sums["rows"],
        }


def _embedded(rolled: _Rolled, leaf: Tensor) -> ranking.Embedded:
    """Where the step's embeddings stand: its rollouts, then rows of the bank."""
    b, found = rolled.count, rolled.comparison
    groups = len(leaf) // (b + rolled.shown)
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
    frozen.features = retriever.features  # of the same tower
    return frozen
