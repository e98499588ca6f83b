"""An index follows its folder: only what is new is embedded, and a killed sync goes on."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from elva.cli import app
from elva.commands import index_folder, sync_index
from elva.data.formats import convert_file
from elva.data.formats.scan import PictureFile, scan
from elva.data.strict import Faults
from elva.errors import DataError, IndexFault, UserError
from elva.index import Index, folder
from elva.index.compact import compact
from elva.model.identity import Identity
from elva.model.rollout import Encoded
from tests.elva import families

CALLS = ("open", "write", "pwrite", "fsync", "replace", "link")


class Colours:
    """An encoder that tells what it has seen."""

    about: ClassVar[dict[str, str]] = {}
    embedding_size = 16
    modalities = frozenset({"image"})
    instructions = "unread"

    def __init__(self, revision: str = "1") -> None:
        self.identity = Identity("colours", revision, "RGB")
        self.seen: list[str] = []

    def check(self, item: Any) -> None:
        item.load_image()

    def __call__(self, items: Any, progress: Any = None) -> Encoded:
        pixels = [np.asarray(item.load_image(), np.float32) for item in items]
        self.seen += [item.id for item in items]
        rows = [np.resize(p.mean((0, 1)) + 1, 16) for p in pixels]
        return Encoded(torch.from_numpy(np.stack(rows)), [f"about {i.id}" for i in items])


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(np.random.default_rng(seed).integers(0, 255, 3).tolist())
    Image.new("RGB", (8, 8), colour).save(path)


def stir(root: Path, step: int) -> None:
    """A folder as a person leaves it from one day to the next: some of each kind of change."""
    names = sorted(p for p in root.rglob("*.png"))
    for path in names[step % 3 :: 7]:
        path.unlink()
    for path in names[(step + 1) % 3 :: 6]:
        if path.exists():
            draw(path, 1000 * step + int(path.stem.strip("b")))
    for path in [p for p in names[(step + 2) % 3 :: 9] if p.exists()]:
        path.rename(path.with_name(f"b{path.name}"))
    for i in range(5):
        draw(root / f"{step}" / f"{100 * step + i}.png", 7000 + 100 * step + i)
    (root / "captions.csv").write_text(
        "file,caption\n"
        + "".join(f"{p.name},day {step}\n" for p in sorted(root.rglob("*.png"))[:3])
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for i in range(20):
        draw(tmp_path / "s" / f"{i:03d}.png", i)
    index_folder.build(tmp_path / "i", tmp_path / "s", Colours())
    return tmp_path


def sync(place: Path, encoder: Any = None, **options: Any) -> tuple[Index, dict[str, Any]]:
    return sync_index.sync(place / "i", place / "s", lambda: encoder or Colours(), **options)


def content(index: Index) -> dict[str, dict[str, Any]]:
    """Name -> embedding and what is known of it, but for the summary, which may keep the name that
    the picture was embedded under."""
    rows = index.alive.nonzero()[0]
    return {
        one["id"]: {k: v for k, v in one.items() if v is not None and k != "summary"} | {"row": row}
        for one, row in zip(
            index.table.take(rows).to_pylist(), index.embeddings(rows).tolist(), strict=True
        )
    }


def is_as_the_folder(place: Path) -> bool:
    """Equal, in embeddings and fields, to an index that is built of the folder anew."""
    whole, _ = index_folder.build(place / "whole", place / "s", Colours(), overwrite=True)
    found, wanted = content(Index(place / "i")), content(whole)
    return found == wanted


def test_each_kind_of_change_is_told_and_only_new_contents_are_embedded(place: Path) -> None:
    root = place / "s"
    draw(root / "new" / "x.png", 99)
    draw(root / "003.png", 98)
    (root / "004.png").rename(root / "moved.png")
    shutil.copyfile(root / "005.png", root / "copy.png")
    os.utime(root / "006.png", ns=(1, 1))
    (root / "captions.csv").write_text("file,caption\n007.png,seven\n")
    (root / "008.png").unlink()
    wanted = {
        "new": ["new/x.png"], "changed": ["003.png"], "moved": ["copy.png", "moved.png"],
        "relabelled": ["006.png", "007.png"], "gone": ["004.png", "008.png"],
    }  # fmt: skip
    plan = sync_index.compare(place / "i", root, Faults()).plan
    assert {k: getattr(plan, k) for k in wanted} == wanted and len(plan.unchanged) == 15
    encoder = Colours()
    index, done = sync(place, encoder)
    assert encoder.seen == ["003.png", "new/x.png"]
    assert {k: done[k] for k in wanted} == {k: len(v) for k, v in wanted.items()}
    assert is_as_the_folder(place)
    again, done = sync(place, None)
    assert done["unchanged"] == 21 == len(again) and sum(done[k] for k in wanted) == 0
    assert again.manifest.generation == index.manifest.generation  # nothing was written
    rows = {one["id"]: one for one in index.table.to_pylist()}
    assert rows["moved.png"]["summary"] == "about 004.png"
    assert rows["007.png"]["caption"] == "seven" and rows["009.png"]["caption"] is None


def test_many_days_of_changes_end_as_an_index_built_anew(place: Path) -> None:
    for step in range(1, 5):
        stir(place / "s", step)
        sync(place, batch=3)
        if step % 2 == 0:
            compact(place / "i")
        assert is_as_the_folder(place), step


def test_a_picture_that_cannot_be_read_is_one_line_and_its_old_row_stays(
    place: Path, monkeypatch: Any
) -> None:
    before = content(Index(place / "i"))
    draw(place / "s" / "zz.png", 50)
    for name in ("005.png", "zy.png"):
        (place / "s" / name).write_bytes((place / "s" / "005.png").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"^005.png: unreadable picture: damaged.* as many$") as one:
        sync(place)
    assert "\n" not in str(one.value) and "005.png" in content(Index(place / "i"))
    with pytest.raises(DataError, match=r"^zy.png: .*; 1 bad row was allowed, this is number 2$"):
        sync(place, skip_bad=1)
    told = ("new", "changed", "kept", "unread", "gone", "unchanged")
    index, done = sync(place, skip_bad=2)
    assert [done[kind] for kind in told] == [1, 0, 1, 1, 0, 19] and len(done["bad"]) == 2
    found = content(index)
    assert found.pop("zz.png") and found == before
    again, done = sync(place, skip_bad=2)  # they are tried again, and nothing else is done
    assert [done[kind] for kind in told] == [0, 0, 1, 1, 0, 20]
    assert again.manifest.generation == index.manifest.generation

    def closed(self: PictureFile) -> str:
        raise DataError(f"{self.name}: Permission denied")

    monkeypatch.setattr(PictureFile, "digest", closed)
    with pytest.raises(DataError, match=r"^005.png: Permission denied; --skip-bad"):
        sync(place)
    assert [sync(place, skip_bad=2)[1][kind] for kind in told] == [0, 0, 1, 1, 0, 20]


@pytest.mark.parametrize(
    ("told", "rule"),
    [
        (
            "file,caption\n001.png,Blüte\n".encode("cp1252"),
            r"captions.csv:2: not UTF-8 .*; no row of the file can be read$",
        ),
        (b"\xe4\xf6\xfc\n001.png,two\n", r"captions.csv:1: not UTF-8"),
        (
            b'file,caption\n"001.png,two\n',
            r"captions.csv:2: not csv: a quote that is never closed$",
        ),
    ],
)
def test_captions_that_cannot_be_read_are_no_bad_row(place: Path, told: bytes, rule: str) -> None:
    captions = place / "s" / "captions.csv"
    captions.write_text("file,caption\n001.png,one\n")
    index, _ = sync(place)
    captions.write_bytes(told)
    with pytest.raises(DataError, match=rule):
        sync(place, skip_bad=9)
    with pytest.raises(DataError, match=rule):
        index_folder.build(place / "j", place / "s", Colours(), skip_bad=9)
    with pytest.raises(DataError, match=rule):
        convert_file("folder", place / "s", place / "o", skip_bad=9)
    assert Index(place / "i").manifest == index.manifest and not (place / "j.partial").exists()
    captions.write_text("file,caption\n001.png,one\nnone.png,two\n")  # but a row is
    assert len(sync(place, skip_bad=1)[1]["bad"]) == 1
    assert content(Index(place / "i"))["001.png"]["caption"] == "one"


def test_what_cannot_be_looked_at_now_is_not_gone(place: Path, monkeypatch: Any) -> None:
    """A folder without its rights, a format without its reader; but a folder without any picture,
    as where a disk is not mounted, is refused."""
    draw(place / "s" / "deep" / "a.png", 60)
    index, _ = sync(place)
    real = scan

    def without(root: Path) -> Any:
        found = real(root)
        found.pictures = [p for p in found.pictures if p.name not in ("deep/a.png", "003.png")]
        found.leave_out("closed", "deep")
        found.leave_out("HEIF", "003.png")
        return found

    with monkeypatch.context() as patch:
        patch.setattr("elva.data.formats.folder.scan", without)
        kept, done = sync(place)
        assert content(kept) == content(index) and done["gone"] == 0
        draw(place / "s" / "003.png", 61)  # but what changed is not what the index holds
        assert sync(place)[1]["gone"] == 1
    for path in (place / "s").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="holds no picture that is read"):
        sync(place)
    assert len(Index(place / "i")) == 20


@pytest.mark.parametrize("call", ["sync", "build"])
def test_a_file_that_changes_while_it_is_embedded_is_left_to_the_next(
    place: Path, call: str
) -> None:
    class Slow(Colours):
        def __call__(self, items: Any, progress: Any = None) -> Encoded:
            out = super().__call__(items, progress)
            for item in items:
                if item.id == "x.png":
                    draw(place / "s" / "x.png", 71)
                    os.utime(place / "s" / "x.png", ns=(1, 9))
                elif item.id == "y.png":
                    (place / "s" / "y.png").unlink()
            return out

    for name in ("x", "y", "z"):
        draw(place / "s" / f"{name}.png", 70)
    if call == "sync":
        index, _ = sync(place, Slow())
    else:
        index, _ = index_folder.build(place / "i", place / "s", Slow(), overwrite=True)
    assert {*content(index)} == {*(f"{i:03d}.png" for i in range(20)), "z.png"}
    sync(place)
    assert is_as_the_folder(place)


def test_rows_that_are_none_of_the_folders_stay(place: Path) -> None:
    Index(place / "i").add(["mine"], torch.ones(1, 16), model=Colours().identity)
    (place / "s" / "001.png").unlink()
    index, done = sync(place)
    assert done["gone"] == 1 and "mine" in content(index)


def test_a_word_among_numbers_makes_the_field_one_of_texts(place: Path) -> None:
    captions = place / "s" / "captions.csv"
    rows = ["file,caption,year", *(f"{i:03d}.png,{i},199{i}" for i in range(5))]
    captions.write_text("\n".join(rows))
    index, _ = sync(place, batch=2)
    assert {type(row.get("caption")) for row in content(index).values()} == {str, type(None)}
    captions.write_text("\n".join([*rows[:3], "002.png,one,long ago", *rows[4:]]))
    draw(place / "s" / "003.png", 80)
    encoder = Colours()
    index, done = sync(place, encoder, batch=2)
    assert encoder.seen == ["003.png"] and done["changed"] == 1 and is_as_the_folder(place)
    assert content(index)["004.png"]["year"] == "1994" and not index.conflicts
    assert sync(place)[1]["unchanged"] == 20
    compact(place / "i")
    assert is_as_the_folder(place)


def test_fields_of_another_type_are_refused_before_anything_is_embedded(place: Path) -> None:
    model = Colours().identity
    Index(place / "i").add(["x"], torch.ones(1, 16), model=model, columns={"year": [1999.0]})
    (place / "s" / "captions.csv").write_text("file,caption,year\n001.png,one,long ago\n")
    draw(place / "s" / "new.png", 80)
    encoder = Colours()
    with pytest.raises(IndexFault, match="field year must be of type double as in items that"):
        sync(place, encoder)
    assert encoder.seen == [] and len(Index(place / "i")) == 21


def test_another_model_or_folder_is_refused(place: Path) -> None:
    draw(place / "s" / "new.png", 90)
    with pytest.raises(IndexFault, match="model must be the one that made"):
        sync(place, Colours("2"))
    draw(place / "o" / "a.png", 1)
    with pytest.raises(IndexFault, match=r"must be synced with its own folder, .*/s, got .*/o;"):
        sync_index.sync(place / "i", place / "o", Colours)
    (place / "link").symlink_to(place / "s")  # the same folder by another way
    assert sync_index.sync(place / "i", place / "link", Colours)[1]["new"] == 1
    Index.build(place / "n", ["a"], torch.ones(1, 16), model=Colours().identity)
    with pytest.raises(IndexFault, match="must be of a folder to be synced"):
        sync_index.sync(place / "n", place / "s", Colours)
    assert len(Index(place / "i")) == 21


@pytest.mark.thorough
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.thorough)])
def test_killed_at_any_moment_a_sync_goes_on(place: Path, kills: int) -> None:
    """Every index on the way is whole, no row is of another picture, and the next sync ends as one
    that nobody killed."""
    draws, seen, duration, step = random.Random(0), Counter(), 0.2, 0
    while step < kills or (seen["none"] == step and step < 20 * kills):
        step += 1
        stir(place / "s", step)
        before = content(Index(place / "i"))
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                sync(place, batch=2)
            finally:
                os._exit(0)
        time.sleep(draws.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = Index(place / "i")  # every byte compared
        digests = {p.name: p.digest() for p in scan(place / "s").pictures}
        found = content(now)
        for name, row in found.items():
            assert row == before.get(name) or row["digest"] == digests[name], (step, name)
        whole = found.keys() == digests.keys()
        seen["none" if found == before else "all" if whole else "some"] += 1
        began = time.monotonic()
        sync(place, batch=2)  # the rest: all of it where nothing was done
        duration = max(0.9 * duration, 1.2 * (time.monotonic() - began))
        if step % 5 == 0:
            assert is_as_the_folder(place), step
            compact(place / "i")
        assert not list((place / "i").rglob("*.partial"))
    assert is_as_the_folder(place)
    print(f"\n{step} kills while syncing: {dict(seen)} of the changes were done")
    assert seen["none"] < step


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.thorough)])
def test_every_write_that_fails_leaves_an_index_that_goes_on(
    place: Path, every: int, monkeypatch: Any
) -> None:
    number = errno.ENOSPC
    stir(place / "s", 1)
    shutil.copytree(place / "i", place / "kept")
    sync(place, batch=8)
    wanted = content(Index(place / "i"))
    tried = 0
    for n in range(1, 1000, every):
        shutil.rmtree(place / "i")
        shutil.copytree(place / "kept", place / "i")
        left = [n]

        def fail(real: Any, left: list[int] = left) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(number, os.strerror(number))
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, fail(getattr(os, name)))
            try:
                sync(place, batch=8)
            except (OSError, UserError) as error:
                assert os.strerror(number) in str(error)
        assert not list((place / "i").rglob("*.partial"))
        Index(place / "i")
        if left[0] > 0:
            break
        tried += 1
        sync(place, batch=8)
        assert content(Index(place / "i")) == wanted, n
    print(f"\n{tried} writes of a sync failed: each index went on")
    assert left[0] > 0 and tried > 10


def test_watching_syncs_after_each_change_and_says_what_it_cannot_read(place: Path) -> None:
    said: list[str] = []

    class Told:
        def start(self, *_: Any) -> None: ...
        def advance(self, *_: Any) -> None: ...
        def finish(self, line: str) -> None: ...
        def say(self, line: str) -> None:
            said.append(line)

    def changes() -> Any:
        draw(place / "s" / "a.png", 1)
        yield {}
        assert "a.png" in content(Index(place / "i"))
        (place / "s" / "b.png").write_bytes(b"\x89PNG")  # still being copied
        yield {"b.png"}
        draw(place / "s" / "b.png", 2)
        generation = Index(place / "i").manifest.generation
        yield {}
        assert Index(place / "i").manifest.generation == generation
        yield {"b.png"}

    sync_index.follow(place / "i", place / "s", lambda: sync(place), Told(), changes())
    assert is_as_the_folder(place)
    assert said[0].endswith("Ctrl-C ends it") and said[1].startswith("b.png: unreadable picture")


def call(*words: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["index", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    if code:
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def test_the_command_says_what_is_done(tmp_path: Path, monkeypatch: Any) -> None:
    """With a model of ours, which is opened only where there is something to embed."""
    model, other = (families.write(tmp_path / n, "qwen2_vl", seed=i) for i, n in enumerate("mo"))
    for i in range(3):
        draw(tmp_path / "s" / f"{i}.png", i)
    words = ("sync", tmp_path / "i", "--folder", tmp_path / "s")
    assert "must be an index, got no index.json" in call(*words, code=2)
    call("build", tmp_path / "i", "--folder", tmp_path / "s", "--model", model)
    assert "0 new, 0 changed, 0 moved, 0 relabelled, 0 gone, 3 unchanged" in call(*words)
    draw(tmp_path / "s" / "new.png", 9)
    (tmp_path / "s" / "1.png").unlink()
    dry = call(*words, "--dry-run")
    assert "1 new, 0 changed, 0 moved, 0 relabelled, 1 gone, 2 unchanged" in dry
    assert "  new: new.png\n  gone: 1.png\n" in dry
    (tmp_path / "s" / "notes.xyz").touch()
    assert "left out: 1 of a format that is not read: 1 .xyz" in call(*words, "--dry-run")
    planned = json.loads(call(*words[:2], "--dry-run", "--json"))  # of the folder that it notes
    assert planned["new"] == ["new.png"] and planned["left_out"] == {"formats": 1}
    assert "model must be the one that made" in call(*words, "--model", other, code=2)
    done = json.loads(call(*words, "--json"))
    assert (done["new"], done["gone"], done["items"]) == (1, 1, 3)
    assert done.keys() == planned.keys() and done["notices"] == planned["notices"]
    shutil.move(model, tmp_path / "moved")
    call(*words)  # nothing to embed: no model is looked for
    draw(tmp_path / "s" / "more.png", 10)
    assert "must be a run, a checkpoint or a hub name" in call(*words, code=2)
    assert json.loads(call(*words, "--model", tmp_path / "moved", "--json"))["new"] == 1
    assert f"folder: {tmp_path / 's'}" in call("info", tmp_path / "i")
    monkeypatch.setitem(__import__("sys").modules, "watchfiles", None)
    assert "pip install 'elva[watch]'" in call(*words, "--watch", code=2)


def test_the_index_of_a_folder_knows_what_a_sync_compares() -> None:
    assert {"size", "modified_ns", "digest"} <= folder.OWN
