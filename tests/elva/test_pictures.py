"""Pictures cut by threads ahead of the step that needs them: once, in bounded memory, and to the
same bits however many threads there are."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from elva.data import Item, load, mbeir
from elva.data.instructions import write_instructions
from elva.data.layout import file_stem
from elva.errors import DataError
from elva.model import pictures
from elva.model.family import read_inputs
from elva.model.inputs import Inputs
from elva.model.pictures import Pictures
from elva.model.processor import ProcessorInputs
from elva.model.retriever import Retriever
from elva.model.rollout import encode
from elva.recipe import ModelConfig, NegativeConfig, Recipe, StageConfig
from elva.training.beginning import open_model
from elva.training.callbacks import Callback
from elva.training.loop import Loop
from tests.elva import families
from tests.elva.stages import POLICY, Stage

QUERIES, CANDIDATES = 12, 24
STEM = file_stem("made", "i2i")

I2I = replace(
    POLICY, tasks={"i2i": 1.0}, learning_rate=1e-2, max_completion_length=4,
    negatives=NegativeConfig(given=0, mined=2, random=2, in_batch=False),
)  # fmt: skip
KINDS = {
    "a frozen tower": replace(
        I2I, num_iterations=2, negatives=NegativeConfig(given=0, random=4, in_batch=False),
        rollout_candidates="all",
    ),
    "mined again and again": replace(I2I, refresh_steps=2),
    "candidates in a bank": replace(I2I, rollout_candidates="query_positive"),
    "a tower that learns": replace(I2I, policy=0.0, infonce=1.0, num_generations=1,
                                   negatives=NegativeConfig(given=0), train_vision=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that ask for pictures, each another."""
    root = tmp_path_factory.mktemp("data")
    (root / "mbeir_images").mkdir()
    draw = np.random.default_rng(0)

    def picture(name: str) -> str:
        path = f"mbeir_images/{name}.png"
        pixels = draw.integers(0, 256, (draw.integers(40, 90), 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / path)
        return path

    pool = [{"txt": None, "img_path": picture(f"c{i}"), "modality": "image", "did": f"9:{i + 1}"}
            for i in range(CANDIDATES)]  # fmt: skip
    mbeir.write_pool(root, STEM, pool)
    queries = [
        {"qid": f"9:{i + 1}", "query_txt": None, "query_img_path": picture(f"q{i}"),
         "query_modality": "image", "task_id": 4, "pos_cand_list": [f"9:{i + 1}"],
         "neg_cand_list": []}
        for i in range(QUERIES)
    ]  # fmt: skip
    mbeir.write_queries(root, STEM, "train", queries)
    write_instructions(root, "made", 9, {("image", "image"): ["Find a like one."]})
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write(tmp_path_factory.mktemp("model") / "qwen2_vl", "qwen2_vl", tied=True)


@pytest.fixture(autouse=True)
def _kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "KEPT_MB", pictures.KEPT_MB)  # put back after a test


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(picture, whether the main thread cut it), as they are cut."""
    found: list[tuple[str, bool]] = []
    for kind in (Inputs, ProcessorInputs):
        inner = kind._cut

        def watched(self: Inputs, image: str, inner: Callable[..., Any] = inner) -> Any:
            found.append((image, threading.current_thread() is threading.main_thread()))
            return inner(self, image)

        monkeypatch.setattr(kind, "_cut", watched)
    return found


def rest(some: Pictures) -> None:
    """Until the threads have nothing to do, or no room."""
    end = time.monotonic() + 30
    while True:
        with some._lock:  # a thread that has ended its cut has yet to say how large it is
            if not some._cutting:
                return
        assert time.monotonic() < end
        time.sleep(0.001)


def stage_of(
    checkpoint: Path, data: Path, stage: StageConfig, place: Path, workers: int, steps: int = 6
) -> Stage:
    """Of a frozen tower nothing is kept but features."""
    pictures.KEPT_MB = 512 if stage.train_vision else 0
    run = Stage(checkpoint, data, stage, place, steps=steps)
    if stage.train_vision:
        run.retriever.freeze_vision(False)
    run.retriever.inputs.pictures.workers = workers
    return run


@pytest.mark.parametrize(
    "kind",
    [pytest.param(x, marks=[pytest.mark.thorough] if x == "mined again and again" else [])
     for x in KINDS],
)  # fmt: skip
def test_a_stage_is_the_same_with_any_number_of_threads(
    kind: str, checkpoint: Path, data: Path, tmp_path: Path, cuts: list[tuple[str, bool]]
) -> None:
    found = []
    for workers in (0, 1, 3):
        cuts.clear()
        run = stage_of(checkpoint, data, KINDS[kind], tmp_path / str(workers), workers).train()
        assert run.moved > 1e-3
        names = [name for name, _ in cuts]
        assert len(names) == len(set(names)) >= QUERIES
        assert all(in_main for _, in_main in cuts) == (workers == 0)
        found.append((run.digest, run.log, sorted(names)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(x, marks=[pytest.mark.thorough] if x != "a tower that learns" else [])
     for x in KINDS],
)  # fmt: skip
def test_a_step_finds_its_pictures_cut(
    kind: str, checkpoint: Path, data: Path, tmp_path: Path, cuts: list[tuple[str, bool]]
) -> None:
    """From the second on the main thread cuts none, but where a step mines anew: while a step
    computes the next one's are cut, all of them and no others."""
    stage = replace(KINDS[kind], refresh_steps=None)
    run = stage_of(checkpoint, data, stage, tmp_path, workers=2)
    steps: list[set[str]] = []
    known: list[set[str]] = []

    class Wait(Callback):
        def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
            assert run.work.last is not None
            rest(run.retriever.inputs.pictures)
            if loop.step % stage.num_iterations == 0:
                steps.append({p.image for p in run.work.last.asked.prompts if p.image is not None})
                known.append({name for name, _ in cuts})
                cuts[:] = [(name, False) for name, _ in cuts]  # of the first step

    run.loop.callbacks.append(Wait())
    run.train()
    assert len(steps) == 6 // stage.num_iterations and not any(in_main for _, in_main in cuts)
    assert len({frozenset(step) for step in steps}) == len(steps)
    for now, then in zip(known, steps[1:], strict=False):
        assert then <= now
    mined = {p.image for p in map(run.retriever.inputs.prompt, _items(data)) if p.image is not None}
    assert known[-1] == (mined if run.work.negatives.mined is not None else set().union(*steps))


