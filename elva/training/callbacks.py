"""What is told of a stage while it trains: logs, trackers, and whatever a user adds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elva.errors import UserError
from elva.recipe import Recipe, to_dict

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
    """Metrics to the trackers of `report_to`, by accelerate: each stage's under its own name."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        """Raises UserError where a tracker's package is not installed."""
        import torch
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers

        wanted, there = recipe.report_to.split(","), map(str, get_available_trackers())
        if missing := sorted(set(wanted) - set(there)):
            raise UserError(
                f"train: report_to must name installed trackers, got {missing[0]}; "
                f"pip install {missing[0]}"
            )
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), log_with=wanted, project_dir=directory
        )
        self.accelerator.init_trackers("elva", _flat(to_dict(recipe)))

    def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        name = loop.title.replace(" ", "-")
        self.accelerator.log({f"{name}/{k}": v for k, v in metrics.items()}, step=loop.step)

    on_evaluate = on_step_end

    def close(self) -> None:
        """Flush what they hold."""
        self.accelerator.end_training()


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


def _flat(plain: Mapping[str, Any], before: str = "") -> dict[str, str | float]:
    """a.b.c -> value, as trackers take them."""
    found: dict[str, str | float] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = value if isinstance(value, int | float | str) else str(value)
    return found
