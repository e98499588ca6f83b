"""One trial: an arm from a start, by one seed of the data, and its figures as a file."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import report
from benchmarks.grains.arms import Arm, arms
from benchmarks.grains.measure import DIRECTIONS, Corpus, embed, figures
from elva.cli.console import quiet_libraries
from elva.commands.train import train
from elva.data import emoji
from elva.files import write_text
from elva.model.retriever import Retriever
from elva.progress import SILENT
from elva.recipe import Recipe, StageConfig
from elva.recipes import RECIPES
from elva.run import Run
from elva.settings import Places, build

RESULTS = report.RESULTS / "grains"
COSTS = RESULTS / "costs.json"
ENTITIES = RESULTS / "entities.json"
STARTS = range(5)
OTHER_DRAWS = 1000  # added to the seed of the summaries, times the arm's `draws`

PLATEAU = replace(
    RECIPES["emoji"].stages["2"], eval_steps=100, load_best_model_at_end=True,
    metric_for_best_model="t2i_recall_at_1",
)  # fmt: skip
"""Stage 2, with its best weights by val."""


def recipe_of_start(seed: int) -> Recipe:
    """Stages 0 to 2 of the emoji recipe, the last of them to its plateau."""
    known = RECIPES["emoji"]
    stages = {name: known.stages[name] for name in ("0", "1")} | {"2": PLATEAU}
    return replace(
        known, name="grains-start", stages=stages, controls={}, seed=seed, evaluate=False
    )


@dataclass(frozen=True)
class Trial:
    """An arm from a start.

    Args:
        place: the laboratory's directory.
        start: the seed of the model that it starts from.
        seed: of the order of its data.
    """

    place: Path
    arm: str
    start: int
    seed: int

    @property
    def known(self) -> Arm:
        return arms()[self.arm]

    @property
    def label(self) -> str:
        return f"{self.arm} from start {self.start}, seed {self.seed}"

    @property
    def file(self) -> Path:
        """Its figures, which are kept in the repository."""
        return RESULTS / self.arm / f"{self.start}-{self.seed}.json"

    @property
    def embeddings(self) -> Path:
        """What they were computed from, which is not."""
        return self.place / "embeddings" / self.arm / f"{self.start}-{self.seed}.safetensors"

    @property
    def is_done(self) -> bool:
        """Whether its figures are those of the arm as it is described now."""
        if not self.file.is_file():
            return False
        stage = self.read()["stage"]  # a field that it lacks has since been added
        made = None if stage is None else build(StageConfig, stage, Places("trial"))
        return bool(made == self.known.stage)

    def read(self) -> dict[str, Any]:
        """Its figures."""
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return found

    def run(self) -> float:
        """Train, embed, measure on val and write; seconds of it."""
        began = time.perf_counter()
        stage = self.known.stage
        start = Run.open(self.place / "starts" / str(self.start))
        retriever, seconds, flags = self._trained(start, stage)
        retriever.freeze_vision(True, self.place / "features")
        retriever.plain.eval()
        corpus = corpus_of(start.recipe)
        embedded = embed(retriever, corpus)
        self.embeddings.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: rows.contiguous() for name, rows in embedded.items()}, self.embeddings)
        result = {
            "arm": self.arm, "start": self.start, "seed": self.seed, "stage": self._stage(),
            "seconds": round(seconds, 1), "flags": flags, "machine": report.machine(),
            "val": rounded(figures(embedded, corpus, "val")),
        }  # fmt: skip
        if stage is None:
            result["curve"] = rounded(curve(start))
        self.write(result)
        shutil.rmtree(self._directory, ignore_errors=True)
        return time.perf_counter() - began

    def cost(self) -> tuple[float, float | None]:
        """Seconds to train it, from reading the data to the model's files, and the share of its
        answers that are first already where its reward looks, None without one; nothing is kept."""
        stage, start = self.known.stage, Run.open(self.place / "starts" / str(self.start))
        assert stage is not None
        shutil.rmtree(self._directory, ignore_errors=True)
        began = time.perf_counter()
        self._trained(start, stage)
        seconds = time.perf_counter() - began
        lines = Run.open(self._directory).metrics("3")
        first = [line["rank_1"] for line in lines if "rank_1" in line]
        shutil.rmtree(self._directory)
        return seconds, fmean(first) if first else None

    def measure(self, split: str) -> None:
        """Put the figures of a split into its file, from the embeddings that were kept."""
        corpus = corpus_of(recipe_of_start(self.start))
        found = rounded(figures(load_file(self.embeddings), corpus, split))
        self.write(self.read() | {split: found})

    def write(self, result: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(result) + "\n")

    def _trained(
        self, start: Run, stage: StageConfig | None
    ) -> tuple[Retriever, float, dict[str, str]]:
        if stage is None:
            return Retriever.load(start.model("2")), 0.0, {}
        recipe = Recipe(
            name=f"grains-{self.arm}",
            model=replace(start.recipe.model, features=str(self.place / "features")),
            stages={"3": stage},
            seed=self.seed + OTHER_DRAWS * self.known.described.draws,
            data_seed=self.seed,
            evaluate=False,
            save_seconds=120.0,
        )
        run = self._open(recipe)
        train(run, SILENT, stages=["3"], start_from=start)
        done = run.read("3", "stage.json")
        return Retriever.load(run.model("3")), done["seconds"], done["flags"]

    def _open(self, recipe: Recipe) -> Run:
        """Its run: the one that a kill left, if it is of this recipe, else a new one."""
        if (self._directory / "recipe.yaml").is_file():
            run = Run.open(self._directory)
            if run.recipe == recipe:
                return run
        shutil.rmtree(self._directory, ignore_errors=True)
        return Run.create(self._directory, recipe)

    @property
    def _directory(self) -> Path:
        return self.place / "trials" / f"{self.arm}-{self.start}-{self.seed}"

    def _stage(self) -> dict[str, Any] | None:
        stage = self.known.stage
        return None if stage is None else json.loads(json.dumps(asdict(stage)))


@cache
def _corpus(size: int) -> Corpus:
    return Corpus.of(emoji.cached(size))


def corpus_of(recipe: Recipe) -> Corpus:
    """The emoji at the size that a recipe's model sees them."""
    return _corpus(recipe.model.scratch.image_size)


def curve(start: Run) -> dict[str, dict[str, float]]:
    """Direction -> step of stage 2 -> R@1 on val."""
    steps = [line for line in start.metrics("2") if "eval_t2i_recall_at_1" in line]
    return {
        direction: {str(line["step"]): line[f"eval_{direction}_recall_at_1"] for line in steps}
        for direction in DIRECTIONS
    }


def rounded(value: Any) -> Any:
    """Floats with six places, so that files stay small."""
    if isinstance(value, dict):
        return {key: rounded(some) for key, some in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def begin_worker() -> None:
    """One thread, and libraries that say nothing."""
    torch.set_num_threads(1)
    quiet_libraries()
