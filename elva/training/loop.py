"""The loop of a stage: steps of its plan on accelerate, resumable to the bit.

To the bit on a CPU; on a GPU as far as torch's own kernels repeat themselves. What a step computes
is `stage`'s matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from elva import checkpoint
from elva.errors import RunError
from elva.processes import Processes
from elva.recipe import StageConfig
from elva.run import title_of
from elva.training.callbacks import Callback
from elva.training.guards import refuse_broken_weights
from elva.training.optimizer import make_optimizer, make_schedule, put_schedule
from elva.training.plan import Saving
from elva.training.resumed import best_weights, restored
from elva.training.states import moments_of, put_moments, put_weights, weights_of
from elva.training.wrapping import accelerator_of

BEST = "best"
"""Beside a stage's checkpoints: the weights of its best evaluation."""


class Work(Protocol):
    """What the loop repeats. `leaves_unused`: whether a backward may not reach every parameter."""

    leaves_unused: bool

    def step(self, number: int, accelerator: Accelerator, model: nn.Module) -> dict[str, float]:
        """Leave a step's gradients in the parameters; what was measured."""

    def stepped(self, number: int, metrics: Mapping[str, float]) -> None:
        """After the optimiser's step; RunError where the stage must not go on."""

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What the next step depends on beside the weights: groups of tensors, and JSON."""

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""


class Loop:
    """Repeats `Work.step`, the optimiser and the schedule for so many steps.

    Args:
        model: what trains; each process has it whole.
        arguments: the recipe's `trainer`, by transformers' names.
        evaluate: figures of the weights of now, every `eval_steps`.
        started: when the stage began, by `time.perf_counter`.
    """

    def __init__(
        self, model: nn.Module, work: Work, stage: StageConfig, steps: int, *,
        directory: Path, processes: Processes, saving: Saving, arguments: Mapping[str, Any],
        callbacks: Sequence[Callback] = (),
        evaluate: Callable[[], Mapping[str, float]] | None = None, started: float | None = None,
    ) -> None:  # fmt: skip
        self.work, self.stage, self.steps, self.directory = work, stage, steps, directory
        self.processes, self.saving = processes, saving
        self.callbacks, self.evaluate = list(callbacks), evaluate
        self.title = title_of(directory)
        self.metric = f"eval_{stage.metric_for_best_model.removeprefix('eval_')}"
        self.step, self.stop, self.saved_at = 0, False, 0.0
        self.best: dict[str, Any] = {"value": None, "step": 0, "worse": 0}
        self.started = time.perf_counter() if started is None else started
        self.elapsed = self.elapsed_before = 0.0
        self.accelerator = accelerator_of(stage, leaves_unused=work.leaves_unused)
        torch.backends.cuda.matmul.allow_tf32 = bool(arguments.get("tf32", False))
        self.inner = make_optimizer(model, stage, arguments)
        self.model, self.optimizer = self.accelerator.prepare(model, self.inner)
        self.schedule = make_schedule(self.inner, stage, steps, arguments)

    def train(self, resume: Path | None = None) -> None:
        """Run to the end, from a checkpoint where one is given.

        Raises:
            RunError: a guard stops the stage, or its best weights are damaged.
        """
        if resume is not None:
            self._restore(resume)
        self._tell("on_stage_begin")
        while self.step < self.steps and not self.stop:
            metrics = self.work.step(self.step, self.accelerator, self.model)
            if self.stage.max_grad_norm > 0:
                norm = self.accelerator.clip_grad_norm_(
                    self.model.parameters(), self.stage.max_grad_norm
                )
                metrics["grad_norm"] = float(norm)
            metrics["learning_rate"] = self.inner.param_groups[0]["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._clock()
            self.schedule.step()
            self.step += 1
            self._tell("on_step_end", metrics)
            self.work.stepped(self.step, metrics)
            if self.stage.eval_steps and self.step % self.stage.eval_steps == 0:
                self._evaluate()
            self.stop = self.processes.most(int(self.stop)) > 0
            boundary = self.step % self.stage.num_iterations == 0 and self.step < self.steps
            due = self.elapsed - self.saved_at >= self.saving.seconds
            if boundary and (due or (self.saving.steps and self.step % self.saving.steps == 0)):
                self.save()
        if self.stage.load_best_model_at_end and self.best["value"] is not None:
            best = checkpoint.place(self.directory / BEST, self.best["step"])
            put_weights(self.module, best_weights(best, self.module))
        self._tell("on_stage_end")

    @property
    def module(self) -> nn.Module:
        """The model without its wrapper."""
        found: nn.Module = self.accelerator.unwrap_model(self.model)
        return found

    def save(self) -> None:
        """Write everything that the next step depends on: weights, moments, counters.

        Raises:
            RunError: a weight is NaN or infinite; the checkpoints before it stay.
        """
        weights = self.whole_weights()
        groups, facts = self.work.state()
        moments = moments_of(self.module, self.inner, self.optimizer)
        groups |= {"weights": weights, "optimizer": moments}
        facts |= {"step": self.step, "elapsed": self.elapsed, "best": self.best}
        written = self._write(self.directory, groups, facts, keep=self.saving.limit)
        self.saved_at = self.elapsed
        self._tell("on_save", written)

    def whole_weights(self) -> dict[str, Tensor]:
        """What trains; RunError where training has made NaN or inf of a weight."""
        weights = weights_of(self.module)
        refuse_broken_weights(self.title, weights)
        return weights

    def close(self) -> None:
        """Let go of the wrapped model, so that the next stage has its memory."""
        self.accelerator.free_memory()

    def _write(self, parent: Path, groups: Any, facts: Mapping[str, Any], keep: int) -> Path:
        with self.processes.first_alone() as mine:
            if mine:
                checkpoint.save(parent, self.step, groups, facts)
                checkpoint.prune(parent, keep)
        return checkpoint.place(parent, self.step)

    def _restore(self, path: Path) -> None:
        groups, facts = restored(path, self.module)
        put_weights(self.module, groups["weights"])
        put_moments(self.module, self.inner, self.optimizer, groups["optimizer"])
        self.work.restore(groups, facts)
        self.step, self.best = facts["step"], facts["best"]
        self.elapsed = self.elapsed_before = self.saved_at = facts["elapsed"]
        put_schedule(self.schedule, self.step)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        found = {f"eval_{name}": value for name, value in self.evaluate().items()}
        if self.metric not in found:
            raise RunError(
                f"train: {self.title}: metric_for_best_model must be one of "
                f"{', '.join(found)}, got {self.stage.metric_for_best_model}"
            )
        value = found[self.metric]
        value = value if self.stage.greater_is_better else -value
        if self.best["value"] is None or value > self.best["value"]:
            self.best = {"value": value, "step": self.step, "worse": 0}
            if self.stage.load_best_model_at_end:
                weights = {"weights": weights_of(self.module)}
                self._write(self.directory / BEST, weights, self.best, keep=1)
        else:
            self.best["worse"] += 1
        patience = self.stage.early_stopping_patience
        self.stop = self.stop or (patience is not None and self.best["worse"] >= patience)
        self._tell("on_evaluate", found)

    def _tell(self, event: str, *what: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *what)

    def _clock(self) -> None:
        """Seconds of this stage, those before a resume included, by the first process's clock."""
        now = self.elapsed_before + time.perf_counter() - self.started
        self.elapsed = self.processes.agreed(now)
