"""One stage of training: roll out, score, differentiate, step.

Every stage is the same four steps, with its own weights (`StageConfig`):

1. rollout: summaries of the batch's queries and candidates -> tokens, log-probs, embeddings;
2. embeddings: InfoNCE and the ranking reward, with their gradients on the [RET] embeddings;
3. tokens: advantages of the rewards (GRPO), KL to the model the stage started from, captions;
4. backward in micro-batches: the forward with gradient, to which step 2's gradients are handed as
   sum(embedding * gradient), so that memory does not grow with the number of candidates.
"""

from __future__ import annotations

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
from elva.model.rollout import Rollouts, batches_by_length, sample, token_log_probs, uniforms
from elva.recipe import StageConfig
from elva.training import objective
from elva.training.examples import Batch, Examples, plan
from elva.training.loop import Length, ResumableTrainer
from elva.training.negatives import Negatives


@dataclass
class _Rolled:
    """A batch after its rollouts.

    Prompts are queries [B], then positives [B] where the stage embeds, then negatives [B * N] where
    they are rolled out.
    """

    batch: Batch
    prompts: list[Prompt]
    rollouts: Rollouts  # len(prompts) * G rows
    captions: Tensor | None  # [len(prompts), S], -100 padded
    excluded: Tensor  # [B, B] bool: in-batch candidates that are also right
    negatives: Tensor | None  # [B, N, D] from the bank, where negatives are not rolled out
    count: int  # B


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
    ) -> None:
        started = time.perf_counter()
        self.retriever, self.stage, self.examples = retriever, stage, examples
        self.seed, self.on_step = tuple(seed), on_step
        self.reference = _frozen_copy(retriever) if stage.policy > 0 and stage.beta > 0 else None
        retriever.remember(
            p.image for p in map(retriever.inputs.prompt, examples.items()) if p.image is not None
        )
        self.negatives: Negatives | None = None
        if stage.mines or stage.hard_batches:
            self.negatives = Negatives(stage, examples, retriever, self.seed)
        self._last: _Rolled | None = None
        batches = plan(
            stage,
            examples,
            -(-length.steps // stage.num_iterations),
            self.seed,
            self.negatives.neighbours() if self.negatives and stage.hard_batches else None,
        )
        super().__init__(
            retriever.model,
            stage,
            [batch for batch in batches for _ in range(stage.num_iterations)],
            length,
            started=started,
            directory=directory,
            save_seconds=save_seconds,
            extra=extra,
        )

    def further_state(self) -> dict[str, dict[str, Tensor]]:
        return {} if self.negatives is None else {"mined": self.negatives.state()}

    def restore_further(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self.negatives is not None:
            self.negatives.restore(tensors["mined"])

    # -- the four steps ----------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        batch: Batch = inputs["batch"]
        first = self._last is None or self._last.batch.step != batch.step
        if first:
            every = self.stage.refresh_steps if self.stage.mines else None
            if self.negatives and every and batch.step and batch.step % every == 0:
                self.negatives.mine()
            self._last = self._roll(batch)
        elif self.stage.embeds:
            self._last.rollouts.embeddings = self._current_embeddings(self._last)
        gradient, advantages, metrics = self._score(self._last)
        metrics.update(self._backward(self._last, gradient, advantages))
        stage = self.stage
        weights = {"lm": stage.lm, "infonce": stage.infonce, "policy": stage.policy}
        metrics["loss"] = sum(w * metrics[name] for name, w in weights.items() if name in metrics)
        metrics["loss"] -= stage.pathwise * metrics.get("reward", 0.0)
        self.on_step(self.state.global_step + 1, metrics)
        return torch.tensor(metrics["loss"], device=self.args.device)

    def _roll(self, batch: Batch) -> _Rolled:
        stage, pool = self.stage, self.examples.pools[batch.task]
        queries = [self.examples.queries[batch.task][r] for r in batch.rows]
        positives = [self.examples.positive(q) for q in queries]
        items: list[Item] = [*queries]
        captions = [self.examples.caption(p) for p in positives]
        if stage.embeds:
            items += positives
            captions *= 2
        right = [set(self.examples.positive_rows(q)) for q in queries]
        excluded = torch.tensor(
            [[i != j and pool.row(p.id) in right[i] for j, p in enumerate(positives)]
             for i in range(len(queries))]
        )  # fmt: skip
        negatives = None
        if stage.mines:
            assert self.negatives is not None
            rows = self.negatives.rows(batch)
            if stage.rollout_candidates == "all":
                chosen = [pool[int(i)] for i in rows.flatten()]
                items += chosen
                captions += [self.examples.caption(c) for c in chosen]
            else:
                negatives = self.negatives.banks[batch.task][rows]
        prompts = [self.retriever.inputs.prompt(i) for i in items]
        gold = self._caption_ids(captions) if stage.lm > 0 or stage.completions == "gold" else None
        rollouts = self._rollouts(batch, prompts, gold)
        return _Rolled(batch, prompts, rollouts, gold, excluded, negatives, len(queries))

    def _rollouts(self, batch: Batch, prompts: list[Prompt], gold: Tensor | None) -> Rollouts:
        stage = self.stage
        if stage.completions == "gold":
            assert gold is not None
            mask = gold != -100
            return Rollouts(
                ids=gold.clamp(min=0),
                mask=mask,
                log_probs=torch.zeros(gold.shape, device=gold.device),
                finished=torch.ones(len(gold), dtype=torch.bool, device=gold.device),
                embeddings=torch.zeros(
                    len(gold), self.retriever.embedding_size, device=gold.device
                ),
            )
        groups = stage.num_generations
        draws = uniforms(
            (*self.seed, "draws", batch.step), (len(prompts), groups, stage.max_completion_length)
        )
        parts, order = [], []
        size = max(1, stage.micro_batch_size // groups)
        for rows in batches_by_length([len(p) for p in prompts], size):
            parts.append(
                sample(
                    self.retriever,
                    [prompts[i] for i in rows],
                    draws=draws[rows],
                    max_completion_length=stage.max_completion_length,
                    temperature=stage.sampling_temperature,
                )
            )
            order += [i * groups + g for i in rows for g in range(groups)]
        back = torch.tensor(order).argsort().to(self.retriever.device)
        return Rollouts.cat(parts, pad=self.retriever.inputs.ret_id).select(back)

    def _score(self, rolled: _Rolled) -> tuple[Tensor | None, Tensor | None, dict[str, float]]:
        """Step 2: d loss / d embeddings [R, D], advantages [R] and what to log."""
        stage, b = self.stage, rolled.count
        metrics = _summary_metrics(rolled.rollouts)
        if not stage.embeds:
            return None, None, metrics
        leaf = rolled.rollouts.embeddings.detach().requires_grad_()
        grouped = leaf.unflatten(0, (len(rolled.prompts), -1))  # [prompts, G, D]
        query, positive = grouped[:b], grouped[b : 2 * b]
        loss = leaf.new_zeros(())
        advantages = None
        if stage.infonce > 0:
            groups = grouped.shape[1]
            nce = torch.stack([
                objective.info_nce(query[:, g], positive[:, g], rolled.excluded, stage.temperature)
                for g in range(groups)
            ]).mean()  # fmt: skip
            metrics["infonce"] = nce.item()
            loss = loss + stage.infonce * nce
        if stage.ranks:
            negatives, mask = self._negatives(rolled, grouped)
            r = stage.reward
            out = elva_kernels.ranking_reward(
                query, positive, negatives, mask=mask, margin=r.margin, rank_penalty=r.rank_penalty,
                w_margin=r.w_margin, w_rank=r.w_rank, rank_temperature=r.rank_temperature,
            )  # fmt: skip
            reward = out.reward.detach()
            group = elva_kernels.group_advantages(reward, scale=stage.scale_rewards)  # [B, G]
            advantages = self._per_row(group, rolled)
            metrics.update(_reward_metrics(reward, out))
            loss = loss - stage.pathwise * out.reward.mean()
        if loss.requires_grad:
            loss.backward()
        return leaf.grad, advantages, metrics

    def _negatives(self, rolled: _Rolled, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, G, N, D] negatives of every action, and which of them count."""
        b, groups = rolled.count, grouped.shape[1]
        if self.stage.rank_against == "batch":
            others = ~(rolled.excluded | torch.eye(b, dtype=torch.bool)).to(grouped.device)
            shared = grouped[b : 2 * b].transpose(0, 1)  # [G, B, D], the batch's candidates
            return shared.expand(b, -1, -1, -1), others[:, None].expand(-1, groups, -1)
        if rolled.negatives is None:
            return grouped[2 * b :].unflatten(0, (b, -1)).transpose(1, 2), None
        return rolled.negatives[:, None].expand(-1, groups, -1, -1), None

    def _collate(self, prompts: list[Prompt]) -> PromptBatch:
        return self.retriever.inputs.collate(prompts, self.retriever.device)

    def _per_row(self, group: Tensor, rolled: _Rolled) -> Tensor:
        """[B, G] -> [R]: every sequence of an action shares the action's advantage."""
        parts = [group, group]
        rest = len(rolled.prompts) - 2 * rolled.count
        if rest:
            parts.append(group.repeat_interleave(rest // rolled.count, 0))
        return torch.cat(parts).flatten()

    def _backward(
        self, rolled: _Rolled, gradient: Tensor | None, advantages: Tensor | None
    ) -> dict[str, float]:
        """Steps 3 and 4; returns the token losses, each as a mean."""
        stage, rollouts = self.stage, rolled.rollouts
        groups = len(rollouts.ids) // len(rolled.prompts)
        target = None
        if stage.lm > 0:
            assert rolled.captions is not None
            target = objective.caption_targets(
                rollouts.ids, rolled.captions.repeat_interleave(groups, 0)
            )
        trained = rollouts.finished.sum().clamp(min=1)
        tokens = None if target is None else (target != -100).sum().clamp(min=1)
        parts: defaultdict[str, float] = defaultdict(float)
        lengths = [len(p) for p in rolled.prompts for _ in range(groups)]
        for rows in batches_by_length(lengths, stage.micro_batch_size):
            index = torch.tensor(rows, device=self.retriever.device)
            part = rollouts.select(index)
            prompts = self._collate([rolled.prompts[i // groups] for i in rows])
            with self.accelerator.autocast():  # bf16, where the recipe's trainer asks
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
            if stage.policy > 0:
                assert advantages is not None
                logits = self.retriever.plain.lm_head(hidden[:, :-1])
                policy, kl = self._policy(prompts, part, logits, advantages[index])
                policy = policy[part.finished].sum() / trained
                parts["policy"] += policy.item()
                parts["kl"] += (kl[part.finished].sum() / trained).item()
                total = total + stage.policy * policy
            self.accelerator.backward(total)
        return dict(parts)

    def _policy(
        self, prompts: Any, part: Rollouts, logits: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        stage, banned = self.stage, self.retriever.inputs.banned_ids
        new = token_log_probs(logits, part.ids, stage.sampling_temperature, banned)
        reference = new.detach()
        if stage.beta > 0:
            with torch.no_grad(), self._as_reference() as model:
                hidden = model.hidden_states(prompts, part.ids, part.mask)
                reference = token_log_probs(
                    model.plain.lm_head(hidden[:, :-1]),
                    part.ids,
                    stage.sampling_temperature,
                    banned,
                )
        return objective.policy_loss(
            new, part.log_probs, reference, advantages, part.mask,
            clip_epsilon=stage.clip_epsilon, beta=stage.beta,
        )  # fmt: skip

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

    @torch.no_grad()
    def _current_embeddings(self, rolled: _Rolled) -> Tensor:
        """[RET] embeddings of kept rollouts under the weights of now (num_iterations > 1)."""
        rollouts = rolled.rollouts
        groups = len(rollouts.ids) // len(rolled.prompts)
        out = torch.zeros_like(rollouts.embeddings)
        lengths = [len(p) for p in rolled.prompts for _ in range(groups)]
        for rows in batches_by_length(lengths, self.stage.micro_batch_size):
            part = rollouts.select(torch.tensor(rows, device=out.device))
            prompts = self._collate([rolled.prompts[i // groups] for i in rows])
            hidden = self.retriever.hidden_states(prompts, part.ids, part.mask)
            out[rows] = hidden[torch.arange(len(rows)), part.mask.sum(1)].float()
        return out

    # -- captions ----------------------------------------------------------------------------------

    def _caption_ids(self, captions: list[str | None]) -> Tensor:
        """[len(captions), S] token ids, each ending in [RET]; a row without a caption is all
        -100."""
        ids = [
            []
            if c is None
            else self.retriever.inputs.tokenizer(c, add_special_tokens=False).input_ids
            for c in captions
        ]
        limit = self.stage.max_completion_length
        rows = [[*i[: limit - 1], self.retriever.inputs.ret_id] if i else [] for i in ids]
        out = torch.full((len(rows), max(1, *map(len, rows))), -100)
        for k, row in enumerate(rows):
            out[k, : len(row)] = torch.tensor(row)
        return out.to(self.retriever.device)


def _frozen_copy(retriever: Retriever) -> Retriever | None:
    """The KL reference. Under LoRA none is needed: without the adapter the model is the one that
    began."""
    if isinstance(retriever.model, PeftModel):
        return None
    frozen = copy.copy(retriever)  # shares prompts and picture features
    frozen.model = copy.deepcopy(retriever.model).requires_grad_(False)
    return frozen


def _summary_metrics(rollouts: Rollouts) -> dict[str, float]:
    return {
        "completion_length": rollouts.mask.sum(1).float().mean().item(),
        "frac_no_ret": 1.0 - rollouts.finished.float().mean().item(),
    }


def _reward_metrics(reward: Tensor, out: elva_kernels.RankingReward) -> dict[str, float]:
    """What shows a collapse or a hack early."""
    rank = out.rank.float()
    spread = reward.amax(1) - reward.amin(1)
    return {
        "reward": reward.mean().item(),
        "reward_std": reward.std(1, unbiased=False).mean().item(),
        "frac_zero_std": (spread < 1e-6).float().mean().item(),
        "margin_reward": out.margin_reward.mean().item(),
        "rank_reward": out.rank_reward.mean().item(),
        "positive_score": out.scores[..., 0].mean().item(),
        "mean_score": out.scores.mean().item(),
        "rank_1": (rank == 1).float().mean().item(),
        "rank_2_3": ((rank >= 2) & (rank <= 3)).float().mean().item(),
        "rank_4_10": ((rank >= 4) & (rank <= 10)).float().mean().item(),
        "rank_11_up": (rank > 10).float().mean().item(),
    }
