"""From a folder of a person's own pictures to an index and its answers, under their own names."""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from elva.commands.index_folder import build
from elva.data.formats import convert_file
from elva.data.formats.scan import scan
from elva.errors import DataError, UserError
from elva.index import Index
from elva.model.identity import Identity
from elva.model.rollout import Encoded
from elva.report import pictures as report_pictures
from tests.elva import families, people
from tests.elva.people import FAULTS, GOOD, call, draw


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people.make(tmp_path_factory.mktemp("of a person") / "Bilder von mir")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write(tmp_path_factory.mktemp("model") / "small", "qwen2_vl", tied=True)


def test_answers_bear_the_pictures_names_by_way_of_data(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    convert_file("folder", root, data, split="test", skip_bad=3)
    call("embed", model, "--data", data, "--output", tmp_path / "e", "--metadata",
         "--mode", "prompt", "--sides", "pools")  # fmt: skip
    call("index", "build", tmp_path / "i", tmp_path / "e" / "mbeir_folder_task4_cand_pool")
    table = Index(tmp_path / "i").table.to_pylist()
    assert sorted(row["name"] for row in table) == GOOD == sorted(row["file"] for row in table)
    asked = ("search", tmp_path / "i", "--image", root / "gedreht" / "6.jpg")
    hits = json.loads(call(*asked, "-k", 50, "--json"))
    assert sorted(hit["name"] for hit in hits) == GOOD
    (only,) = json.loads(call(*asked, "--json", "--where", f"file={people.LINES}"))
    assert only["name"] == people.LINES
    tiles: list[Any] = []
    monkeypatch.setattr(
        report_pictures, "sheet", lambda path, title, shown, footer: tiles.extend(shown)
    )
    printed = call(*asked, "-k", 50, "--sheet", tmp_path / "found.png").splitlines()
    assert sorted(words for _, _, words in tiles) == GOOD
    assert len(printed) == len(GOOD) + 1 and r"zwei\nZeilen.png" in "\n".join(printed)


def test_a_folder_becomes_an_index_in_one_command(root: Path, model: Path, tmp_path: Path) -> None:
    words = ("index", "build", tmp_path / "i", "--folder", root, "--model", model)
    dry = json.loads(call(*words, "--dry-run", "--list-left-out", tmp_path / "left", "--json"))
    assert len((tmp_path / "left").read_text().splitlines()) == sum(dry["left_out"].values())
    assert dry["pictures"] == len(GOOD) + 3 and not (tmp_path / "i").exists()
    said = call(*words, code=2)
    assert "abgebrochen.jpg: unreadable picture: damaged" in said and "; --skip-bad leaves" in said
    assert not (tmp_path / "i.partial").exists()
    made = json.loads(call(*words, "--skip-bad", 3, "--list-left-out", tmp_path / "left", "--json"))
    assert made["items"] == len(GOOD) and made["bad"] == FAULTS
    assert made["left_out"] == {why: len(names) for why, names in people.LEFT_OUT.items()}
    assert len((tmp_path / "left").read_text().splitlines()) == sum(made["left_out"].values())
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    index = Index(tmp_path / "i")
    rows = index.table.to_pylist()
    assert [row["id"] for row in rows] == GOOD == [row["name"] for row in rows]
    by_name = {picture.name: picture for picture in scan(root).pictures}
    for row in rows:
        one = by_name[row["name"]]
        assert (row["size"], row["modified_ns"], row["digest"]) == (
            one.size, one.modified_ns, one.digest(),
        )  # fmt: skip
    assert index.about["folder"] == str(root) and set(index.about["instructions"]) == {
        "text", "image", "image,text",
    }  # fmt: skip
    hits = json.loads(call("search", tmp_path / "i", "a flower", "-k", 3, "--json"))
    assert len(hits) == 3 and all((root / hit["name"]).samefile(hit["image"]) for hit in hits)
    assert "pass --overwrite to replace it" in call(*words, code=2)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("--folder", "{there}"), "--folder must come with --model"),
        (("--folder", "{there}", "--model", "m", "--npy", "x.npy"), "--folder must come alone"),
        (("--folder", "{there}/absent", "--model", "m"), "absent: not a folder"),
        (("--folder", "{there}", "--model", "m", "--dtype", "int8"), "--dtype must be one of"),
        (("--npy", "x.npy", "--skip-bad", "2"), "are for --folder"),
        (("{there}", "--dry-run"), "are for --folder"),
        (("--model", "m"), "must be given embeddings, --folder with --model, or --npy"),
        (("{there}", "--model", "m"), "--model is for --folder and --npy"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    words: tuple[str, ...], rule: str, tmp_path: Path
) -> None:
    draw(tmp_path / "s" / "a.png", "red")
    filled = [word.format(there=tmp_path / "s") for word in words]
    assert rule in call("index", "build", tmp_path / "i", *filled, code=2)
    assert not (tmp_path / "i").exists()


