"""Whatever happens to a checkpoint: the newest whole one is found, a damaged one is named."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from elva import checkpoint, files

WEIGHTS, STATE, MANIFEST = "weights.safetensors", checkpoint.STATE, files.MANIFEST


def groups(step: int) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(step)
    return {
        "weights": {"a": torch.randn(64, 32, generator=draw), "b": torch.full((), float(step))},
        "optimizer": {"a|exp_avg": torch.randn(64, 32, generator=draw, dtype=torch.float64)},
    }


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "stage-2", step, groups(step), {"elapsed": step / 3})
    return tmp_path / "stage-2"


def is_of(directory: Path | None, step: int) -> bool:
    assert directory is not None and checkpoint.step_of(directory) == step
    found, state = checkpoint.load(directory)
    wanted = groups(step)
    return state == {"elapsed": step / 3} and all(
        found[group].keys() == wanted[group].keys()
        and all(torch.equal(found[group][name], value) for name, value in wanted[group].items())
        and all(found[group][name].dtype == value.dtype for name, value in wanted[group].items())
        for group in wanted
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def forge(directory: Path, name: str, content: bytes | None) -> None:
    """Change a file (None: take it away) and make the manifest agree."""
    manifest = json.loads((directory / MANIFEST).read_text())
    del manifest[name]
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
        manifest[name] = {"bytes": len(content), "sha256": files.sha256(directory / name)}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def strike(directory: Path, name: str) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    del manifest[name]
    (directory / MANIFEST).write_text(json.dumps(manifest))


def rename(directory: Path, name: str, other: str) -> None:
    text = (directory / MANIFEST).read_text()
    (directory / MANIFEST).write_text(text.replace(f'"{name}"', f'"{other}"'))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte of the weights": (lambda d: flip(d / WEIGHTS), f"{WEIGHTS} has another"),
    "a flipped byte of the state": (lambda d: flip(d / STATE), f"{STATE} has another"),
    "a cut file": (lambda d: cut(d / "optimizer.safetensors"), "optimizer.safetensors has"),
    "a missing file": (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), f"no readable {MANIFEST}"),
    "a cut manifest": (lambda d: cut(d / MANIFEST), f"no readable {MANIFEST}"),
    "a manifest that is a list": (lambda d: (d / MANIFEST).write_text("[]"), "no readable"),
    "a manifest of nothing": (lambda d: (d / MANIFEST).write_text('{"a": 1}'), "no readable"),
    "a manifest that forgets the weights": (
        lambda d: forge(d, WEIGHTS, None), f"{WEIGHTS} is missing",
    ),
    "a manifest that agrees with a cut file": (
        lambda d: forge(d, WEIGHTS, (d / WEIGHTS).read_bytes()[:40]), "SafetensorError",
    ),
    "the state of another step": (
        lambda d: forge(d, STATE, (d / STATE).read_bytes().replace(b'"step": 3', b'"step": 2')),
        f"{STATE} is of step 2",
    ),
    "a state that is a list": (lambda d: forge(d, STATE, b"[]"), "must be a mapping"),
    "a manifest that strikes the optimizer out": (
        lambda d: strike(d, "optimizer.safetensors"), "optimizer.safetensors is not listed",
    ),
    "a file that nobody listed": (
        lambda d: shutil.copy(d / WEIGHTS, d / "evil.safetensors"), "evil.safetensors is not",
    ),
    "an empty manifest": (lambda d: (d / MANIFEST).write_text("{}"), "is not listed"),
    "a manifest that leads out": (
        lambda d: rename(d, "state.json", "../checkpoint-00000002/state.json"), "no readable",
    ),
    "a manifest nested without end": (
        lambda d: (d / MANIFEST).write_text("[" * 100_000), "no readable",
    ),
    "a manifest of null": (lambda d: (d / MANIFEST).write_text("null"), "no readable"),
    "a manifest of a number without end": (
        lambda d: (d / MANIFEST).write_text('{"x": {"bytes": ' + "9" * 5000 + "}}"), "no readable",
    ),
    "a manifest that is a pipe": (
        lambda d: ((d / MANIFEST).unlink(), os.mkfifo(d / MANIFEST)), "no readable",
    ),
    "a group that leads out": (
        lambda d: forge(
            d, STATE, (d / STATE).read_bytes().replace(b'"weights"', b'"../../weights"')
        ),
        "must be a word of letters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_named_and_passed_over(damage: str, stage: Path) -> None:
    spoil, why = DAMAGES[damage]
    lines: list[str] = []
    assert is_of(checkpoint.newest(stage, lines.append), 3) and lines == []
    spoil(stage / "checkpoint-00000003")
    assert is_of(checkpoint.newest(stage, lines.append), 2)
    assert lines[0].startswith("stage-2/checkpoint-00000003: must be as it was written")
    assert why in lines[0] and all("\n" not in line for line in lines)
    assert lines[1:] == ["stage-2: goes on from checkpoint-00000002"]
    checkpoint.save(stage, 3, groups(3), {"elapsed": 1.0})  # comes to the same step again
    assert is_of(checkpoint.newest(stage), 3)


@pytest.mark.parametrize("bits", [(0, 3), pytest.param(range(8), marks=pytest.mark.thorough)])
def test_no_flipped_bit_of_a_manifest_is_passed_over_or_raises(bits, stage: Path) -> None:
    place = stage / "checkpoint-00000003" / MANIFEST
    content = place.read_bytes()
    for at in range(len(content)):
        for bit in bits:
            place.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            # A blank may become another blank; whatever else changes is named.
            same = content[at : at + 1].isspace() and place.read_bytes().split() == content.split()
            assert same or files.fault(place.parent) is not None, (at, bit)
    place.write_bytes(content)
    assert is_of(checkpoint.newest(stage), 3)


def test_none_whole_is_the_stages_start_and_said(stage: Path) -> None:
    lines: list[str] = []
    assert checkpoint.newest(stage.parent / "absent", lines.append) is None and lines == []
    for directory in stage.iterdir():
        flip(directory / WEIGHTS)
    assert checkpoint.newest(stage, lines.append) is None
    assert len(lines) == 4 and lines[3] == "stage-2: goes on from its start, no checkpoint is whole"


def test_the_latest_are_kept_by_their_step_and_not_by_their_name(stage: Path) -> None:
    long = checkpoint.save(stage, 123_456_789, groups(4), {})  # more digits than a name is given
    shutil.copytree(long, stage / "checkpoint-00000005.partial")
    (stage / "checkpoint-mine").mkdir()
    assert checkpoint.newest(stage) == long
    checkpoint.prune(stage, keep=2)
    kept = {"checkpoint-00000003", long.name, "checkpoint-00000005.partial", "checkpoint-mine"}
    assert {p.name for p in stage.iterdir()} == kept
    checkpoint.prune(stage, keep=0)
    assert {p.name for p in stage.iterdir()} == {"checkpoint-mine"}


CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir")


class Fails:
    """The n-th of the calls by which a checkpoint reaches the disk raises an error; safetensors'
    own, in Rust, hides the system's number in its text."""

    def __init__(self, patch: pytest.MonkeyPatch, nth: int, code: int) -> None:
        self.calls, self.nth, self.code = 0, nth, code
        for name in CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(checkpoint, "save_file", self._counted(checkpoint.save_file, rust=True))

    def _counted(self, real: Callable[..., object], rust: bool = False) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.calls == self.nth and rust:
                Path(str(args[1])).write_bytes(b"half")
                words = f"I/O error: {os.strerror(self.code)} (os error {self.code})"
                raise SafetensorError(f"Error while serializing: {words}")
            if self.calls == self.nth:
                raise OSError(self.code, os.strerror(self.code), "disk")
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_failed_write_of_any_kind_leaves_the_old_ones(code: int, stage: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in stage.rglob("*")}
    new = stage / "checkpoint-00000004"
    refused = 0
    for nth in count(1):
        with pytest.MonkeyPatch.context() as patch:
            fails = Fails(patch, nth, code)
            try:
                checkpoint.save(stage, 4, groups(4), {"elapsed": 4 / 3})
            except OSError as error:
                assert error.errno == code, nth
                refused += 1
        if new.exists():
            assert is_of(checkpoint.newest(stage), 4), nth
            shutil.rmtree(new)
        kept = {p: p.stat().st_mtime_ns for p in stage.rglob("*")}
        assert kept == before and is_of(checkpoint.newest(stage), 3), nth
        if fails.calls < nth:
            break  # there is no n-th: all of them have failed once
    assert nth > 20 and refused >= nth - 4, "calls that need not succeed: mkdir of what is there"
