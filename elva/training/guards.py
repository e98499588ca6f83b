"""What stops a stage, or is said of it: a loss that is no number, and what trains nothing."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from elva.errors import RunError
from elva.recipe import StageConfig

PATIENCE = 8
"""Ours: steps in a row that a guard watches before it speaks."""

SILENT, RUNAWAY_KL = 0.9, 10.0
"""Ours: share of summaries without [RET], and nats a token from the stage's start, beyond which a
policy gradient has nothing to go by."""


@dataclass
class Guards:
    """Watches the metrics of a stage's steps.

    Args:
        title: of the stage.
        say: takes a line about what does not stop the stage; each is said once.
    """

    title: str
    stage: StageConfig
    say: Callable[[str], None]
    _since: dict[str, int] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    def watch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at one step.

        Raises:
            RunError: it cannot go on, or would train nothing.
        """
        wrong = [name for name in ("loss", "kl") if not math.isfinite(metrics.get(name, 0.0))]
        if wrong:
            raise RunError(
                f"train: {self.title}: {wrong[0]} must be finite, got {metrics[wrong[0]]} at step "
                f"{step}; lower its learning_rate in a new run, --from this one"
            )
        stage = self.stage
        silent, equal = metrics.get("frac_no_ret", 0.0), metrics.get("frac_zero_std", 0.0)
        if self._lasts("frac_no_ret", silent > SILENT):
            line = (
                f"frac_no_ret is over {SILENT} for {PATIENCE} steps, {silent:.2f} now: summaries "
                "do not end within max_completion_length"
            )
            if stage.policy > 0 and not (stage.lm or stage.ret or stage.infonce or stage.pathwise):
                raise RunError(
                    f"train: {self.title}: {line}, and nothing is trained; raise it, or train a "
                    "stage with ret over 0 before"
                )
            self._once("frac_no_ret", line)
        if self._lasts("frac_zero_std", stage.policy > 0 and equal >= 1.0):
            line = f"rewards do not vary for {PATIENCE} steps: the policy gradient is zero"
            self._once("frac_zero_std", line)
        if self._lasts("kl", metrics.get("kl", 0.0) > RUNAWAY_KL):
            line = f"kl is over {RUNAWAY_KL:g} nats a token for {PATIENCE} steps"
            self._once("kl", f"{line}; lower the learning_rate or raise beta")

    def state(self) -> dict[str, dict[str, Any]]:
        """For a checkpoint."""
        return {"since": dict(self._since), "said": dict(self.said)}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """What `state` gave."""
        self._since, self.said = dict(state["since"]), dict(state["said"])

    def _lasts(self, name: str, now: bool) -> bool:
        self._since[name] = self._since.get(name, 0) + 1 if now else 0
        return self._since[name] >= PATIENCE

    def _once(self, name: str, line: str) -> None:
        if name not in self.said:
            self.said[name] = line
            self.say(f"{self.title}: {line}")


def refuse_broken_weights(title: str, weights: Mapping[str, torch.Tensor]) -> None:
    """RunError where a weight is NaN or infinite: such a model is never written."""
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise RunError(
            f"train: {title}: weights must be finite, got NaN or inf in {len(broken)} of "
            f"{len(weights)}, first in {broken[0]}; lower its learning_rate"
        )
