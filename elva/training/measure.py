"""Seconds of a stage, by steps that are trained here before the run: a few, on few queries.

A step's seconds grow with its sequences. The measured step grows until it takes
long enough to be told from its overhead, or is the stage's own; the rest is proportion. What the
model writes at its start runs to `max_completion_length`, so a trained one is faster.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from elva.data import Item
from elva.model.scratch import create
from elva.processes import Processes
from elva.recipe import NegativeConfig, Recipe, StageConfig
from elva.run import Run
from elva.training.beginning import begin
from elva.training.callbacks import Callback
from elva.training.estimate import memory_bytes, sequences_a_step, sizes_of
from elva.training.examples import Examples
from elva.training.loop import Loop
from elva.training.plan import Saving
from elva.training.readiness import TrainingData
from elva.training.stage import Stage

_ENOUGH_S = 0.3  # ours: of a step, in which a loop's overhead is a few hundredths
FIRST, _FACTOR, STEPS = (
    16,
    4,
    3,
)  # ours: queries of the first measured step, how much larger the next is, and steps of each
_EMBEDDED, _EMBEDDED_S = (
    32,
    1.0,
)  # ours: items by which a pool's embedding is measured first, and seconds that are long enough
_CPU_OPERATIONS = 4e12  # ours: of the first step, about a minute of two cores


@dataclass(frozen=True)
class Measured:
    """Seconds of a stage's step, and of the mining before it or at each refresh."""

    step: float
    mining: float
    queries: int  # of the largest step that was measured
    prompt_tokens: int  # the longest prompt seen
    picture_tokens: int  # the largest picture's

    def hours(self, stage: StageConfig, steps: int) -> float:
        """Of all its steps; evaluations and the reading of data are not counted."""
        refreshes = 0 if not stage.refresh_steps else (steps - 1) // stage.refresh_steps
        return (steps * self.step + (1 + refreshes) * self.mining) / 3600


def measure(
    recipe: Recipe,
    stages: Mapping[str, StageConfig],
    data: TrainingData,
    start_from: Run | None,
) -> dict[str, Measured | str]:
    """A stage's name -> its seconds, or why they were not measured.

    Args:
        stages: those whose data are at hand.
    """
    found: dict[str, Measured | str] = {}
    gc.freeze()  # what is imported by now is no garbage, and not walked through after each piece
    processes = Processes()
    with tempfile.TemporaryDirectory(prefix="elva-plan-") as scratch:
        checkpoint: Path | str = ""
        with processes.first_alone() as mine:  # where several run, transformers writes in one
            if mine:
                checkpoint = _checkpoint(recipe, data, start_from, Path(scratch))
        checkpoint = processes.agreed(checkpoint)
        for name, stage in stages.items():
            if isinstance(checkpoint, str):
                found[name] = f"not measured: {checkpoint}"
            elif (why := processes.agreed(_unfit(recipe, stage, checkpoint))) is not None:
                found[name] = f"not measured: {why}"
            else:
                examples = Examples(data.of(stage), stage, recipe.order_seed)
                found[name] = _measure(
                    recipe, stage, examples, checkpoint, Path(scratch), processes
                )  # fmt: skip
        processes.wait()  # before the first one's scratch goes
    gc.unfreeze()
    return found


def _checkpoint(
    recipe: Recipe, data: TrainingData, start_from: Run | None, scratch: Path
) -> Path | str:
    """What the stages' model is read from here, or why it is not."""
    if start_from is not None:
        return start_from.model(start_from.answering())
    if recipe.model.path is not None:
        there = Path(recipe.model.path)
        return there if there.is_dir() else f"{recipe.model.path} is not a directory here"
    once = {(stage.data, stage.queries): stage for stage in recipe.stages.values()}
    for stage in once.values():
        if stage.data != "emoji" and not Path(stage.data).is_dir():
            return f"the tokenizer is made of data that is not here: {stage.data}"
    texts = [text for stage in once.values() for text in data.of(stage).texts()]
    prompt, path = recipe.model.summary_prompt, scratch / "start"
    path.mkdir()
    create(path, recipe.model.scratch, texts, summary_prompt=prompt, seed=recipe.seed)
    return path


