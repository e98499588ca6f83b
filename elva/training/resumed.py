"""What a stage goes on with: a checkpoint that anybody could have written, held to what it must be.

Its manifest has been compared with its files by then; here its numbers are typed and bounded, and
its tensors are those of the model that goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from torch import Tensor, nn

from elva import checkpoint
from elva.errors import RunError, UserError
from elva.settings import Number, Places, Text, Weight, Whole, between, build
from elva.training.states import trained

Step = Annotated[int, between(0, 2**53)]


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: of which step, and how many came after it."""

    value: Number | None
    step: Step
    worse: Whole


@dataclass(frozen=True)
class Watched:
    """What the guards have seen: steps in a row, and what has been said."""

    since: Mapping[str, Whole]
    said: Mapping[str, Text]


@dataclass(frozen=True)
class Facts:
    """What `state.json` says of a stage."""

    step: Step
    elapsed: Weight
    best: Best
    guards: Watched | None = None


class Restored(NamedTuple):
    """A checkpoint that fits."""

    groups: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def restored(path: Path, model: nn.Module) -> Restored:
    """A checkpoint of a model, before any of it is put back.

    Raises:
        RunError: it is of another model, or says what no stage writes.
    """
    with _refused(path):
        groups, facts = checkpoint.load(path)
        build(Facts, facts, Places(checkpoint.STATE))
        there = trained(model)
        _check_weights(groups, there)
        _check_moments(groups, there)
    return Restored(groups, facts)


def best_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Those of a stage's best evaluation.

    Raises:
        RunError: they are damaged, or of another model.
    """
    groups, _ = checkpoint.load_whole(path)
    with _refused(path):
        _check_weights(groups, trained(model))
    return groups["weights"]


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise RunError(
            f"{path}: must be a checkpoint of this stage, got {error}; delete it, and --resume "
            "goes on from the one before"
        ) from None


def _check_weights(
    groups: Mapping[str, Mapping[str, Tensor]], there: Mapping[str, nn.Parameter]
) -> None:
    """Refuse weights of other names or shapes than the model's."""
    found = groups.get("weights", {})
    if apart := there.keys() ^ found.keys():
        raise UserError(f"weights of other names, {min(apart)!r} first")
    for name, value in found.items():
        _check_shape(name, value, there[name])


def _check_moments(
    groups: Mapping[str, Mapping[str, Tensor]], there: Mapping[str, nn.Parameter]
) -> None:
    """Refuse what an optimiser does not keep of the model."""
    if "optimizer" not in groups:
        raise UserError("no optimizer")
    for name, value in groups["optimizer"].items():
        parameter, _, key = name.rpartition("|")
        if parameter not in there:
            raise UserError(f"moments of {parameter!r}, which does not train")
        if key != "step":
            _check_shape(name, value, there[parameter])
        elif value.numel() != 1:
            raise UserError(f"steps of {parameter!r} in {value.numel()} numbers")


def _check_shape(name: str, value: Tensor, parameter: nn.Parameter) -> None:
    if value.shape != parameter.shape:
        raise UserError(f"{name!r} of {tuple(value.shape)}, not {tuple(parameter.shape)}")
