"""A run directory: the one place where training, evaluation, search and report meet.

recipe.yaml  run.json  metrics.jsonl  report.html
status.json                 where its training stands, while it lasts
start/                      the checkpoint a model from scratch began with
stage-2/checkpoint-*/       inside a stage, verified on resume
stage-2/model/              what the stage ended with: an ordinary checkpoint, or an adapter and
                            where the checkpoint lies that it stands on (`elva export` merges them)
stage-2/stage.json          steps and seconds it took
stage-2/evaluation.json     what it retrieves
control-infonce/...         the same, for what stage 3 is compared with
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import yaml

from elva import __version__
from elva.data import emoji
from elva.errors import RunError
from elva.files import PARTIAL, append_text, is_whole, make_directory, write_text
from elva.recipe import Recipe
from elva.recipes import read_recipe

EVALUATED = ("test", "val")
"""Splits that stages are evaluated on, the first that there is."""

CHOSEN_ON = ("val", "test")
"""Likewise inside a stage, where the best weights are looked for: if it can be, not on test."""

LOCK = ".lock"
"""Held by the process that trains."""


LOOKS = (0.0, 0.02, 0.1, 0.3)
"""Ours: seconds before each try to take it; who asks whether it is held has it for a moment."""


class Run:
    """Paths and small files of one run. Nothing is overwritten but by `--resume` of the same
    recipe."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory, self.recipe = directory, recipe

    @classmethod
    def create(cls, directory: Path | None, recipe: Recipe) -> Run:
        """Start a run in an absent or empty directory (a fresh dated one under runs/ for None)."""
        if directory is None:
            directory = _dated(Path("runs"), recipe.name)
        _check_empty(directory)  # before anything is made there
        make_directory(directory)
        run = cls(directory, recipe)
        with run.locked():
            _check_empty(directory)  # nobody else begins one from here on
            write_text(directory / "recipe.yaml", yaml.safe_dump(asdict(recipe), sort_keys=False))
            write_text(directory / "run.json", json.dumps(_facts(recipe), indent=1))
        return run

    @classmethod
    def open(cls, directory: Path) -> Run:
        """An existing run."""
        file = directory / "recipe.yaml"
        if not file.is_file():
            raise RunError(
                f"{directory}: must hold a run, got no recipe.yaml; start one with elva train"
            )
        return cls(directory, read_recipe(file))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training it at the same time; the lock ends with the process.

        Raises:
            RunError: one is at work.
        """
        with open(self.directory / LOCK, "w") as lock:
            if not any(_taken(lock, fcntl.LOCK_EX, wait) for wait in LOOKS):
                raise RunError(
                    f"{self.directory}: must be trained by one process, got a second; wait for the "
                    "first or choose another --output"
                )
            yield

    @property
    def is_training(self) -> bool:
        """Whether a process on this machine trains it now."""
        try:
            with open(self.directory / LOCK) as lock:
                return not _taken(lock, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    @property
    def status_file(self) -> Path:
        """Where the training stands while it lasts, and where it stopped if it did not end."""
        return self.directory / "status.json"

    # -- stages ------------------------------------------------------------------------------------

    def stage(self, name: str) -> Path:
        """The directory of a stage ("2") or a control ("infonce")."""
        return self.directory / (
            f"stage-{name}" if name in self.recipe.stages else f"control-{name}"
        )

    def title(self, name: str) -> str:
        """ "stage 2" or "control infonce"."""
        return title_of(self.stage(name))

    @property
    def start(self) -> Path:
        return self.directory / "start"

    def model(self, name: str) -> Path:
        return self.stage(name) / "model"

    def is_trained(self, name: str) -> bool:
        return is_whole(self.model(name)) and (self.stage(name) / "stage.json").is_file()

    @property
    def trained(self) -> list[str]:
        """Names of the finished stages and controls, in order."""
        names = [*self.recipe.stages, *self.recipe.controls]
        return [n for n in names if self.is_trained(n)]

    def answering(self, stage: str | None = None) -> str:
        """The stage or control that is asked: the named one, else the last trained stage."""
        if stage is not None:
            if stage in (*self.recipe.stages, *self.recipe.controls) and self.is_trained(stage):
                return stage
            raise RunError(
                f"{self.directory}: stage must be trained, got {stage!r}; "
                f"trained so far: {', '.join(self.trained) or 'none'}"
            )
        for name in reversed(list(self.recipe.stages)):
            if self.is_trained(name):
                return name
        raise RunError(
            f"{self.directory}: must hold a trained stage, got none; "
            "finish it with elva train --resume"
        )

    def source(self, data: str) -> Path:
        """Where a stage's data lies: the embedded corpus, built on first use, or a directory."""
        return source_of(self.recipe, data)

    def read(self, name: str, file: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.stage(name) / file).read_text(encoding="utf-8"))
        return data

    def write(self, name: str, file: str, data: Mapping[str, Any]) -> None:
        self.stage(name).mkdir(parents=True, exist_ok=True)
        write_text(self.stage(name) / file, json.dumps(data))

    # -- metrics -----------------------------------------------------------------------------------

    @property
    def metrics_file(self) -> Path:
        return self.directory / "metrics.jsonl"

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line; a NaN is written as null, for strict readers."""
        clean = {k: v if v == v and abs(v) != float("inf") else None for k, v in values.items()}
        line = json.dumps({"stage": stage, "step": step, **clean})
        append_text(self.metrics_file, f"{line}\n")

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The lines of a stage, or all: their numbers, None for NaN; torn lines are left out."""
        if not self.metrics_file.is_file():
            return []
        entries = map(metrics_line, self.metrics_file.read_bytes().split(b"\n"))
        return [one for one in entries if one is not None and stage in (None, one["stage"])]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop a stage's lines beyond a step: a resumed stage writes them again."""
        kept = [e for e in self.metrics() if e["stage"] != stage or e["step"] <= step]
        if self.metrics_file.exists():
            write_text(self.metrics_file, "".join(json.dumps(e) + "\n" for e in kept))


