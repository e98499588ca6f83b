"""What a training will need, looked at before its first step: nothing is decided late."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from elva.data import Dataset, Item, Pool, load
from elva.data.queries import Queries
from elva.data.sample import unreadable
from elva.errors import DataError, RunError, UserError
from elva.evaluation.trained import evaluation_tasks
from elva.model.family import DAMAGED, has_head, read_inputs, takes_pictures
from elva.model.inputs import RET
from elva.model.note import base_of, reading_of, stands_on
from elva.model.reading import Reading, asked_for
from elva.recipe import ModelConfig, Recipe, StageConfig
from elva.recipes import chosen
from elva.run import Run, evaluated, source_of
from elva.training.callbacks import missing_tracker
from elva.training.estimate import at_hand, disk_bytes, memory_bytes
from elva.training.examples import Examples
from elva.training.plan import steps_an_epoch

_HUB_NAME = r"[\w.-]+(/[\w.-]+)?"

_DECODED = 16
"""Ours: pictures of each stage that are decoded before training, drawn by the seed."""

Row = dict[str, Any]


@dataclass
class Ready:
    """What was found: a row a stage, what is evaluated, the data that was read for it, and what is
    not at hand, a line each."""

    stages: dict[str, Row] = field(default_factory=dict)
    evaluation: str = ""
    data: TrainingData | None = None
    problems: list[str] = field(default_factory=list)


def check(
    recipe: Recipe,
    stages: Sequence[str] | None = None,
    start_from: Run | None = None,
    *,
    controls: bool = True,
    output: Path = Path("."),
) -> Ready:
    """Refuse what cannot be trained here, before a run directory is made for it.

    Args:
        start_from: a run that may hold what the first of `stages` starts from.
        output: where the run will lie, for the space on its disk.

    Raises:
        UserError, DataError: an unknown stage or one that has nothing to
            start from, data or a model that is not there or not what the recipe asks of it.
    """
    names = chosen(recipe, stages)
    if line := next(_problems(recipe, _kinds(recipe, names, controls), start_from), None):
        raise RunError(line)
    if start_from is None:
        _refuse_unfit(recipe, _kinds(recipe, names, controls))
    ready = _looked(recipe, names, controls)
    if not (output / "recipe.yaml").exists():  # a run that goes on has what it needed
        _refuse_full_disk(recipe, _kinds(recipe, names, controls), output)
    return ready


def look(
    recipe: Recipe,
    stages: Sequence[str] | None = None,
    start_from: Run | None = None,
    *,
    controls: bool = True,
) -> Ready:
    """The same with what is not at hand as lines, for `--dry-run`.

    Raises:
        UserError, DataError: data, or a model's directory, that is there, and not what the recipe
            asks of it.
    """
    names = chosen(recipe, stages)
    kinds = _kinds(recipe, names, controls)
    problems = list(_problems(recipe, kinds, start_from))
    if start_from is None and recipe.model.path and Path(recipe.model.path).is_dir():
        _refuse_unfit(recipe, kinds)
    return replace(_looked(recipe, names, controls, whole=not problems), problems=problems)


def _looked(recipe: Recipe, names: Sequence[str], controls: bool, *, whole: bool = True) -> Ready:
    """What is found of the data at hand.

    Args:
        whole: whether the model is, so that its sizes can be read.
    """
    kinds, ready = _kinds(recipe, names, controls), Ready()
    if whole:
        recipe = replace(recipe, model=at_hand(recipe.model))
    data = TrainingData(recipe)
    for name, stage in kinds.items():
        if stage.data == "emoji" or Path(stage.data).is_dir():
            ready.stages[name] = _look(recipe, stage, data.of(stage))
    ready.evaluation, ready.data = _evaluation(recipe, names), data
    return ready


def _kinds(recipe: Recipe, names: Sequence[str], controls: bool) -> dict[str, StageConfig]:
    """The stages that are trained, and the controls of the last one."""
    kinds = {name: recipe.stages[name] for name in names}
    if controls and names and names[-1] == list(recipe.stages)[-1]:
        kinds |= recipe.controls
    return kinds


class TrainingData:
    """The data that a recipe's stages train on, each read once however many stages share it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._read: dict[tuple[str, str], Dataset] = {}

    def of(self, stage: StageConfig) -> Dataset:
        """The data of one stage, whole."""
        key = (stage.data, stage.queries)
        if key not in self._read:
            root = source_of(self._recipe, stage.data)
            self._read[key] = load(root, split="train", queries=stage.queries)
        return self._read[key]