def _unfit(recipe: Recipe, stage: StageConfig, checkpoint: Path) -> str | None:
    """Why a small step of a stage cannot be trained here, if it cannot."""
    model = replace(recipe.model, path=str(checkpoint))
    piece, sizes = _piece(stage, FIRST), sizes_of(model)
    parts = memory_bytes(piece, replace(recipe, model=model))
    if sizes is None or parts is None:
        return f"{checkpoint} does not say its sizes"
    if torch.cuda.is_available():
        there, of = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    else:
        there, of = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"
    if parts["peak"] > there:
        return f"its least step takes {parts['peak'] / 1e9:.1f} GB, {of} has {there / 1e9:.1f}"
    tokens = sequences_a_step(piece) * (sizes.prompt + stage.max_completion_length)
    if not torch.cuda.is_available() and 8.0 * sizes.parameters * tokens > _CPU_OPERATIONS:
        return "no GPU is here, and its least step would take minutes"
    return None


def _piece(stage: StageConfig, queries: int) -> StageConfig:
    """A stage of so many queries a step whose sequences cost what the stage's do; nothing is mined
    and no pool embedded for it."""
    return replace(
        stage, batch_size=min(queries, stage.batch_size), hard_batches=False, refresh_steps=None,
        negatives=NegativeConfig(given=0), rollout_candidates="query_positive", eval_steps=None,
        load_best_model_at_end=False, early_stopping_patience=None, num_iterations=1,
        relevance="none",
    )  # fmt: skip


class _Clock(Callback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _measure(
    recipe: Recipe, stage: StageConfig, examples: Examples, checkpoint: Path, scratch: Path,
    processes: Processes,
) -> Measured:  # fmt: skip
    retriever = begin(recipe, checkpoint, stage)
    queries, seconds, mining = FIRST, 0.0, 0.0
    while True:
        piece = _piece(stage, queries)
        work = Stage(
            retriever, piece, examples, STEPS, seed=(recipe.seed, "plan", queries),
            arguments=recipe.trainer, title="plan", processes=processes, say=lambda line: None,
        )  # fmt: skip
        clock = _Clock()
        loop = Loop(
            retriever, work, piece, STEPS, directory=scratch / "stage-plan",
            processes=processes, saving=Saving(float("inf")), arguments=recipe.trainer,
            callbacks=[clock],
        )  # fmt: skip
        loop.train()
        # The first one's includes what is done once; all of a launcher's go on or stop together.
        seconds = processes.agreed(min(clock.seconds[1:]))
        loop.close()
        if seconds >= _ENOUGH_S or queries >= stage.batch_size:
            break
        queries *= _FACTOR
    share = sequences_a_step(stage) / sequences_a_step(piece)
    prompts = work.last.asked.prompts if work.last is not None else []
    if stage.embeds_pools:
        mining = _mining_seconds(work, examples)
    longest = max((len(prompt) for prompt in prompts), default=0)
    shown = retriever.inputs.image_id
    largest = max((int((p.input_ids == shown).sum()) for p in prompts), default=0)
    return Measured(seconds * share, mining, piece.batch_size, longest, largest)


def _mining_seconds(work: Stage, examples: Examples) -> float:
    """Of embedding the pools and the queries once, by as many as take long enough: fewer at once
    than the stage embeds take longer each."""
    asked = np.concatenate([*examples.rows.values()])
    everything, done, count = len(asked) + len(examples.candidates), 0, _EMBEDDED
    while True:
        some = slice(done, done + count // 2)  # others than before, whose features are kept
        items: list[Item] = [examples.query(row) for row in asked[some].tolist()]
        rows = range(len(examples.candidates))[some]
        items += [examples.candidates[row] for row in rows]
        began = time.perf_counter()
        with torch.no_grad():
            work.retriever(work.summaries.embed, items)
        seconds = time.perf_counter() - began
        done, count = done + count // 2, count * _FACTOR
        if seconds >= _EMBEDDED_S or done + count // 2 > min(len(asked), len(examples.candidates)):
            return seconds / len(items) * everything