def _check_empty(directory: Path) -> None:
    """RunError where a run cannot begin: anything lies there but what one that was killed at its
    start may have left."""
    left = ("recipe.yaml" + PARTIAL, LOCK)
    if directory.exists() and (
        not directory.is_dir() or any(p.name not in left for p in directory.iterdir())
    ):
        raise RunError(
            f"{directory}: must be empty to start a run in; "
            "pass --resume to go on with it or choose another --output"
        )


def metrics_line(line: bytes) -> dict[str, Any] | None:
    """Stage, step and numbers of a line of metrics.jsonl, None for NaN; None for one that was torn
    by a kill."""
    try:
        entry = json.loads(line, parse_constant=lambda _: None)
        stage, step = entry["stage"], entry["step"]
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(stage, str) or not isinstance(step, int):
        return None
    return {k: v for k, v in entry.items() if k == "stage" or _is_number(v)}


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _taken(lock: IO[str], kind: int, wait: float = 0.0) -> bool:
    """Whether a lock on an open file could be taken, after some seconds."""
    time.sleep(wait)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def title_of(directory: Path) -> str:
    """ "stage 2" or "control infonce", as the directory of one is called."""
    return directory.name.replace("-", " ", 1)


def source_of(recipe: Recipe, data: str) -> Path:
    """Where a stage's data lies: the embedded corpus, built on first use, or a directory."""
    if data == "emoji":
        return emoji.cached(recipe.model.scratch.image_size)
    if not Path(data).is_dir():
        raise RunError(
            f"{data}: must be a directory in M-BEIR's layout; see elva data emoji --help"
        )
    return Path(data)


def evaluate_split(root: Path, among: Sequence[str] = EVALUATED) -> str | None:
    """The first of some splits that some data have; None where there is none."""
    there = (s for s in among if any((root / "query" / s).glob(f"mbeir_*_{s}.jsonl")))
    return next(there, None)


def evaluated(recipe: Recipe) -> tuple[Path, str | None]:
    """The data that every stage is evaluated on, and their split: those of the last stage whose
    data have one; mined data, which are training queries alone, have none."""
    data = dict.fromkeys(stage.data for stage in reversed([*recipe.stages.values()]))
    roots = [source_of(recipe, one) for one in data]
    found = ((root, split) for root in roots if (split := evaluate_split(root)))
    return next(found, (roots[0], None))


def _dated(parent: Path, name: str) -> Path:
    stamp = f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
    candidate, k = parent / stamp, 2
    while candidate.exists():
        candidate, k = parent / f"{stamp}-{k}", k + 1
    return candidate


def _facts(recipe: Recipe) -> dict[str, Any]:
    packages = ("torch", "transformers", "accelerate", "peft", "numpy")
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {
            "elva": __version__,
            "python": platform.python_version(),
            **{p: version(p) for p in packages},
        },
        "commit": _commit(),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
    }


def _commit() -> str | None:
    """The source's commit, where the package runs from a checkout."""
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or no git: the versions above say what ran
    return out.stdout.strip()
