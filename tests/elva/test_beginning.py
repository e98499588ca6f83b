"""A stage's model begins as the recipe says, however its place is written, in a plan as well."""

from pathlib import Path

import pytest

from elva.recipe import Recipe, StageConfig
from elva.recipes import resolve
from elva.training.beginning import begin
from tests.elva import strangers

PAIR = StageConfig(pathwise=1.0, max_completion_length=0, steps=1)


def recipe(*assignments: str) -> Recipe:
    return resolve("booster", None, assignments)


@pytest.mark.parametrize("ending", ["", "/", "/.", "/../model"])
def test_how_a_model_is_read_does_not_depend_on_how_its_path_is_written(
    tmp_path: Path, ending: str
) -> None:
    strangers.sentence_transformer(tmp_path / "model", "qwen2_vl")
    given = f"{tmp_path}/model{ending}"
    asked = recipe(f"model.path={given}", "model.pooling=mean")
    assert begin(asked, Path(given), PAIR).reading.pooling == "mean"


def test_pictures_are_bounded_and_threads_counted(tmp_path: Path) -> None:
    path = strangers.sentence_transformer(tmp_path / "model", "qwen2_vl")
    bounds = [f"model.path={path}", "model.min_pixels=784", "model.max_pixels=1600"]
    retriever = begin(recipe(*bounds, "trainer.dataloader_num_workers=3"), path, PAIR)
    size = retriever.inputs.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 1600)
    assert retriever.inputs.pictures.workers == 3