def _items(data: Path) -> Iterator[Item]:
    split = load(data, split="train")
    yield from split.queries
    pool = split.pool("i2i")
    yield from (pool[row] for row in range(len(pool)))


@pytest.mark.parametrize("damaged", ["q", "c"])
def test_a_damaged_picture_is_said_at_its_step_in_the_same_words(
    damaged: str, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query's, whose pixels are wanted, and a candidate's, which is compared with others too."""
    load_image = Item.load_image

    def load_most(self: Item) -> Image.Image:
        if isinstance(self.image, Path) and self.image.stem == bad:
            raise DataError(f"{self.where}: unreadable picture: {self.image}: it broke off")
        return load_image(self)

    stage = replace(KINDS["a tower that learns"], batch_size=3)
    plan = stage_of(checkpoint, data, stage, tmp_path / "plan", 0).work.plan
    bad = f"{damaged}{plan[2].rows[1]}"  # a query's answer is that of its number
    monkeypatch.setattr(Item, "load_image", load_most)
    said = []
    for workers in (0, 1, 3):
        run = stage_of(checkpoint, data, stage, tmp_path / str(workers), workers)
        with pytest.raises(DataError) as caught:
            run.train()
        said.append((str(caught.value), len(run.log)))
        assert f"{bad}.png: it broke off" in said[-1][0] and said[-1][0].count("\n") == 0
    assert said[0][1] == 2 and said[0] == said[1] == said[2]


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_embedding_cuts_the_next_batch_meanwhile(
    family: str, data: Path, tmp_path: Path, cuts: list[tuple[str, bool]]
) -> None:
    """The same embeddings, each picture cut once, by threads after the first batch."""
    place = families.write(tmp_path / family, family)
    items, found = list(_items(data)), []
    for workers in (0, 1, 3):
        retriever = Retriever.load(place, summary_prompt="")
        retriever.freeze_vision(True)
        some = retriever.inputs.pictures
        some.workers = workers
        cuts.clear()

        def finished(done: int, some: Pictures = some) -> None:
            rest(some)
            if done == 8 and some.workers:
                cuts[:] = [(name, False) for name, _ in cuts]  # of the first batch

        out = encode(retriever, items, max_completion_length=2, batch_size=8, progress=finished)
        assert sorted(name for name, _ in cuts) == sorted(str(item.image) for item in items)
        assert any(in_main for _, in_main in cuts) == (workers == 0)
        found.append(out.embeddings)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_no_two_threads_ask_one_processor(tmp_path: Path) -> None:
    """Nor one that prompts are made with."""
    inputs = read_inputs(families.write(tmp_path / "model", "idefics3"), "")
    assert isinstance(inputs, ProcessorInputs)
    found, together = {id(inputs.processor), id(inputs._pristine)}, threading.Barrier(3)

    def cutter(_: int) -> int:
        together.wait(30)
        assert inputs._cutter is inputs._cutter
        return id(inputs._cutter)

    with ThreadPoolExecutor(3) as threads:
        found.update(threads.map(cutter, range(3)))
    assert len(found) == 5


MB = 1 << 20


class Cutter:
    """Cuts pictures of 1 MB, and counts."""

    def __init__(self) -> None:
        self.cut: list[str] = []

    def __call__(self, image: str) -> dict[str, Tensor]:
        self.cut.append(image)
        if image == "damaged":
            raise DataError("damaged: unreadable picture")
        return {"pixel_values": torch.full((MB // 4,), float(image))}


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_cut_ahead_is_bounded(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "AHEAD_MB", 5)
    cutter, names = Cutter(), [str(i) for i in range(40)]
    some = Pictures(cutter, workers)
    some.ahead(names)
    for taken, name in enumerate(names):
        rest(some)
        assert some.ahead_bytes == min(5, 40 - taken) * MB
        assert cutter.cut.count(name) == 1 and len(cutter.cut) == min(40, taken + 5)
        assert some.get(name)["pixel_values"][-1] == float(name)
    assert sorted(cutter.cut) == sorted(names) and some.ahead_bytes == 0


def test_the_first_picture_is_cut_alone_until_its_size_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "AHEAD_MB", 2)
    cutter, go_on = Cutter(), threading.Event()

    def slow(image: str) -> dict[str, Tensor]:
        pixels = cutter(image)
        assert go_on.wait(30)
        return pixels

    some = Pictures(slow, 4)
    some.ahead([str(i) for i in range(8)])
    assert some._cutting == 1
    go_on.set()
    rest(some)
    assert len(cutter.cut) == 2 and some.ahead_bytes == 2 * MB


def test_what_nobody_asks_for_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "AHEAD_MB", 5)
    cutter = Cutter()
    some = Pictures(cutter, 2)
    some.ahead(["0", "1", "damaged"])
    rest(some)
    some.ahead(["1", "2", "3", "4", "5", "6"])
    rest(some)
    assert some.ahead_bytes == 5 * MB and cutter.cut.count("1") == 1
    for name in ("0", "damaged"):
        assert name not in some._begun
    assert some.get("0")["pixel_values"][0] == 0 and cutter.cut.count("0") == 2
    some.ahead(["damaged"])
    rest(some)
    for _ in range(2):  # as often as it is asked for
        with pytest.raises(DataError, match="damaged: unreadable picture"):
            some.get("damaged")


def test_what_was_asked_for_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "KEPT_MB", 3)
    cutter = Cutter()
    some = Pictures(cutter, 0)
    for name in ("1", "2", "3", "1", "4", "1", "3"):  # 4 in the place of 2
        some.get(name)
    assert cutter.cut == ["1", "2", "3", "4"] and some._kept_bytes == 3 * MB
    some.get("2")
    assert cutter.cut[4:] == ["2"]
    some.ahead(["1", "2", "3"])
    assert not some._begun and not some._waiting


def test_the_recipe_says_how_many_threads(checkpoint: Path) -> None:
    def workers(trainer: dict[str, Any]) -> int:
        recipe = Recipe("x", ModelConfig(str(checkpoint)), {"3": I2I}, trainer=trainer)
        return open_model(recipe, checkpoint, "").inputs.pictures.workers

    assert workers({"dataloader_num_workers": 3}) == 3
    assert workers({"dataloader_num_workers": 0}) == 0
    assert workers({}) == pictures.spare_cores()


def test_a_process_takes_the_cores_that_are_left_of_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spare(cores: int, processes: str | None) -> int:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes or "1")
        return pictures.spare_cores()

    assert [spare(n, None) for n in (1, 2, 4, 64)] == [0, 1, 3, 4]
    assert [spare(16, n) for n in ("8", "16", "32")] == [1, 0, 0]
