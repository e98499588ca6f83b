"""A corpus of a dozen pictures and their names, and a recipe of every stage that trains on it in
seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from benchmarks.reliability.crashes.places import place
from elva.data import mbeir
from elva.data.instructions import write_instructions
from elva.recipe import NegativeConfig, Recipe, ScratchModel
from elva.recipes import RECIPES

SHAPES, COLOURS = ("square", "circle", "bar"), ("red", "green", "blue", "white")
NAMES = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))
FIRST_TEXT = 100
"""Number of the first name among the candidates; pictures are from 0."""

SIZE = 56


def corpus(root: Path) -> Path:
    """Write it in M-BEIR's layout: every task, a split to train on and one to test on."""
    folder = root / "mbeir_images"
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        _drawn(name).save(folder / f"{number}.png")
    numbers = range(len(NAMES))
    pools = {"image": [_picture(n) for n in numbers], "text": [_name(n) for n in numbers]}
    prompts: dict[tuple[str, str], tuple[str, ...]] = {}
    for task, (asked, answered) in TASKS.items():
        mbeir.write_pool(root, f"small_task{task}", pools[answered])
        prompts[asked, answered] = ("Find it.", "Show it.", "Which is it?", "What is meant?")
        for split in ("train", "test"):
            mbeir.write_queries(root, f"small_task{task}", split, [*_queries(task)])
    write_instructions(root, "small", 9, prompts)
    return root


@cache
def shared() -> Path:
    """The corpus of this process, and of all that are forked from it."""
    return corpus(place() / "corpus")


TASKS = {
    0: ("text", "image"),
    1: ("text", "text"),
    3: ("image", "text"),
    7: ("image,text", "image"),
}
"""M-BEIR's number of a task -> modalities of its queries and candidates."""


def _drawn(name: str) -> Image.Image:
    colour, shape = name.split()
    image = Image.new("RGB", (SIZE, SIZE))
    pen = ImageDraw.Draw(image)
    draw = pen.ellipse if shape == "circle" else pen.rectangle
    draw((8, 8, SIZE - 8, SIZE - 8 if shape != "bar" else 20), fill=colour)
    return image


def _path(number: int) -> str:
    return f"mbeir_images/{number}.png"


def _picture(number: int) -> dict[str, Any]:
    return {
        "did": f"9:{number}", "txt": None, "img_path": _path(number), "modality": "image",
        "src_content": None,
    }  # fmt: skip


def _name(number: int) -> dict[str, Any]:
    return {
        "did": f"9:{FIRST_TEXT + number}", "txt": NAMES[number], "img_path": None,
        "modality": "text", "src_content": None,
    }  # fmt: skip


def _queries(task: int) -> Iterator[dict[str, Any]]:
    """One an answer, with every other candidate of its colour or shape as a negative."""
    asked, answered = TASKS[task]
    first = FIRST_TEXT if answered == "text" else 0
    for number, name in enumerate(NAMES):
        like = [n for n, other in enumerate(NAMES) if {*name.split()} & {*other.split()}]
        like.remove(number)
        shown = like[0] if task == 7 else number
        yield {
            "qid": f"9:{1000 * (task + 1) + number}",
            "query_txt": None if asked == "image" else f"the {name}" if task == 1 else name,
            "query_img_path": None if asked == "text" else _path(shown),
            "query_modality": asked, "query_src_content": None,
            "pos_cand_list": [f"9:{first + number}"],
            "neg_cand_list": [f"9:{first + n}" for n in like], "task_id": task,
        }  # fmt: skip


def recipe(data: Path) -> Recipe:
    """The smoke recipe, every stage and control of it, as a run of seconds: a model of one layer, a
    checkpoint after each step."""
    smoke, steps = RECIPES["smoke"], {"0": 4, "1": 3, "2": 3, "3": 3}
    few = NegativeConfig(given=0, mined=3, random=2, in_batch=False)
    model = ScratchModel(
        hidden_size=32, intermediate_size=64, layers=1, heads=2, vocabulary=300, vision_size=32,
        vision_layers=1, vision_heads=2, image_size=SIZE,
    )  # fmt: skip

    def small(stage: Any, count: int) -> Any:
        mined = stage.negatives.mined > 0
        return replace(
            stage, steps=count, batch_size=4, data=str(data), refresh_steps=2,
            max_completion_length=6, num_generations=min(3, stage.num_generations),
            negatives=few if mined else stage.negatives,
        )  # fmt: skip

    return replace(
        smoke, name="small", model=replace(smoke.model, scratch=model),
        stages={name: small(stage, steps[name]) for name, stage in smoke.stages.items()},
        controls={name: small(stage, 2) for name, stage in smoke.controls.items()},
        save_seconds=0.0, evaluate_limit=8,
    )  # fmt: skip
