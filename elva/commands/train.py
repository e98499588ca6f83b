"""`elva train`: every stage of a recipe, each from the files of the one before."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from elva import checkpoint
from elva.errors import RunError
from elva.evaluation.trained import evaluate_model, evaluate_stage
from elva.files import is_whole, write_directory
from elva.model.inputs import Inputs
from elva.model.retriever import Retriever
from elva.model.scratch import create
from elva.processes import Processes
from elva.progress import SILENT, Noted, Reporter
from elva.recipe import Recipe, StageConfig
from elva.recipes import chosen
from elva.run import CHOSEN_ON, Run, evaluate_split, evaluated
from elva.training.beginning import begin, open_model
from elva.training.callbacks import Callback, Trackers
from elva.training.examples import Examples
from elva.training.loop import BEST, Loop
from elva.training.plan import Saving, steps_an_epoch
from elva.training.readiness import TrainingData, no_start, notices
from elva.training.stage import Stage
from elva.training.states import is_sharded, put_weights


def train(
    run: Run,
    reporter: Reporter,
    *,
    stages: Sequence[str] | None = None,
    start_from: Run | None = None,
    limit: int | None = None,
    controls: bool = True,
    callbacks: Sequence[Callback] = (),
    processes: Processes | None = None,
) -> None:
    """Train what of the run is not trained yet, evaluating after every stage.

    Args:
        stages: names to train (None: all of the recipe). A stage starts from the one before it, in
            this run or, for the first, in `start_from`.
        limit: at most this many steps a stage.
        controls: also train what the last stage is compared with.
        callbacks: told of every stage's steps (`elva.training.callbacks`).
        processes: those that train together, each of which makes this call; the first one owns the
            run's directory.
    """
    processes = processes or Processes()
    names = chosen(run.recipe, stages)
    shared = _Shared(run.recipe, reporter if processes.first else SILENT, processes, callbacks)
    if (devices := torch.cuda.device_count()) > 1 and processes.count == 1:
        reporter.say(
            f"train: one of {devices} GPUs is used; torchrun --nproc-per-node {devices} -m elva "
            "train uses all"
        )
    noted: Noted | None = None
    with ExitStack() as held:
        with processes.first_alone() as mine:
            if mine:
                held.enter_context(run.locked())
                noted = shared.reporter = Noted(shared.reporter, run.status_file)
                if run.recipe.report_to != "none":
                    trackers = Trackers(run, reporter.say)
                    shared.callbacks.append(trackers)
                    held.callback(trackers.close)
        _train(run, shared, names, start_from, limit, controls)
        if noted is not None:
            noted.close()


def _train(
    run: Run,
    shared: _Shared,
    names: Sequence[str],
    start_from: Run | None,
    limit: int | None,
    controls: bool,
) -> None:
    for name in names:
        beginning = _beginning(run, name, start_from, shared)
        _train_stage(run, name, shared, beginning, limit)
    last = list(run.recipe.stages)[-1]
    if controls and last in names:
        as_many = run.read(last, "stage.json")["steps"]
        for name in run.recipe.controls:
            beginning = _beginning(run, last, start_from, shared)
            _train_stage(run, name, shared, beginning, limit, as_many)


class _Shared:
    """What the stages of a run share, so that nothing is read, tokenised or said twice."""

    def __init__(
        self, recipe: Recipe, reporter: Reporter, processes: Processes,
        callbacks: Sequence[Callback],
    ) -> None:  # fmt: skip
        self.recipe, self.data = recipe, TrainingData(recipe)
        self.reporter: Reporter = reporter
        self.processes, self.callbacks = processes, [*callbacks]
        self._inputs: Inputs | None = None
        self._said: set[str] = set()

    def say(self, title: str, line: str) -> None:
        """A line about a stage's data, once a run."""
        if line not in self._said:
            self._said.add(line)
            self.reporter.say(f"{title}: {line}")

    def load(self, path: Path) -> Retriever:
        """A trained model, which knows how it is asked."""
        return self._known(open_model(self.recipe, path, None, self._inputs))

    def begin(self, path: Path, stage: StageConfig) -> Retriever:
        """A model as a stage begins to train it."""
        features = self.recipe.model.features
        place = None if features is None else Path(features)
        return self._known(begin(self.recipe, path, stage, self._inputs, place))

    def _known(self, retriever: Retriever) -> Retriever:
        self._inputs = retriever.inputs
        return retriever


def _beginning(run: Run, name: str, start_from: Run | None, shared: _Shared) -> Path:
    """The checkpoint (or hub name) a stage starts from."""
    order = list(run.recipe.stages)
    previous = order[order.index(name) - 1] if order.index(name) else None
    if previous is not None and run.is_trained(previous):
        return run.model(previous)
    if start_from is not None:
        last = previous if previous in start_from.trained else (start_from.trained or [None])[-1]
        if last is None:
            raise RunError(f"{start_from.directory}: must hold a trained stage to start from")
        return start_from.model(last)
    if previous is not None:
        raise RunError(no_start(name, previous))
    if run.recipe.model.path is not None:
        return Path(run.recipe.model.path)
    with shared.processes.first_alone() as mine:
        if mine:
            _create(run, shared.data)
    return run.start


def _create(run: Run, data: TrainingData) -> None:
    if is_whole(run.start):
        return
    shutil.rmtree(run.start, ignore_errors=True)
    recipe = run.recipe
    once = {(stage.data, stage.queries): stage for stage in recipe.stages.values()}
    texts = [text for stage in once.values() for text in data.of(stage).texts()]
    write_directory(
        run.start,
        lambda partial: create(
            partial, recipe.model.scratch, texts,
            summary_prompt=recipe.model.summary_prompt, seed=recipe.seed,
        ),
    )  # fmt: skip


