"""What the files of a run must hold to be reported: read once, with one line for what they lack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from elva.errors import RunError
from elva.run import Run

NUMBER = (int, float, type(None))
ANY = "*"

WORDS = {int: "a number", float: "a number", str: "a text", type(None): "null"}
_AGAIN = {
    "evaluation.json": "elva evaluate writes it again",
    "stage.json": "put a copy of it back",
    "run.json": "put a copy of it back, or remove it",
}

_SAMPLE = {
    "id": str, "query": (str, type(None)), "positives": [str], "rank": int, "top": [{"id": str}],
}  # fmt: skip
SHAPES: Mapping[str, Any] = {
    "evaluation.json": {
        "split?": str,
        "figures?": {
            "minimal_pair_task?": str, "grain_distance?": {ANY: NUMBER},
            "grain_reading?": {ANY: {"accuracy": NUMBER, "chance": NUMBER, "asked": NUMBER}},
            ANY: NUMBER,
        },
        "samples?": {ANY: [_SAMPLE]},
        "grain_distances?": {ANY: [NUMBER]},
        "pushes?": {
            "task": str, "queries": int, "temperature": float, "infonce": [NUMBER],
            "reward": [NUMBER],
        },
        "plane?": {
            "explained": [float], "points": [{"x": NUMBER, "y": NUMBER, "grains": {ANY: str}}],
        },
    },
    "stage.json": {"steps?": NUMBER, "seconds?": NUMBER},
    "run.json": {"versions?": {ANY: str}, "machine?": {}},
}  # fmt: skip
"""File -> its fields; with ? those that may be missing or null, with * every other one. Types stand
for values, a list of one for lists. Older runs lack samples' rewards, the pushes and the plane."""


def read(run: Run, file: str, stage: str | None = None) -> dict[str, Any]:
    """A file of a run, or of a stage or control of it; empty where it is not there. A NaN is None.

    Raises:
        RunError: it is torn, or of another layout.
    """
    path = (run.directory if stage is None else run.stage(stage)) / file
    if not path.is_file():
        return {}
    again = _AGAIN[file]
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise RunError(f"{path}: must be JSON, got {error}; {again}") from None
    if fault := _misfit(found, SHAPES[file]):
        raise RunError(f"{path}: {fault}; damaged, or of another version: {again}")
    return found


def _misfit(value: Any, shape: Any, at: str = "it") -> str:
    """Where a value is not of its shape; empty where it is."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} must be a list, got {_short(value)}"
        every = (_misfit(one, shape[0], f"{at}[{i}]") for i, one in enumerate(value))
        return next(filter(None, every), "")
    if not isinstance(shape, dict):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if fits and not isinstance(value, bool):
            return ""
        words = " or ".join(dict.fromkeys(WORDS[kind] for kind in kinds))
        return f"{at} must be {words}, got {_short(value)}"
    if not isinstance(value, dict):
        return f"{at} must be an object, got {_short(value)}"
    inside = at.removeprefix("it") + "." if at != "it" else ""
    for name, one in shape.items():
        known = value.get(name.removesuffix("?"))
        if name == ANY or (name.endswith("?") and not known):
            continue
        if name not in value and not name.endswith("?"):
            return f"{at} must have {name!r}, got none"
        if fault := _misfit(known, one, inside + name.removesuffix("?")):
            return fault
    named = {name.removesuffix("?") for name in shape}
    others = (_misfit(v, shape[ANY], inside + k) for k, v in value.items()
              if ANY in shape and k not in named)  # fmt: skip
    return next(filter(None, others), "")


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 40 else words[:40] + "…"
