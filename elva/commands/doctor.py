"""`elva doctor`: what is installed here, and what of the kernels can run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version
from typing import Any

from packaging.requirements import Requirement

import elva_kernels

PACKAGES = ("elva", "transformers", "accelerate", "peft", "numpy")


def doctor() -> dict[str, Any]:
    """`elva_kernels.doctor()` with more versions and the extras: each one's missing packages."""
    found = dataclasses.asdict(elva_kernels.doctor())
    found["versions"] |= {name: _version(name) for name in PACKAGES}
    extras = metadata("elva").get_all("Provides-Extra") or []
    found["extras"] = {extra: sorted(set(_missing(extra))) for extra in extras}
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What `doctor` found, for a terminal."""
    fields = {f.name: found[f.name] for f in dataclasses.fields(elva_kernels.Report)}
    yield from str(elva_kernels.Report(**fields)).splitlines()
    for extra, missing in found["extras"].items():
        advice = f"pip install 'elva[{extra}]' (lacks {', '.join(missing)})"
        yield f"extra {extra}: {advice if missing else 'installed'}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _missing(extra: str) -> Iterator[str]:
    """Requirements of an extra that are absent or of another version, through nested extras."""
    for text in metadata("elva").get_all("Requires-Dist") or []:
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            continue  # of every installation, or of another system
        if not needed.marker.evaluate({"extra": extra}):
            continue
        if needed.name == "elva":
            for inner in needed.extras:
                yield from _missing(inner)
        elif (at := _version(needed.name)) is None or not needed.specifier.contains(at, True):
            yield f"{needed.name}{needed.specifier}"
