"""What is told of a stage while it trains: logs, trackers, and whatever a user adds."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elva import checkpoint
from elva.errors import UserError
from elva.recipe import Recipe
from elva.recipes import flat
from elva.run import Run

if TYPE_CHECKING:
    from elva.training.loop import Loop


class Callback:
    """What a user's own callback may do: override any of these; each is called on every process.

    `loop.step` counts the finished steps, `loop.title` names the stage; `loop.stop = True` ends it
    after the step, on whichever process it was said.
    """

    def on_stage_begin(self, loop: Loop) -> None:
        """Before the first step, or the first one after a resume."""

    def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """After each optimiser step, with what was measured in it."""

    def on_evaluate(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """After an evaluation inside the stage; names begin with `eval_`."""

    def on_save(self, loop: Loop, checkpoint: Path) -> None:
        """After a checkpoint was written."""

    def on_stage_end(self, loop: Loop) -> None:
        """After the last step, before the stage's model is written."""


class Trackers(Callback):
    """Metrics to the trackers of `report_to`, by accelerate, on the first process.

    Names are of a stage (`stage-2/loss`), steps go on from stage to stage: trackers drop a step
    that is behind the last one. A run that goes on is the same run to them.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        """
        Args:
            say: takes a line about a tracker that fails while the stage trains.

        Raises:
            UserError: a tracker is not installed, or does not start.
        """
        import torch
        from accelerate import Accelerator

        if (line := missing_tracker(run.recipe)) is not None:
            raise UserError(line)
        self.run, self.say, self._before = run, say, 0
        goes_on = run.metrics_file.is_file()
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), log_with=run.recipe.report_to.split(","),
            project_dir=run.directory, mixed_precision="no",
        )  # fmt: skip
        known = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in flat(asdict(run.recipe)).items()
        }
        try:
            with redirect_stdout(sys.stderr):  # what a tracker says of itself is no result
                self._accelerator.init_trackers(
                    "elva", None if goes_on else known, _settings(run, goes_on)
                )
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"train: report_to must name trackers that start, got {run.recipe.report_to}; "
                f"{reason}"
            ) from error
        self.trackers = self._accelerator.trackers

    def on_stage_begin(self, loop: Loop) -> None:
        self._before = _steps_beside(self.run, loop.directory)

    def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        named = {f"{loop.directory.name}/{k}": v for k, v in metrics.items()}
        for tracker in [*self.trackers]:
            try:
                tracker.log(named, step=self._before + loop.step)
            except Exception as error:  # noqa: BLE001 - days of training do not end for a log of it
                self.say(f"{loop.title}: step {loop.step}: {_failure(tracker, error)}")
                self.trackers.remove(tracker)
                self._finish(tracker)

    on_evaluate = on_step_end

    def close(self) -> None:
        """Flush what they hold."""
        for tracker in self.trackers:
            self._finish(tracker)

    def _finish(self, tracker: Any) -> None:
        try:
            with redirect_stdout(sys.stderr):
                tracker.finish()
        except Exception as error:  # noqa: BLE001 - as above
            self.say(_failure(tracker, error))


def _failure(tracker: Any, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{tracker.name} fails and is told no more, metrics.jsonl has all; {reason}"


def missing_tracker(recipe: Recipe) -> str | None:
    """What is said of a tracker of `report_to` that is not installed; None: all are."""
    from accelerate.tracking import get_available_trackers

    wanted = set(recipe.report_to.split(",")) - {"none"}
    missing = sorted(wanted - set(map(str, get_available_trackers())))
    if not missing:
        return None
    return (
        f"train: report_to must name installed trackers, got {missing[0]}; pip install {missing[0]}"
    )


def _settings(run: Run, goes_on: bool) -> dict[str, dict[str, Any]]:
    """By tracker, what its own start is given, so that a run that goes on is continued."""
    name = run.directory.absolute().name
    known = hashlib.sha256((run.directory / "run.json").read_bytes()).hexdigest()[:16]
    return {
        # What a killed run told beyond its last checkpoint is told again.
        "tensorboard": {"purge_step": _saved_steps(run) + 1 if goes_on else None},
        "wandb": {"id": known, "name": name, "resume": "allow", "dir": str(run.directory)},
        "trackio": {"name": f"{name}-{known}", "resume": "allow"},
    }


def _steps_beside(run: Run, stage: Path | None) -> int:
    """Steps of the stages and controls that ended, but for the one of a directory."""
    files = (d / "stage.json" for d in _directories(run) if d != stage)
    return sum(json.loads(f.read_text(encoding="utf-8"))["steps"] for f in files if f.is_file())


def _saved_steps(run: Run) -> int:
    """Steps of what ended, and those of the latest checkpoint of what did not."""
    latest = {d: step for d in _directories(run) if (step := checkpoint.last_step(d))}
    stage = next(iter(latest), None)
    return _steps_beside(run, stage) + latest.get(stage, 0)


def _directories(run: Run) -> list[Path]:
    return [run.stage(name) for name in (*run.recipe.stages, *run.recipe.controls)]


def callbacks_of(names: Sequence[str]) -> list[Callback]:
    """A user's own, each named MODULE:CLASS and made without arguments.

    Raises:
        UserError: there is no such class, or it is no `Callback`.
    """
    return [_callback(name) for name in names]


def _callback(name: str) -> Callback:
    module, _, kind = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), kind)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"train: --callback must name MODULE:CLASS of a class without arguments, got {name}; "
            f"{error}"
        ) from None
    if not isinstance(made, Callback):
        raise UserError(
            f"train: --callback must name a subclass of elva.training.callbacks.Callback, "
            f"got {name}"
        )
    return made