def notices(stage: StageConfig, examples: Examples) -> Iterator[str]:
    """What a person should know of a stage's data, a line each."""
    yield from examples.notices
    if examples.unanswered:
        yield f"{examples.unanswered:,} queries have no right answer in the pool and train nothing"
    if examples.negatives and stage.embeds and not stage.negatives.given:
        yield "its queries name negatives, which are not used; negatives.given takes them"


def no_start(name: str, previous: str) -> str:
    """What is said of a stage that has nothing to start from."""
    return (
        f"train: stage {name} starts from stage {previous}, which is not trained; "
        "train it too or pass --from RUN"
    )


def _problems(
    recipe: Recipe, kinds: Mapping[str, StageConfig], start_from: Run | None
) -> Iterator[str]:
    first = next(iter(kinds), None)
    if first and start_from is None and (place := list(recipe.stages).index(first)):
        yield no_start(first, list(recipe.stages)[place - 1])
    yield from _missing_data(recipe, kinds)
    if line := missing_tracker(recipe):
        yield line
    if start_from is None:
        yield from _missing_model(recipe.model)


def _missing_data(recipe: Recipe, kinds: Mapping[str, StageConfig]) -> Iterator[str]:
    for name, stage in kinds.items():
        data, kind = stage.data, "stages" if name in recipe.stages else "controls"
        if data != "emoji" and not Path(data).is_dir():
            yield (
                f"recipe: {kind}.{name}.data must be emoji or a directory in M-BEIR's layout, "
                f"got {data!r}; see elva data --help"
            )


def _missing_model(asked: ModelConfig) -> Iterator[str]:
    if asked.attention == "flash_attention_2" and not is_flash_attn_2_available():
        yield (
            "recipe: model.attention must be sdpa or eager here, got flash_attention_2; "
            "it needs a GPU and flash-attn (pip install flash-attn)"
        )
    model = asked.path
    if model is None:
        return
    if Path(model).is_dir():
        try:
            config = json.loads((base_of(Path(model)) / "config.json").read_text("utf-8"))
            kind = config.get("model_type") if isinstance(config, dict) else "no JSON object"
        except UserError:
            raise
        except (OSError, ValueError):
            kind = "no readable config.json"
        if not takes_pictures(kind):
            yield (
                "recipe: model.path must be a checkpoint that takes pictures and text, got "
                f"{kind} in {model}"
            )
        if asked.revision is not None:
            yield (
                "recipe: model.revision must be left out of a directory, got "
                f"{asked.revision!r} of {model}"
            )
    elif not re.fullmatch(_HUB_NAME, model):
        yield f"recipe: model.path must be a checkpoint directory or a hub name, got {model!r}"


def _look(recipe: Recipe, stage: StageConfig, dataset: Dataset) -> Row:
    """A stage's data: chosen as it will be, some of its pictures decoded."""
    examples = Examples(dataset, stage, recipe.order_seed)
    parts: list[Queries | Pool] = [examples.queries, *examples.candidates.pools]
    if found := unreadable(parts, _DECODED, recipe.seed):
        raise DataError(found[0])
    return {
        "queries": {task: len(found) for task, found in examples.rows.items()},
        "candidates": len(examples.candidates),
        "pictures": examples.pictures,
        "with_negatives": examples.negatives,
        "steps_an_epoch": steps_an_epoch(stage, examples),
        "notices": [*notices(stage, examples), *_memory_notice(recipe, stage)],
    }