class _Log(Callback):
    """Each step's metrics into the run and onto the bar, by the first process."""

    def __init__(self, run: Run, name: str, reporter: Reporter) -> None:
        self.run, self.name, self.reporter = run, name, reporter

    def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        if loop.processes.first:
            self.run.log(self.name, loop.step, metrics)
            self.reporter.advance(loop.step, dict(metrics))

    def on_evaluate(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        if loop.processes.first:
            self.run.log(self.name, loop.step, metrics)
            self.reporter.say(f"{loop.title}: step {loop.step}: {_shown(loop, metrics)}")


def _shown(loop: Loop, metrics: Mapping[str, float]) -> str:
    return f"{loop.metric} {metrics[loop.metric]:.3f}, best at step {loop.best['step']}"


def _train_stage(
    run: Run,
    name: str,
    shared: _Shared,
    beginning: Path,
    limit: int | None,
    as_many: int | None = None,
) -> None:
    reporter, processes = shared.reporter, shared.processes
    if not run.is_trained(name):
        loop, stage = _begin(run, name, shared, beginning, limit, as_many)
        resume = None
        with processes.first_alone() as mine:
            if mine:
                resume = checkpoint.newest(run.stage(name), reporter.say)
                run.forget_after(name, checkpoint.step_of(resume) if resume else 0)
        loop.train(processes.agreed(resume))
        _finish(run, name, loop, stage, shared, beginning)
        loop.close()
        del loop, stage
        gc.collect()  # wrappers refer to themselves: a model would live beside the next
        reporter.finish(_line(run, name, run.title(name)))
    with processes.first_alone() as mine:
        if mine:  # here, so that a kill in the midst of it is made good
            checkpoint.prune(run.stage(name), keep=0)
            shutil.rmtree(run.stage(name) / BEST, ignore_errors=True)
    if run.recipe.evaluate and not (run.stage(name) / "evaluation.json").is_file():
        retriever = shared.load(run.model(name))
        evaluate_stage(run, name, reporter, retriever=retriever, processes=processes)
    processes.wait()


def _begin(
    run: Run, name: str, shared: _Shared, beginning: Path, limit: int | None, as_many: int | None
) -> tuple[Loop, Stage]:
    """A stage with its model, before its first step."""
    started = time.perf_counter()
    recipe, reporter, title = run.recipe, shared.reporter, run.title(name)
    settings = recipe.stages.get(name) or recipe.controls[name]
    retriever = shared.begin(beginning, settings)
    examples = Examples(shared.data.of(settings), settings, recipe.order_seed)
    steps = steps_of(settings, examples, limit, as_many)
    reporter.start(title, steps)
    for line in notices(settings, examples):
        shared.say(title, line)
    stage = Stage(
        retriever, settings, examples, steps, seed=(recipe.seed, name),
        order_seed=(recipe.order_seed, name),
        arguments=recipe.trainer, title=title, processes=shared.processes, say=reporter.say,
    )  # fmt: skip

    def figures() -> dict[str, float]:
        split = evaluate_split(evaluated(recipe)[0], CHOSEN_ON)
        found = evaluate_model(run, retriever, title, SILENT, shared.processes, split)
        return {k: v for k, v in found["figures"].items() if isinstance(v, int | float)}

    loop = Loop(
        retriever, stage, settings, steps, directory=run.stage(name), processes=shared.processes,
        saving=Saving(recipe.save_seconds, recipe.save_steps, recipe.save_total_limit),
        arguments=recipe.trainer, evaluate=figures,
        callbacks=[_Log(run, name, reporter), *shared.callbacks], started=started,
    )  # fmt: skip
    return loop, stage


def steps_of(stage: StageConfig, examples: Examples, limit: int | None, as_many: int | None) -> int:
    """Steps of a stage: its own, or by epochs over its data, or as many as another took."""
    steps = stage.steps
    if steps is None and stage.epochs is not None:
        steps = max(1, round(stage.epochs * steps_an_epoch(stage, examples)))
    if steps is None:
        steps = as_many
    if steps is None:
        raise RunError("train: a stage must have steps or epochs; set stages.N.steps")
    return min(steps, limit) if limit else steps


def _finish(
    run: Run, name: str, loop: Loop, stage: Stage, shared: _Shared, beginning: Path
) -> None:
    """The stage's model as an ordinary checkpoint, then the note that it is done."""
    weights, retriever = loop.whole_weights(), stage.retriever
    with loop.processes.first_alone() as mine:
        if not mine:
            return
        if is_sharded(retriever):  # written from a whole one
            retriever = shared.begin(beginning, stage.stage)
            retriever.train_in_fp32()
            put_weights(retriever, weights)
        done = {"steps": loop.step, "seconds": loop.elapsed, "best": loop.best}
        run.write(name, "stage.json", {**done, "flags": stage.guards.said})
        shutil.rmtree(run.model(name), ignore_errors=True)  # left by a kill just before this line
        write_directory(run.model(name), retriever.save)


def _line(run: Run, name: str, title: str) -> str:
    done = run.read(name, "stage.json")
    last = next(m for m in reversed(run.metrics(name)) if "loss" in m)
    parts = [f"{k} {last[k]:.3f}" for k in ("lm", "infonce", "reward", "kl") if k in last]
    return f"{title}: {done['steps']} steps in {done['seconds']:.0f} s, {', '.join(parts)}"
