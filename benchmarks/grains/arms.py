"""The arms: what each trains, read from arms.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from elva.recipe import StageConfig
from elva.settings import Count, Name, Text, Whole, build, read_yaml

FILE = Path(__file__).with_name("arms.yaml")


@dataclass(frozen=True)
class Described:
    """What arms.yaml says of an arm beside its stage."""

    group: Literal["control", "paper", "ours", "graded"]
    what: Text  # in a few words, for the table
    of: Name | None = None  # the arm whose stage it changes; None: the base
    draws: Whole = 0  # the seed of its summaries, apart from the data's
    pairs: Count = 1  # pairs of start and seed a start
    against: tuple[Name, ...] = ()  # the arms that the page compares it with


@dataclass(frozen=True)
class Arm:
    """One way to train stage 3.

    Args:
        stage: None for an arm of no steps, the start itself.
    """

    name: str
    described: Described
    stage: StageConfig | None


@cache
def arms(file: Path = FILE) -> Mapping[str, Arm]:
    """Every arm, by name, in the file's order."""
    data, places = read_yaml(file)
    stages: dict[str, Mapping[str, Any] | None] = {}
    found: dict[str, Arm] = {}
    for name, entry in data["arms"].items():
        build(Name, name, places, "arms")  # of a recipe, which a killed trial is read from again
        entry = dict(entry)
        changes = entry.pop("stage", {})
        described = build(Described, entry, places, f"arms.{name}")
        base = data["base"] if described.of is None else stages[described.of]
        stages[name] = None if changes is None or base is None else merged(base, changes)
        stage = stages[name]
        made = None if stage is None else build(StageConfig, stage, places, f"arms.{name}.stage")
        for field, rule in () if made is None else made.contradictions():
            places.refuse(f"arms.{name}.stage.{field}", f"must {rule}")
        found[name] = Arm(name, described, made)
    for name, arm in found.items():
        for i, other in enumerate(arm.described.against):
            if other not in found:
                places.refuse(f"arms.{name}.against.{i}", "must be an arm of the file", other)
    return found


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's fields, some changed; of the settings that are groups of fields those named."""
    nested = {"negatives", "reward"}
    out = dict(base)
    for key, value in changes.items():
        out[key] = {**out.get(key, {}), **value} if key in nested else value
    return out