def test_a_place_that_is_taken_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    draw(tmp_path / "s" / "a.png", "red")
    words = ("index", "build", tmp_path / "i", "--folder", tmp_path / "s", "--model", "none")
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "mine.txt").touch()
    assert "i: must be empty or an index" in call(*words, code=2)
    shutil.move(tmp_path / "i", tmp_path / "i.partial")
    assert "i.partial: must not exist" in call(*words, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.partial", "s"]


class MeanColour:
    """An encoder that counts what it sees, and is stopped at will."""

    identity = Identity("mean colour", "1", "RGB over white")
    about: ClassVar[dict[str, str]] = {}
    embedding_size = 3
    modalities = frozenset({"image"})
    instructed = False

    def __init__(self, stops_at: str = "") -> None:
        self.stops_at = stops_at
        self.seen: list[str] = []

    def check(self, item: Any) -> None:
        item.load_image()

    def __call__(self, items: Any, progress: Any = None) -> Encoded:
        if any(item.id == self.stops_at for item in items):
            raise KeyboardInterrupt
        self.seen += [item.id for item in items]
        rows = [np.asarray(item.load_image(), np.float32).mean((0, 1)) + 1 for item in items]
        return Encoded(torch.from_numpy(np.stack(rows)), [""] * len(items))


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[int] = []

    def start(self, what: str, total: int | None, unit: str = "steps") -> None: ...

    def advance(self, done: int, values: dict[str, float] | None = None) -> None:
        self.done.append(done)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def finish(self, line: str) -> None: ...


def small(place: Path) -> Path:
    """Seven pictures, one of them damaged, and captions."""
    for i, colour in enumerate(("red", "green", "blue", "white", "black", "gold", "pink")):
        draw(place / f"{i}.png", colour)
    (place / "1.png").write_bytes((place / "1.png").read_bytes()[:-30])
    rows = ["file,caption,year,digest", "0.png,red,2001,x", "0.png,rot,2001,x", "6.png,pink,2007,y"]
    (place / "captions.csv").write_text("\n".join(rows))
    return place


def test_a_killed_build_goes_on_and_ends_alike(tmp_path: Path) -> None:
    root, index, options = (
        small(tmp_path / "s"),
        tmp_path / "i",
        {"skip_bad": 1, "part_pictures": 2},
    )
    with pytest.raises(KeyboardInterrupt):
        build(index, root, MeanColour("4.png"), **options)
    assert not index.exists()
    encoder, told = MeanColour(), Told()
    made, found = build(index, root, encoder, reporter=told, **options)
    assert (
        encoder.seen == ["4.png", "5.png", "6.png"] and "2 of 4 parts are there" in told.lines[-1]
    )
    assert found["bad"] == ["1.png: unreadable picture: damaged: it ends early"]
    whole, _ = build(tmp_path / "whole", root, MeanColour(), skip_bad=1)
    assert made.table.equals(whole.table)
    assert torch.equal(made.embeddings(range(6)), whole.embeddings(range(6)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "s", "whole"]


def test_a_killed_build_of_other_pictures_begins_anew(tmp_path: Path) -> None:
    root, index = small(tmp_path / "s"), tmp_path / "i"
    options = {"skip_bad": 1, "part_pictures": 2, "overwrite": True}
    for change in ("a new picture", "another caption", "a damaged plan"):
        with pytest.raises(KeyboardInterrupt):
            build(index, root, MeanColour("4.png"), **options)
        if change == "a new picture":
            draw(root / "9.png", "grey")
        elif change == "another caption":
            (root / "captions.csv").write_text("file,caption\n0.png,crimson\n")
        else:
            (tmp_path / "i.partial" / "embeddings.json").write_text("{}")
        encoder = MeanColour()
        made, _ = build(index, root, encoder, **options)
        assert encoder.seen[0] == "0.png" and len(made) == len(encoder.seen) == 7, change
    (tmp_path / "i.partial").mkdir()
    (tmp_path / "i.partial" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"i.partial: must not exist"):
        build(index, root, MeanColour(), skip_bad=1, overwrite=True)
    assert (tmp_path / "i.partial" / "mine.txt").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("elva.commands.index_folder.check", interrupted)
    monkeypatch.setattr("elva.data.formats.folder.scan", interrupted)
    root = small(tmp_path / "s")
    words = ("index", "build", tmp_path / "i", "--folder", root, "--model", "m")
    assert "call it again, and a folder's goes on" in call(*words, code=130)
    words = ("data", "convert", "folder", root, "--output", tmp_path / "o")
    assert call(*words, code=130) == "elva: interrupted; nothing is written\n"


def test_captions_are_fields_of_the_index(tmp_path: Path) -> None:
    told = Told()
    made, found = build(
        tmp_path / "i", small(tmp_path / "s"), MeanColour(), skip_bad=1, reporter=told
    )
    rows = {row["id"]: row for row in made.table.to_pylist()}
    assert (rows["0.png"]["caption"], rows["0.png"]["year"]) == ("red / rot", 2001.0)
    assert rows["6.png"]["source_digest"] == "y" and len(rows["6.png"]["digest"]) == 64
    assert rows["2.png"]["caption"] is None and rows["2.png"]["text"] is None
    captions = "3 captions of 2 pictures from captions.csv; 5 pictures have none"
    assert told.lines[0] == captions == found["notices"][0] and told.done[-1] == 7


def test_a_folder_without_a_picture_that_can_be_read_gives_no_index(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.svg").write_text("<svg/>")
    rule = r"s: holds no picture that is read; left out: 1 of a format that is not read: 1 .svg$"
    with pytest.raises(DataError, match=rule):
        build(tmp_path / "i", tmp_path / "s", MeanColour())
    (tmp_path / "s" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="a picture that can be read"):
        build(tmp_path / "i", tmp_path / "s", MeanColour(), skip_bad=5)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(DataError, match=r"s: not a folder$"):
        build(tmp_path / "i", tmp_path / "s", MeanColour())
