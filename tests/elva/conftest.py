"""A corpus of a few hundred emoji and a model that trains in seconds, each made once a session."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml

from elva.data import emoji, load
from elva.recipe import Recipe
from elva.recipes import RECIPES, resolve
from tests.elva import standin, warm

if TYPE_CHECKING:
    from playwright.sync_api import Browser


class Training(NamedTuple):
    process: subprocess.Popen[bytes]
    directory: Path


KEPT = 260  # of each kind: enough for 50 hard and 50 random negatives


def number(identifier: str) -> int:
    """The picture that an id of the emoji corpus belongs to (names are 100,000 on)."""
    return int(identifier.split(":")[1]) % 100_000


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def drawn(_cache_of_the_session: None) -> Path:
    """The embedded corpus as a whole."""
    return emoji.cached()


@pytest.fixture(scope="session")
def corpus(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the embedded corpus, in its own layout."""
    root = tmp_path_factory.mktemp("corpus") / "emoji"
    root.mkdir()
    (root / "mbeir_images").symlink_to(drawn / "mbeir_images")
    kept_queries: set[str] = set()
    for path in sorted(drawn.rglob("*")):
        if not path.is_file() or path.suffix == ".png" or "task4" in path.name:
            continue
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if "query" in path.parts[-3:]:
            rows = [json.loads(line) for line in lines]
            rows = [r for r in rows if number(r["pos_cand_list"][0]) < KEPT]
            for row in rows:
                row["neg_cand_list"] = [n for n in row["neg_cand_list"] if number(n) < KEPT]
            kept_queries.update(r["qid"] for r in rows)
            lines = [json.dumps(row) + "\n" for row in rows]
        elif "cand_pool" in path.parts:
            lines = [line for line in lines if number(json.loads(line)["did"]) < KEPT]
        elif "qrels" in path.parts:
            lines = [line for line in lines if number(line.split()[2]) < KEPT]
        elif path.name == "manifest.json":
            continue
        write(root / path.relative_to(drawn), lines)
    for name in ("grains.jsonl", "minimal_pairs.jsonl"):
        rows = [json.loads(line) for line in (root / name).read_text("utf-8").splitlines()]
        rows = [r for r in rows if r.get("qid", r.get("did")) in kept_queries]
        for row in rows:
            if "candidates" in row:
                row["candidates"] = [c for c in row["candidates"] if number(c) < KEPT]
        write(root / name, [json.dumps(row) + "\n" for row in rows])
    assert load(root, split="train").queries and load(root, split="test").queries
    return root


def small(data: str) -> dict[str, Any]:
    """What makes the smoke recipe a run of seconds: a model of one layer, few steps, a checkpoint
    after each."""
    changes = {"batch_size": 8, "data": data, "refresh_steps": 2}
    steps = {"0": 80, "1": 3, "2": 4, "3": 4}
    return {
        "model": {"scratch": {
            "hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2, "vocabulary": 600,
            "vision_size": 32, "vision_layers": 1, "vision_heads": 2,
        }},
        "stages": {
            name: {"steps": n, **changes, **({"learning_rate": 5e-3} if name == "0" else {})}
            for name, n in steps.items()
        },  # stage 0 long enough that summaries begin to end in [RET]
        "controls": {name: {"steps": 2, **changes} for name in RECIPES["smoke"].controls},
        "save_seconds": 0.0,
        "evaluate_limit": 24,
    }  # fmt: skip


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="session")
def recipe_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke recipe on the small corpus with a model of one layer, a checkpoint every step."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(small(str(corpus))))
    return path


@pytest.fixture(scope="session")
def released(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of the released structure by their heads, "tied" or "untied"."""
    root, made = tmp_path_factory.mktemp("released"), {}

    def checkpoint(heads: str) -> Path:
        if heads not in made:
            made[heads] = standin.write(root / heads, corpus, tied=heads == "tied")
        return made[heads]

    return checkpoint


@pytest.fixture(scope="session")
def recipe(recipe_file: Path) -> Recipe:
    return resolve("smoke", recipe_file)


@pytest.fixture(scope="session")
def start(
    _cache_of_the_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., BaseProcess]:
    """Begins `elva WORDS` in a warm process of its own, which may be killed. `finished` is one as a
    user starts it."""
    return warm.Server(tmp_path_factory.mktemp("server")).start


@pytest.fixture(scope="session")
def training(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """`elva train` of that recipe as a user starts it, while other tests run."""
    directory = tmp_path_factory.mktemp("runs")
    words = ("train", "--recipe", "smoke", "--config", str(recipe_file), "--output", "whole")
    with (directory / "printed").open("w") as printed, subprocess.Popen(
        [sys.executable, "-m", "elva", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=printed, stderr=printed, cwd=directory,
    ) as process:  # fmt: skip
        yield Training(process, directory)
        process.kill()


@pytest.fixture(scope="session", autouse=True)
def _training_begins_early(request: pytest.FixtureRequest) -> None:
    if any("finished" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("training")


@pytest.fixture(scope="session")
def finished(training: Training) -> Path:
    """The directory of that run, which nobody disturbed."""
    code, printed = training.process.wait(), (training.directory / "printed").read_text()
    assert code == 0 and "t→i" in printed, printed
    return training.directory / "whole"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Headless Chromium with a user's directory of its own.

    Of a module, not of the session: while playwright's synchronous interface is up, asyncio calls
    this thread's loop running, and no other test could run one. A start takes about a second.
    """
    screens = importlib.import_module("benchmarks.screens")
    if screens.installed_chromium() is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with screens.chromium() as started:
        yield started
