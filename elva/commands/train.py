"""`elva train`: every stage of a recipe, each from the files of the one before."""

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from elva import checkpoint
from elva.errors import RunError
from elva.evaluation.trained import evaluate_stage
from elva.files import is_whole, write_directory
from elva.model.inputs import Inputs
from elva.model.retriever import Retriever
from elva.model.scratch import create
from elva.progress import Reporter
from elva.recipe import Recipe, StageConfig, chosen
from elva.run import Run
from elva.training.examples import Examples
from elva.training.loop import Length
from elva.training.plan import steps_an_epoch
from elva.training.readiness import TrainingData, no_start, notices
from elva.training.stage import StageTrainer

CLOCKED_STEPS = 20
"""A control that runs for another stage's wall time may take at most this many times its steps."""


def train(
    run: Run,
    reporter: Reporter,
    *,
    stages: Sequence[str] | None = None,
    start_from: Run | None = None,
    limit: int | None = None,
    controls: bool = True,
) -> None:
    """Train what of the run is not trained yet, evaluating after every stage.

    Args:
        stages: names to train (None: all of the recipe). A stage starts from the one before it, in
            this run or, for the first, in `start_from`.
        limit: at most this many steps a stage.
        controls: also train what the last stage is compared with.
    """
    with run.locked():
        _train(run, reporter, chosen(run.recipe, stages), start_from, limit, controls)


def _train(
    run: Run,
    reporter: Reporter,
    names: Sequence[str],
    start_from: Run | None,
    limit: int | None,
    controls: bool,
) -> None:
    shared = _Shared(run.recipe, reporter)
    for name in names:
        beginning = _beginning(run, name, start_from, shared.data)
        _train_stage(run, name, reporter, shared, beginning, limit)
    last = list(run.recipe.stages)[-1]
    if controls and last in names:
        done = run.read(last, "stage.json")
        budget = Length(CLOCKED_STEPS * done["steps"], done["seconds"])
        for name in run.recipe.controls:
            beginning = _beginning(run, last, start_from, shared.data)
            _train_stage(run, name, reporter, shared, beginning, limit, budget)


class _Shared:
    """What the stages of a run share, so that nothing is read, tokenised or said twice."""

    def __init__(self, recipe: Recipe, reporter: Reporter) -> None:
        self.data = TrainingData(recipe)
        self.reporter = reporter
        self._inputs: Inputs | None = None
        self._said: set[str] = set()

    def say(self, title: str, line: str) -> None:
        """A line about a stage's data, once a run."""
        if line not in self._said:
            self._said.add(line)
            self.reporter.say(f"{title}: {line}")

    def load(self, path: Path, summary_prompt: str | None) -> Retriever:
        retriever = Retriever.load(path, summary_prompt=summary_prompt, inputs=self._inputs)
        self._inputs = retriever.inputs
        return retriever


def _beginning(run: Run, name: str, start_from: Run | None, data: TrainingData) -> Path:
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
    _create(run, data)
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


def _train_stage(
    run: Run,
    name: str,
    reporter: Reporter,
    shared: _Shared,
    beginning: Path,
    limit: int | None,
    budget: Length | None = None,
) -> None:
    stage = run.recipe.stages.get(name) or run.recipe.controls[name]
    title = run.title(name)
    if not run.is_trained(name):
        torch.manual_seed(run.recipe.seed)
        retriever = shared.load(beginning, run.recipe.model.summary_prompt)
        if stage.lora.rank:
            retriever.add_lora(stage.lora)
        retriever.freeze_vision(not stage.train_vision)
        retriever.plain.train()
        examples = Examples(shared.data.of(stage), stage, run.recipe.seed)
        length = stage_length(stage, examples, limit, budget)
        reporter.start(title, length.steps if length.seconds is None else None)
        for line in notices(stage, examples):
            shared.say(title, line)
        trainer = StageTrainer(
            retriever,
            stage,
            examples,
            length,
            directory=run.stage(name),
            seed=(run.recipe.seed, name),
            save_seconds=run.recipe.save_seconds,
            extra=run.recipe.trainer,
            on_step=lambda step, values: _on_step(run, name, reporter, step, values),
            say=reporter.say,
        )
        resume = checkpoint.newest(run.stage(name))
        steps = int(resume.name.removeprefix(checkpoint.PREFIX)) if resume else 0
        run.forget_after(name, steps)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        _finish(run, name, trainer)
        del trainer, retriever, examples
        gc.collect()  # Trainer refers to itself: its model would live beside the one that follows
        reporter.finish(_line(run, name, title))
    if run.recipe.evaluate and not (run.stage(name) / "evaluation.json").is_file():
        evaluate_stage(run, name, reporter, retriever=shared.load(run.model(name), None))


def stage_length(
    stage: StageConfig, examples: Examples, limit: int | None, budget: Length | None
) -> Length:
    """Steps of a stage: its own, or by epochs over its data, or another stage's wall time."""
    steps = stage.steps
    if steps is None and stage.epochs is not None:
        steps = max(1, round(stage.epochs * steps_an_epoch(stage, examples)))
    if steps is None:
        if budget is None:
            raise RunError("train: a stage must have steps or epochs; set stages.N.steps")
        return Length(min(budget.steps, limit) if limit else budget.steps, budget.seconds)
    return Length(min(steps, limit) if limit else steps)


def _on_step(run: Run, name: str, reporter: Reporter, step: int, values: dict[str, float]) -> None:
    run.log(name, step, values)
    reporter.advance(step, values)


def _finish(run: Run, name: str, trainer: StageTrainer) -> None:
    """The stage's model as an ordinary checkpoint, then the note that it is done."""
    trainer.refuse_broken_weights()
    done = {"steps": trainer.state.global_step, "seconds": trainer.elapsed}
    run.write(name, "stage.json", {**done, "flags": trainer.guards.said})
    shutil.rmtree(run.model(name), ignore_errors=True)  # left by a kill just before this line
    write_directory(run.model(name), trainer.retriever.save)
    checkpoint.prune(run.stage(name), keep=0)


def _line(run: Run, name: str, title: str) -> str:
    done = run.read(name, "stage.json")
    last = run.metrics(name)[-1]
    parts = [f"{k} {last[k]:.3f}" for k in ("lm", "infonce", "reward", "kl") if k in last]
    return f"{title}: {done['steps']} steps in {done['seconds']:.0f} s, {', '.join(parts)}"
