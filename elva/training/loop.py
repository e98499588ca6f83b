"""transformers' Trainer, resumable to the bit: a fixed plan of steps, checkpoints of our own.

To the bit on a CPU; on a GPU as far as torch's own kernels repeat themselves.

What a step computes is its subclass's matter (`stage`).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from elva import checkpoint
from elva.recipe import StageConfig
from elva.run import title_of
from elva.training.guards import refuse_broken_weights
from elva.training.plan import Batch

LEAST_TEMPERATURE = 0.01
"""Of one that is learnt."""


@dataclass(frozen=True)
class Length:
    """How long a stage runs: `steps`, or until `seconds` have passed and at most `steps`."""

    steps: int
    seconds: float | None = None


class _Steps(TorchDataset):  # type: ignore[type-arg]
    """The plan as a map-style dataset: Trainer's unit of data is a whole step."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


class ResumableTrainer(Trainer):
    """Runs `training_step` on every batch of a plan, in its order, for a `Length`."""

    def __init__(
        self,
        model: Any,
        stage: StageConfig,
        batches: Sequence[Batch],
        length: Length,
        *,
        started: float,
        directory: Path,
        save_seconds: float,
        extra: Mapping[str, Any],
    ) -> None:
        """`started`: when the stage began, by `time.perf_counter`."""
        self.length, self.directory = length, directory
        self.warmup_ratio, self.save_every = stage.warmup_ratio, stage.num_iterations
        self.started, self.elapsed_before = started, 0.0
        self.log_temperature: Tensor | None = None
        if stage.learn_infonce_temperature:
            start = torch.tensor(math.log(stage.infonce_temperature), device=model.device)
            self.log_temperature = torch.nn.Parameter(start)
        self._steps = _Steps(batches[: length.steps])
        super().__init__(
            model=model,
            args=_arguments(stage, length.steps, directory, extra),
            train_dataset=self._steps,
            data_collator=lambda items: {"batch": items[0]},
            callbacks=[_Clock(self, save_seconds)],
        )
        self.remove_callback(PrinterCallback)

    @property
    def elapsed(self) -> float:
        """Seconds of this stage, those before a resume included."""
        return self.elapsed_before + time.perf_counter() - self.started

    def further_state(self) -> dict[str, dict[str, Tensor]]:
        """What a subclass's next step depends on beside the weights: groups of tensors."""
        return {}

    def further_facts(self) -> dict[str, Any]:
        """The same as JSON."""
        return {}

    def restore_further(
        self, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
    ) -> None:
        """Put back what `further_state` and `further_facts` gave."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """In the plan's order."""
        return SequentialSampler(self._steps)

    def parameters(self) -> dict[str, Tensor]:
        """Everything that may train, by name: the model's, and a temperature that is learnt."""
        found: dict[str, Tensor] = dict(self.model.named_parameters())
        if self.log_temperature is not None:
            found["log_temperature"] = self.log_temperature
        return found

    def trained(self) -> dict[str, Tensor]:
        """What of it does train."""
        return {n: p for n, p in self.parameters().items() if p.requires_grad}

    def refuse_broken_weights(self) -> None:
        """RunError where training has made NaN or inf of a weight."""
        refuse_broken_weights(title_of(self.directory), self.trained())

    def create_optimizer(self, *given: Any) -> Any:
        """Trainer's own, and a group for the temperature."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*given)
        if self.log_temperature is not None and not made:
            optimizer.add_param_group({"params": [self.log_temperature], "weight_decay": 0.0})
        return optimizer

    def save(self) -> None:
        """Write everything that the next step depends on: weights, moments, counters.

        Raises:
            RunError: a weight is NaN or infinite; the checkpoints before it stay.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self.refuse_broken_weights()
        weights = self.trained()
        names: dict[Any, str] = {p: n for n, p in self.parameters().items()}
        moments = {
            f"{names[p]}|{key}": value
            for p, entry in optimizer.state.items()
            for key, value in entry.items()
        }
        groups = {"weights": weights, "optimizer": moments, **self.further_state()}
        checkpoint.save(
            self.directory,
            self.state.global_step,
            groups,
            {"elapsed": self.elapsed, **self.further_facts()},
            lambda partial: self.state.save_to_json(str(partial / TRAINER_STATE_NAME)),
        )
        checkpoint.prune(self.directory, keep=2)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors, state = checkpoint.load(Path(resume_from_checkpoint))
        parameters = self.parameters()
        with torch.no_grad():
            for name, value in tensors["weights"].items():
                parameters[name].copy_(value)
        self.restore_further(tensors, state)
        self.elapsed_before = state["elapsed"]

    def _load_optimizer_and_scheduler(self, resume_from_checkpoint: str | None) -> None:
        if resume_from_checkpoint is None:
            return
        tensors, _ = checkpoint.load(Path(resume_from_checkpoint))
        parameters = self.parameters()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        for name, value in tensors["optimizer"].items():
            name, key = name.rsplit("|", 1)
            parameter = parameters[name]
            on_device = groups[parameter].get("fused") or groups[parameter].get("capturable")
            home = "cpu" if key == "step" and not on_device else parameter.device
            optimizer.state[parameter][key] = value.to(home)
        scheduler = self.lr_scheduler
        scheduler.last_epoch = self.state.global_step
        for group, base, factor in zip(
            optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: every random number is a pure function of (seed, stage, step)."""

    def clear_temperature(self) -> None:
        """Before a step: its gradient, which Trainer, who knows the model's parameters, leaves."""
        if self.log_temperature is not None:
            self.log_temperature.grad = None

    def bound_temperature(self) -> None:
        """After a step: within what CLIP allows (arXiv:2103.00020, sec. 2.5)."""
        if self.log_temperature is not None:
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(LEAST_TEMPERATURE))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's own, or for a stage limited by the clock its cosine over the seconds."""
        if self.length.seconds is None:
            return super().create_scheduler(num_training_steps, optimizer)
        budget, warmup = self.length.seconds, self.warmup_ratio

        def factor(step: int) -> float:
            done = min(1.0, self.elapsed / budget)
            return min(1.0, done / warmup if warmup else 1.0) * 0.5 * (1 + math.cos(math.pi * done))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer, factor
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: Trainer's formula knows nothing of rollouts."""
        return 0


def autocast(
    device: torch.device, extra: Mapping[str, Any]
) -> Callable[[], AbstractContextManager[Any]]:
    """The arithmetic of a stage's every forward: bf16 where its recipe's trainer asks for it."""
    bf16 = bool(extra.get("bf16"))
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def _arguments(
    stage: StageConfig, steps: int, directory: Path, extra: Mapping[str, Any]
) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 1,
        "max_steps": steps,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.schedule,
        "warmup_steps": max(1, round(stage.warmup_ratio * steps)),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    return TrainingArguments(**{**settings, **extra})


class _Clock(TrainerCallback):
    """Saves every so many seconds, at rollout boundaries, and ends a stage whose time is up."""

    def __init__(self, trainer: ResumableTrainer, save_seconds: float) -> None:
        self.trainer, self.save_seconds = trainer, save_seconds
        self.saved_at = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.trainer.bound_temperature()
        seconds = self.trainer.length.seconds
        if seconds is not None and self.trainer.elapsed >= seconds:
            control.should_training_stop = True
        boundary = state.global_step % self.trainer.save_every == 0
        due = time.perf_counter() - self.saved_at >= self.save_seconds
        if boundary and due and state.global_step < args.max_steps:
            self.trainer.save()
            self.saved_at = time.perf_counter()
        return control
