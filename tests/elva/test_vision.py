"""Features of a frozen vision tower: made once, alone, and kept in a file over processes."""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elva.data import load
from elva.errors import UserError
from elva.model import vision
from elva.model.retriever import Retriever
from elva.model.vision import FeatureFile, Features, Pixels, each_alone
from elva.recipe import NegativeConfig
from tests.elva.stages import POLICY, Stage


@pytest.fixture(scope="module")
def checkpoint(released: Callable[[str], Path]) -> Path:
    return released("tied")


@pytest.fixture(scope="module")
def seen(checkpoint: Path, corpus: Path) -> tuple[Retriever, list[str]]:
    """A model with a frozen tower, and pictures that it was prompted with."""
    retriever = Retriever.load(checkpoint, summary_prompt="")
    retriever.freeze_vision(True)
    queries = load(corpus, split="train").queries
    prompts = [retriever.inputs.prompt(q) for q in queries if q.task == "i2t"][:40]
    return retriever, list(dict.fromkeys(p.image for p in prompts if p.image is not None))


def test_a_feature_depends_on_its_picture_only(
    seen: tuple[Retriever, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order, any company, and of several sizes; read one by one, the same to rounding."""
    retriever, images = seen
    pixels = {i: retriever.inputs.pixels(i) for i in images}
    for image in images[::3]:  # of another shape
        patches, grid = pixels[image]["pixel_values"], pixels[image]["image_grid_thw"]
        half = grid // torch.tensor([1, 2, 1])
        pixels[image] = {"pixel_values": patches[: len(patches) // 2], "image_grid_thw": half}
    read: list[int] = []

    def tower(some: Pixels) -> Tensor:
        read.append(len(some["image_grid_thw"]))
        return retriever._tower(some)

    with torch.no_grad():
        whole = dict(zip(images, each_alone(tower, [pixels[i] for i in images]), strict=True))
        assert set(read) == {vision.TOGETHER} and len(read) == 3
        for order in range(3):
            some = random.Random(order).sample(images, 7 + 10 * order)
            found = each_alone(tower, [pixels[i] for i in some])
            assert all(torch.equal(whole[i], f) for i, f in zip(some, found, strict=True))
        monkeypatch.setattr(vision, "SMALL", 0)
        read.clear()
        for image, feature in zip(images, each_alone(tower, map(pixels.get, images)), strict=True):
            assert (feature - whole[image]).abs().max() < 1e-5 * whole[image].abs().max()
    assert read == [1] * len(images)
    assert len({f.untyped_storage().data_ptr() for f in whole.values()}) == len(images)


@pytest.mark.thorough
@pytest.mark.parametrize("micro_batch_size", [8, 1024])
def test_the_tower_sees_each_picture_once(
    checkpoint: Path, corpus: Path, tmp_path: Path, micro_batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Over steps and their repetitions, although memory holds hardly any; with a filled file
    never, and to the same bits."""
    made: list[str] = []
    towers = Retriever._towers

    def count(self: Retriever, images: list[str]) -> list[Tensor]:
        made.extend(images)
        return towers(self, images)

    monkeypatch.setattr(Retriever, "_towers", count)
    policy = replace(
        POLICY, num_iterations=2, micro_batch_size=micro_batch_size,
        negatives=NegativeConfig(given=0, random=5, in_batch=False),
    )  # fmt: skip

    held: list[list[str]] = []
    hold = Features.hold
    monkeypatch.setattr(Features, "hold", lambda s, images: (held.append(images), hold(s, images)))

    def train(name: str, features: Path | None) -> tuple[str, set[str]]:
        stage = Stage(checkpoint, corpus, policy, tmp_path / name, steps=6, features=features)
        assert made == []
        held.clear()
        return stage.train().digest, {i for images in held for i in images}

    plain, shown = train("plain", None)
    assert len(made) == len(set(made)) and set(made) == shown and len(shown) > 20
    distinct = sum(len({*images}) for images in held)
    made.clear()
    assert train("filling", tmp_path / "features")[0] == plain and set(made) == shown
    made.clear()
    assert train("filled", tmp_path / "features")[0] == plain and made == []
    monkeypatch.setattr(vision, "FEATURES_KEPT_MB", 0)
    assert train("tight", None)[0] == plain
    assert set(made) == shown and len(made) <= distinct  # a step's own are kept, whatever the limit


def test_the_least_recently_used_are_dropped_and_a_steps_own_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vision, "FEATURES_KEPT_MB", 1)
    features, made = Features(), []

    def make(images: list[str]) -> list[Tensor]:
        made.extend(images)
        return [torch.full((1 << 16, 1), float(i)) for i in images]  # 256 KB

    def get(*images: str) -> None:
        made.clear()
        found = features.get(images, make, torch.device("cpu"))
        assert [f[0, 0].item() for f in map(found.get, images)] == [float(i) for i in images]

    get("1", "2", "3", "4")
    get("1")
    get("5")  # in the place of 2
    get("1", "3", "4", "5")
    assert made == []
    get("2")
    assert made == ["2"]
    features.hold(["10", "11", "12", "13", "14", "15"])
    get("10", "11", "12", "13", "14", "15")
    get("20")
    get("10", "11", "12", "13", "14", "15")
    assert made == []


def _some(count: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(3 + i, 4) for i in range(count)]
    return {f"{i:064x}": torch.randn(s, generator=draw).bfloat16() for i, s in enumerate(shapes)}


def _same(file: FeatureFile, features: dict[str, Tensor]) -> bool:
    read = {name: file.read(name) for name in features}
    return all(x is not None and torch.equal(x, features[n]) for n, x in read.items())


def test_a_file_is_what_was_committed_however_its_writer_ended(tmp_path: Path) -> None:
    """Every length to which a kill can cut the two files: whole features, or none; then going
    on."""
    features = _some(3)
    writer = os.fork()
    if writer == 0:
        file = FeatureFile(tmp_path / "made", "a" * 64)
        for name, feature in features.items():
            file.add(name, feature)
            file.commit()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 0
    folder = tmp_path / "made" / ("a" * 16)
    index, data = ((folder / name).read_bytes() for name in ("0.jsonl", "0.bin"))
    for cut in range(0, len(index), 7):
        counted = max(0, index[:cut].count(b"\n") - 1)
        sizes = [f.nbytes for f in features.values()]
        for torn in (0, 5):  # of the next feature, whose line is not there
            there = tmp_path / f"{cut}-{torn}" / ("a" * 16)
            there.mkdir(parents=True)
            (there / "0.jsonl").write_bytes(index[:cut])
            (there / "0.bin").write_bytes(data[: sum(sizes[:counted]) + torn])
            file = FeatureFile(there.parent, "a" * 64)
            known = dict(list(features.items())[:counted])
            assert len(file) == counted and _same(file, known)
            for name, feature in features.items():
                if name not in known:
                    file.add(name, feature)
            file.commit()
            assert _same(FeatureFile(there.parent, "a" * 64), features)


def test_writers_at_the_same_time_have_parts_of_their_own(tmp_path: Path) -> None:
    features = _some(4)
    names = list(features)
    files = [FeatureFile(tmp_path, "b" * 64) for _ in range(2)]
    for name, file in zip(names, [*files, *files], strict=True):
        file.add(name, features[name])
        file.commit()
    assert len(list(tmp_path.rglob("*.bin"))) == 2
    assert _same(FeatureFile(tmp_path, "b" * 64), features)


def test_another_towers_features_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    features = _some(2)
    file = FeatureFile(tmp_path, "c" * 64)
    for name, feature in features.items():
        file.add(name, feature)
    file.commit()
    assert FeatureFile(tmp_path, "d" * 64).read(next(iter(features))) is None
    with pytest.raises(UserError, match="must hold features of this vision tower"):
        FeatureFile(tmp_path, "c" * 16 + "d" * 48)
    data = next(tmp_path.rglob("*.bin"))
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    file = FeatureFile(tmp_path, "c" * 64)
    first, last = features
    assert file.read(first) is not None
    with pytest.raises(UserError, match="must hold its features whole"):
        file.read(last)


def test_a_towers_hash_knows_its_weights_and_its_pixels(seen: tuple[Retriever, list[str]]) -> None:
    retriever, _ = seen
    tower = dict(retriever.plain.model.visual.named_parameters())
    first = vision.fingerprint(tower, "56 pixels")
    assert first == vision.fingerprint(tower, "56 pixels") != vision.fingerprint(tower, "57")
    name, weight = next(iter(tower.items()))
    other = weight.detach().clone()
    other.view(-1)[-1] += 1e-3
    assert vision.fingerprint({**tower, name: other}, "56 pixels") != first
    assert vision.fingerprint({**tower, name: weight.detach().bfloat16()}, "56 pixels") != first
