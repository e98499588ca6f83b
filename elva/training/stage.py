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

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from elva.errors import UserError
from elva.model.retriever import Retriever
from elva.processes import Processes, brought_together
from elva.recipe import StageConfig
from elva.training import objective, ranking
from elva.training.examples import Examples
from elva.training.guards import Guards
from elva.training.negatives import Negatives
from elva.training.optimizer import autocast, checkpoint_gradients
from elva.training.plan import Batch, plan
from elva.training.prompts import Prompts
from elva.training.relevance import Relevance
from elva.training.rolled import Rolled
from elva.training.states import bound_weight, whole
from elva.training.summaries import Summaries
from elva.training.tokens import Given, TokenLosses

LEAST_TEMPERATURE = 0.01
"""Of one that is learnt: what CLIP allows (arXiv:2103.00020, sec. 2.5)."""


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
        order_seed: Sequence[int | str] | None = None,
    ) -> None:
        """
        Args:
            steps: of the optimiser, at most.
            seed: of the summaries.
            arguments: the recipe's `trainer`.
            say: takes what a person should know of the stage, a line each.
            order_seed: of the data's order and the negatives; None: `seed`.
        """
        if stage.max_completion_length and not retriever.writes:
            raise UserError(
                f"train: {title}: max_completion_length must be 0 for {retriever.name}, which has "
                f"no head to write a summary with, got {stage.max_completion_length}"
            )
        self.retriever, self.stage, self.examples = retriever, stage, examples
        self.processes = processes
        order_seed = tuple(seed if order_seed is None else order_seed)
        self.guards = Guards(title, stage, say)
        self.arithmetic = autocast(retriever.device, arguments)
        # A step without a picture, a head that no loss reads, micro-batches but one of a step.
        heads = stage.lm + stage.ret + stage.policy + stage.anchor > 0
        self.leaves_unused = stage.train_vision or stage.learn_infonce_temperature or not heads
        checkpoint_gradients(retriever.plain, arguments)
        retriever.train_in_fp32()
        self.tokens = TokenLosses(retriever, stage, self.arithmetic)
        if stage.learn_infonce_temperature:
            start = torch.tensor(
                [math.log(stage.infonce_temperature)],
                dtype=retriever.embedding_dtype, device=retriever.device,
            )  # fmt: skip
            retriever.log_temperature = nn.Parameter(start)
        self.summaries = Summaries(retriever, stage, seed, self.arithmetic, processes)
        self.negatives = Negatives(stage, examples, order_seed, self.summaries.embed, processes)
        self.relevance = Relevance.of(stage, examples, self.summaries.embed)
        neighbours = None
        if stage.hard_batches:
            self.negatives.mine()
            neighbours = self.negatives.neighbours()
        self.plan = plan(stage, examples, -(-steps // stage.num_iterations), order_seed, neighbours)
        self.prompts = Prompts(
            stage, examples, self.negatives, retriever.inputs, processes, order_seed
        )
        self.last: Rolled | None = None  # the step at hand

    # -- what the loop asks ------------------------------------------------------------------------

    def step(self, number: int, accelerator: Accelerator, model: nn.Module) -> dict[str, float]:
        """The module's four steps; gradients are left in the parameters.

        Args:
            model: the retriever, wrapped for the processes.
        """
        batch = self.plan[number // self.stage.num_iterations]
        first = self.last is None or self.last.batch.step != batch.step
        with torch.no_grad(), brought_together(self.retriever):
            if first:
                self.last = self.retriever(self._roll, batch)
            elif self.stage.embeds:
                assert self.last is not None
                self.last.rollouts.embeddings = self.retriever(
                    self.summaries.embeddings, self.last.asked.prompts, self.last.rollouts
                )
        assert self.last is not None
        gradients, metrics = self._score(self.last, first)
        metrics.update(self._backward(self.last, gradients, first, accelerator, model))
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
            bound_weight(self.retriever, "log_temperature", math.log(LEAST_TEMPERATURE))
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

    def _roll(self, batch: Batch) -> Rolled:
        self.negatives.prepare(batch.step)
        asked = self.prompts.of(batch)
        found, bank = asked.comparison, None
        if self.stage.embeds and found.rolled < len(found.candidates):
            assert self.negatives.bank is not None
            rows = torch.from_numpy(found.candidates[found.rolled :])
            bank = self.negatives.bank[rows.to(self.negatives.bank.device)]
        following = self.plan[batch.step + 1 : batch.step + 2]
        self.retriever.hold(asked.prompts, [p for b in following for p in self.prompts.ahead(b)])
        gold = None
        if self.examples.captions is not None:
            gold = self.summaries.caption_ids(self.examples.captions.of(asked.captioned))
        rollouts = self.summaries.write(
            batch.step, asked.prompts, asked.places, asked.everyone, gold
        )
        return Rolled(batch, asked, rollouts, gold, bank)

    def _score(self, rolled: Rolled, first: bool) -> tuple[_Gradients, dict[str, float]]:
        """Step 2: d loss / d embeddings and what to log; advantages are kept in `rolled`."""
        stage = self.stage.cooled(rolled.batch.step / max(1, len(self.plan) - 1))
        metrics = self._summary_metrics(rolled)
        if not stage.embeds:
            return _Gradients(), metrics
        leaf, rows = self._gathered(rolled), rolled.own_rows(stage.num_generations)
        embedded = rolled.embedded(leaf)
        loss = leaf.new_zeros(())
        log_temperature = None
        if stage.infonce > 0:
            temperature: float | Tensor = stage.infonce_temperature
            if stage.learn_infonce_temperature:
                log_temperature = whole(self.retriever.log_temperature.detach()).clone()
                log_temperature.requires_grad_()
                temperature = log_temperature.exp()
                metrics["infonce_temperature"] = temperature.item()
            shares = ranking.Shares(self.processes, rolled.asked.asks, rolled.asked.shows)
            nce, found = ranking.info_nce(
                stage, rolled.asked.comparison, embedded, temperature, shares
            )
            metrics.update(found)
            loss = loss + stage.infonce * nce
        if stage.ranks:
            rewards, found = ranking.reward(
                stage, rolled.asked.comparison, embedded, self.relevance
            )
            metrics.update(found)
            if first and stage.policy > 0:
                asked, shown = (objective.advantages(r, stage.scale_rewards) for r in rewards)
                rolled.advantages = rolled.per_row(asked, shown, stage.negatives.count)[rows]
            if stage.pathwise > 0:
                loss = loss - stage.pathwise * self.processes.count * rewards.query.mean()
        if loss.requires_grad:
            loss.backward()
        of_rows = None if leaf.grad is None else leaf.grad[rows]
        of_temperature = None if log_temperature is None else log_temperature.grad
        return _Gradients(of_rows, of_temperature), metrics

    def _gathered(self, rolled: Rolled) -> Tensor:
        """All processes' embeddings [R, D], a leaf: queries, then candidates."""
        own, groups = rolled.rollouts.embeddings, self.stage.num_generations
        first, second = len(rolled.asked.asks), len(rolled.asked.shows)
        own = own[: (first + second) * groups]
        asked, shown = own.unflatten(0, (-1, groups)).split([first, second])
        gather = self.processes.gather
        parts = [gather(asked, rolled.count), gather(shown, rolled.shown)]
        return torch.cat(parts).flatten(0, 1).detach().requires_grad_()

    def _backward(
        self, rolled: Rolled, gradients: _Gradients, first: bool, accelerator: Accelerator,
        model: nn.Module,
    ) -> dict[str, float]:  # fmt: skip
        """Steps 3 and 4; returns the token losses, each as a mean."""
        rollouts = rolled.rollouts
        target = None
        if self.stage.lm > 0:
            assert rolled.captions is not None
            captions = rolled.captions.repeat_interleave(self.stage.num_generations, 0)
            target = objective.caption_targets(rollouts.ids, captions)
        given = Given(
            gradients.embeddings, gradients.log_temperature, target,
            self._over(rolled, target), first,
        )  # fmt: skip
        parts = dict.fromkeys(self.tokens.names, 0.0)
        batches = [*self.summaries.micro_batches(rolled.asked.prompts, rollouts.mask)]
        turns = self.processes.most(len(batches))  # as many for each: forwards may exchange weights
        for turn in range(turns):
            idle = rolled.asked.spare or turn >= len(batches)  # takes part, and adds nothing
            rows, prompts = batches[turn % len(batches)]
            index = torch.tensor(rows, device=self.retriever.device)
            last = turn == turns - 1
            accelerator.sync_gradients = last  # by which DeepSpeed knows when to step
            with nullcontext() if last else accelerator.no_sync(model):
                total, found, new = model(
                    self.tokens.losses, prompts, index, rolled, given, turn == 0
                )
                if idle:
                    total = total * 0.0
                else:
                    for name, value in found.items():
                        parts[name] += value.item()
                    if new is not None and first:
                        rollouts.log_probs[index, : new.shape[1]] = new
                accelerator.backward(total)
        return {n: v / self.processes.count for n, v in self.processes.total(parts).items()}

    def _over(self, rolled: Rolled, target: Tensor | None) -> dict[str, float]:
        """What this process's sums are divided by: the step's counts over the processes' number."""
        rollouts, real = rolled.rollouts, not rolled.asked.spare
        trained = rollouts.chosen
        policy = objective.normaliser(
            self.stage.loss_type, trained, self.stage.max_completion_length
        )
        counts = self.processes.total({
            "rows": real * len(rollouts.ids),
            "tokens": 0 if target is None else real * int((target != -100).sum()),
            "policy": real * int(policy),
            "trained": real * int(trained.sum()),
        })  # fmt: skip
        return {name: max(1.0, count) / self.processes.count for name, count in counts.items()}

    def _summary_metrics(self, rolled: Rolled) -> dict[str, float]:
        rollouts, real = rolled.rollouts, not rolled.asked.spare
        sums = self.processes.total({
            "rows": real * len(rollouts.ids),
            "length": real * int(rollouts.mask.sum()),
            "finished": real * int(rollouts.finished.sum()),
        })  # fmt: skip
        found = {"completion_length": sums["length"] / sums["rows"]}
        if self.stage.max_completion_length:  # else nothing is written that could end
            found["frac_no_ret"] = 1.0 - sums["finished"] / sums["rows"]
        return found
