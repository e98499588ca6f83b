"""A stage's model as its first step finds it, as the recipe says: in a training and in its plan."""

from __future__ import annotations

from pathlib import Path

import torch

from elva.data import emoji
from elva.model.inputs import Inputs
from elva.model.reading import asked_for
from elva.model.retriever import Retriever
from elva.recipe import Recipe, StageConfig


def open_model(
    recipe: Recipe, path: Path, summary_prompt: str | None, inputs: Inputs | None = None
) -> Retriever:
    """A checkpoint of a training: the one it begins with, or a stage's.

    Args:
        summary_prompt: None for the checkpoint's own.
        inputs: of an earlier model of the training, to tokenise nothing twice.
    """
    model = recipe.model
    is_first = model.path is not None and Path(model.path) == path
    retriever = Retriever.load(
        path, summary_prompt=summary_prompt, inputs=inputs, attention=model.attention,
        revision=model.revision if is_first else None,
        reading=asked_for(model) if is_first else None,
    )  # fmt: skip
    retriever.inputs.bound_pixels(model.min_pixels, model.max_pixels)
    workers: int | None = recipe.trainer.get("dataloader_num_workers")
    if workers is not None:
        retriever.inputs.pictures.workers = workers
    return retriever


def begin(
    recipe: Recipe,
    path: Path,
    stage: StageConfig,
    inputs: Inputs | None = None,
    features: Path | None = None,
) -> Retriever:
    """A model as a stage begins to train it.

    Args:
        features: a directory in which a frozen tower's are kept from run to run.
    """
    torch.manual_seed(recipe.seed)
    retriever = open_model(recipe, path, recipe.model.summary_prompt, inputs)
    retriever.add_lora(stage.lora, keep=stage.holds)
    retriever.freeze_vision(not stage.train_vision, features)
    retriever.plain.train()
    if retriever.trained_on is not None:
        retriever.trained_on = [*dict.fromkeys([*retriever.trained_on, emoji.called(stage.data)])]
    return retriever