def _refuse_unfit(recipe: Recipe, kinds: Mapping[str, StageConfig]) -> None:
    """RunError for a checkpoint of which a part is missing or damaged, or a retriever that cannot
    be trained as it is asked, before a run is made."""
    asked, model = recipe.model, recipe.model.path
    if model is None:
        return
    try:
        reading = asked_for(asked) or reading_of(model, asked.revision)
        _, base = stands_on(model, asked.revision)
        inputs = read_inputs(
            model, "", asked.revision, reading=reading, base=None if base is None else base.place
        )
        inputs.prompt(Item("0", "a", None, "text"))
        at_hand(ModelConfig(model))
        writes = reading.at_ret or has_head(*(base.place if base else (model, asked.revision)))
    except UserError:
        raise
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(
            f"recipe: model.path must be a whole checkpoint, got {model}; {reason}"
        ) from None
    if inputs.ret_is_new and asked.pooling is None and (line := _unlearnt(model, kinds)):
        raise RunError(line)
    inputs.bound_pixels(asked.min_pixels, asked.max_pixels)
    if line := next(_unkept(reading, recipe, kinds, writes), None):
        raise RunError(line)


def _unlearnt(model: str, kinds: Mapping[str, StageConfig]) -> str | None:
    """A line where the first stage reads a new [RET] that it does not teach the model to write."""
    name, first = next(iter(kinds.items()), ("", StageConfig()))
    if first.max_completion_length or first.ret > 0:
        return None
    return (
        f"recipe: model.pooling must say how {model} embeds, whose files do not, where stage "
        f"{name} writes nothing and learns no {RET}, got none; add --set model.pooling=last, mean "
        "or ret"
    )


def _unkept(
    reading: Reading, recipe: Recipe, kinds: Mapping[str, StageConfig], writes: bool
) -> Iterator[str]:
    """What of a recipe would change how a retriever of somebody else is asked or closed, or asks
    for summaries of one that has no head to write them with."""
    if reading.at_ret:
        return
    if prompt := recipe.model.summary_prompt:
        yield (
            "recipe: model.summary_prompt must be empty for a retriever, which keeps its own "
            f"prompt, got {prompt[:40]!r}; add --set model.summary_prompt="
        )
    for name, stage in kinds.items():
        kind = "stages" if name in recipe.stages else "controls"
        gold = stage.completions == "gold"
        used = {"lm": stage.lm > 0, "ret": stage.ret > 0, "completions": gold}
        if field_name := next((key for key, is_used in used.items() if is_used), None):
            yield (
                f"recipe: {kind}.{name}.{field_name} must be left out for a retriever without "
                f"{RET}, got {getattr(stage, field_name)}; train its infonce, pathwise or policy: "
                "--stages 3"
            )
        if stage.max_completion_length and not writes:
            yield (
                f"recipe: {kind}.{name}.max_completion_length must be 0 for {recipe.model.path}, "
                "which has no head to write a summary with, got "
                f"{stage.max_completion_length}; train its infonce or pathwise"
            )


def _refuse_full_disk(recipe: Recipe, kinds: Mapping[str, StageConfig], output: Path) -> None:
    """A model a stage; of the one that trains the checkpoints that are kept, and one being
    written."""
    recipe = replace(recipe, model=at_hand(recipe.model))
    parts = [disk_bytes(stage, recipe) or {} for stage in kinds.values()]
    needed = sum(part.get("model", 0) for part in parts)
    needed += max((part.get("checkpoints", 0) for part in parts), default=0)
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RunError(
            f"train: {place} must have {needed / 1e9:.1f} GB free for models and "
            f"checkpoints, got {free / 1e9:.1f}; choose another --output"
        )


def _memory_notice(recipe: Recipe, stage: StageConfig) -> Iterator[str]:
    """A line where the estimate is more than the device has."""
    parts = memory_bytes(stage, recipe)
    needed = None if parts is None else parts["peak"]
    if torch.cuda.is_available():
        there, of = torch.cuda.get_device_properties(0).total_memory, "the GPU"
    else:
        there, of = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"
    if needed is not None and needed > there:
        yield (
            f"estimated at {needed / 1e9:.1f} GB, {of} has {there / 1e9:.1f}; "
            "lower micro_batch_size, or set lora.rank"
        )


def _evaluation(recipe: Recipe, names: Sequence[str]) -> str:
    """What is evaluated after each stage, or why nothing is."""
    there = (stage.data == "emoji" or Path(stage.data).is_dir() for stage in recipe.stages.values())
    if not (recipe.evaluate and names and all(there)):
        return "nothing"
    data, split = evaluated(recipe)
    if split is None:
        return "nothing: no data of a stage has test or val queries"
    return f"{split}: {', '.join(evaluation_tasks(data, split, recipe))}"
