"""The policy's loss inside a stage: what a second pass over the same rollouts keeps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elva.training import objective
from tests.elva.stages import POLICY, Stage


def test_a_second_pass_keeps_advantages_and_old_log_probs_of_the_first(
    corpus: Path, released: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's rule for num_iterations; one micro-batch a step, so that each call is a pass."""
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    inner = objective.policy_loss

    def watched(new: Tensor, old: Tensor, reference: Any, gains: Tensor, mask: Tensor, **how: Any):
        calls.append((new.detach().clone(), old.clone(), gains.clone(), mask.clone()))
        return inner(new, old, reference, gains, mask, **how)

    monkeypatch.setattr(objective, "policy_loss", watched)
    stage = replace(POLICY, num_iterations=2, warmup_ratio=0.0)
    Stage(released("tied"), corpus, stage, tmp_path, steps=4).train()
    assert len(calls) == 4
    first, second = calls[2], calls[3]  # after the learning rate has left 0
    assert torch.equal(first[0], first[1])  # the first ratio is exactly 1
    assert torch.equal(second[1][second[3]], first[0][first[3]])
    assert torch.equal(second[2], first[2]) and first[2].abs().max() > 0.1
    assert (second[0] - first[0])[first[3]].abs().max() > 1e-4  # on weights that have moved
    assert not torch.equal(calls[1][2], first[2])  # other rollouts, other advantages
