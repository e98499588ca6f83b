"""A step's summaries: sampled, or the captions as if the model had written them; and what is read
at their [RET]."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from elva.data import Item
from elva.draws import uniforms
from elva.model.prompt import Prompt, PromptBatch
from elva.model.retriever import Retriever
from elva.model.rollout import Rollouts, batches_by_length, encode, sample
from elva.processes import Processes
from elva.recipe import StageConfig


class Summaries:
    """Writes and reads summaries with the weights of now.

    Args:
        seed: of the draws.
        arithmetic: the autocast of every forward of the stage.
    """

    def __init__(
        self,
        retriever: Retriever,
        stage: StageConfig,
        seed: Sequence[int | str],
        arithmetic: Callable[[], AbstractContextManager[Any]],
        processes: Processes,
    ) -> None:
        self.retriever, self.stage, self.processes = retriever, stage, processes
        self.seed, self.arithmetic = tuple(seed), arithmetic

    def write(
        self,
        step: int,
        prompts: list[Prompt],
        places: Sequence[int],
        everyone: int,
        gold: Tensor | None,
    ) -> Rollouts:
        """Rollouts, G rows a prompt.

        Args:
            places: of the prompts among `everyone`'s, whose draws do not depend on who draws.
            gold: token ids [len(prompts), S] of captions.
        """
        if self.stage.completions == "gold":
            assert gold is not None
            return self._as_written(prompts, gold)
        stage = self.stage
        groups = stage.num_generations
        shape = (everyone, groups, stage.max_completion_length)
        draws = uniforms((*self.seed, "draws", step), shape)[list(places)]
        parts, order = [], []
        size = max(1, stage.rollout_batch_size // groups)
        for rows in batches_by_length([len(p) for p in prompts], size):
            with self.arithmetic():
                part = sample(
                    self.retriever,
                    [prompts[i] for i in rows],
                    draws=draws[rows],
                    max_completion_length=stage.max_completion_length,
                    temperature=stage.temperature,
                )
            parts.append(part)
            order += [i * groups + g for i in rows for g in range(groups)]
        back = torch.tensor(order).argsort().to(self.retriever.device)
        return Rollouts.cat(parts, pad=self.retriever.inputs.filler).select(back)

    def _as_written(self, prompts: list[Prompt], gold: Tensor) -> Rollouts:
        """The captions as if the model had written them; [RET] alone where there is none."""
        ret = self.retriever.inputs.ret_id
        size, dtype = self.retriever.embedding_size, self.retriever.embedding_dtype
        mask = gold != -100
        mask[:, 0] = True
        rollouts = Rollouts(
            ids=gold.where(gold != -100, ret),
            mask=mask,
            log_probs=torch.zeros(gold.shape, dtype=dtype, device=gold.device),
            finished=torch.ones(len(gold), dtype=torch.bool, device=gold.device),
            embeddings=torch.zeros(len(gold), size, dtype=dtype, device=gold.device),
        )
        if self.stage.embeds:
            rollouts.embeddings = self.embeddings(prompts, rollouts)
        return rollouts

    def embed(self, items: Sequence[Item]) -> Tensor:
        """Greedy embeddings [n, D] with the weights of now, of each process's share of them."""
        own = self.processes.share(len(items))
        with self.arithmetic():
            out = encode(
                self.retriever,
                [items[i] for i in own],
                max_completion_length=self.stage.max_completion_length,
                batch_size=self.stage.rollout_batch_size,
            )
        return self.processes.gather(out.embeddings.to(self.retriever.device), len(items))

    @torch.no_grad()
    def embeddings(self, prompts: list[Prompt], rollouts: Rollouts) -> Tensor:
        """Embeddings of kept summaries under the weights of now, [R, D]."""
        out = torch.zeros_like(rollouts.embeddings)
        for rows, batch in self.micro_batches(prompts, rollouts.mask):
            part = rollouts.select(torch.tensor(rows, device=out.device))
            with self.arithmetic():
                _, found = self.retriever.read_out(batch, part.ids, part.mask)
            out[rows] = found.to(out.dtype)
        return out

    def caption_ids(self, captions: list[str | None]) -> Tensor:
        """[len(captions), S] token ids, each ending in [RET]; a row without a caption is all
        -100."""
        inputs, limit = self.retriever.inputs, self.stage.max_completion_length
        ids = [[] if c is None else inputs.text_ids(c) for c in captions]
        rows = [[*i[: max(0, limit - 1)], inputs.ret_id] if i else [] for i in ids]
        out = torch.full((len(rows), max(1, *map(len, rows))), -100)
        for k, row in enumerate(rows):
            out[k, : len(row)] = torch.tensor(row)
        return out.to(self.retriever.device)

    def micro_batches(
        self, prompts: list[Prompt], mask: Tensor
    ) -> Iterator[tuple[list[int], PromptBatch]]:
        """(rows of the rollouts, their prompts): whole prompts of like length, or, where one's
        rollouts are more than a micro-batch holds, equal parts of them.

        Args:
            mask: [len(prompts) * G, T], the rollouts' own.
        """
        inputs, device = self.retriever.inputs, self.retriever.device
        most, groups = self.stage.micro_batch_size, len(mask) // len(prompts)
        written = mask.sum(1).view(-1, groups).sum(1).tolist()
        lengths = [len(p) + n for p, n in zip(prompts, written, strict=True)]
        part = -(-groups // -(-groups // most))
        for some in batches_by_length(lengths, max(1, most // groups)):
            batch = inputs.collate([prompts[i] for i in some], device)
            for start in range(0, groups, part):
                stop = min(start + part, groups)
                yield [i * groups + g for i in some for g in range(start, stop)], batch
