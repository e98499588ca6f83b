"""One stage on a small corpus, step by step, for tests that look into it."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elva.data import load
from elva.model.retriever import Retriever
from elva.processes import Processes
from elva.recipe import NegativeConfig, StageConfig
from elva.training.callbacks import Callback
from elva.training.examples import Examples
from elva.training.loop import Loop
from elva.training.plan import Saving
from elva.training.stage import Stage as Work

POLICY = StageConfig(
    policy=1.0, tasks={"t2i": 1.0}, batch_size=2, num_generations=3, learning_rate=1e-3,
    negatives=NegativeConfig(given=0, mined=3, random=2, in_batch=False),
    max_completion_length=8, rollout_candidates="all",
)  # fmt: skip
"""GRPO, small."""

INFO_NCE = replace(
    POLICY, policy=0.0, infonce=1.0, batch_size=6, num_generations=1,
    negatives=NegativeConfig(given=0), rollout_candidates="query_positive",
)  # fmt: skip


class _Log(Callback):
    def __init__(self, log: list[dict[str, float]]) -> None:
        self.log = log

    def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self.log.append(dict(metrics))


class Stage:
    """A trainer with what it logged and said."""

    def __init__(
        self, checkpoint: Path, corpus: Path, stage: StageConfig, directory: Path, *,
        steps: int = 3, extra: dict[str, Any] | None = None, seed: int = 0,
        features: Path | None = None,
        dtype: torch.dtype | None = None,
        summary_prompt: str = "Summarise it.",
    ) -> None:  # fmt: skip
        self.retriever = Retriever.load(checkpoint, summary_prompt=summary_prompt)
        self.retriever.to(dtype or self.retriever.plain.dtype)
        if stage.lora.rank:
            self.retriever.add_lora(stage.lora)
        self.retriever.freeze_vision(True, features)
        self.retriever.plain.train()
        self.said: list[str] = []
        self.log: list[dict[str, float]] = []
        self.before = self.weights()
        processes, extra = Processes(), extra or {}
        self.work = Work(
            self.retriever, stage, Examples(load(corpus, split="train"), stage), steps,
            seed=(seed, "3"), arguments=extra, title="stage 3", processes=processes,
            say=self.said.append,
        )  # fmt: skip
        self.loop = Loop(
            self.retriever, self.work, stage, steps, directory=directory / "stage-3",
            processes=processes, saving=Saving(1e9), arguments=extra, callbacks=[_Log(self.log)],
        )  # fmt: skip

    def train(self) -> "Stage":
        self.loop.train()
        return self

    def weights(self) -> dict[str, Any]:
        return {n: p.detach().clone() for n, p in self.retriever.model.named_parameters()}

    @property
    def moved(self) -> float:
        """The largest change of a weight since the start."""
        now = self.weights()
        return max((now[n].float() - p.float()).abs().max().item() for n, p in self.before.items())

    @property
    def digest(self) -> str:
        """Of all weights."""
        parts = (p.float().numpy().tobytes() for p in self.weights().values())
        return hashlib.sha256(b"".join(parts)).hexdigest()
