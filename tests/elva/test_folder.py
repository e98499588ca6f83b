"""A folder of a person's own pictures, from converting to the answer, under its own names."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from elva.cli import app
from elva.commands.index_folder import build
from elva.data import load
from elva.data.formats import convert_file, folder
from elva.data.formats.places import Places
from elva.data.formats.scan import scan
from elva.data.schema import hashed_id
from elva.data.strict import Faults
from elva.errors import DataError, UserError
from elva.index import Index
from elva.model.identity import Identity
from elva.model.rollout import Encoded
from elva.report import pictures as report_pictures
from tests.elva import families, people
from tests.elva.test_data_pictures import CORNERS, SIZE

GOOD = sorted([*people.pictures(), "verweis.jpg"])
DAMAGED = [
    "abgebrochen.jpg: unreadable picture: damaged: it ends early",
    "leer.png: unreadable picture: the file is empty",
    "text.jpg: unreadable picture: it is a text",
]
LEFT_OUT = [
    "left out: 4 of formats that are not read: 2 .svg, 1 without an ending, 1 .mov",
    "left out: 1 too large or too long a picture",
    "left out: 5 hidden files of systems and tools",
    "left out: 2 thumbnails that a tool keeps",
    "left out: 2 links that lead out of the folder",
    "left out: 1 links to its own folders, whose files are read where they lie",
    "left out: 1 links that lead nowhere",
    "left out: 1 names that are not UTF-8; rename them, e.g. with convmv",
    "left out: 1 pipes, sockets and devices",
]
KEPT = "2 pictures show what another one shows, and are kept; --duplicates drop leaves them out"


def call(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people.make(tmp_path_factory.mktemp("of a person") / "Bilder von mir")


class Converted(NamedTuple):
    data: Path
    printed: dict[str, Any]
    listed: list[str]
    tiles: list[tuple[Image.Image, str, str]]


@pytest.fixture(scope="module")
def converted(root: Path) -> Converted:
    place = root.parent
    tiles: list[Any] = []
    whole = report_pictures.sheet
    with pytest.MonkeyPatch.context() as patch:

        def sheet(path: Path, title: str, shown: list[Any], footer: str | None) -> None:
            tiles.extend(shown)
            whole(path, title, shown, footer)

        patch.setattr(report_pictures, "sheet", sheet)
        printed = call(
            "data", "convert", "folder", root, "--output", place / "data", "--split", "test",
            "--skip-bad", 3, "--sheet", place / "sheet.png", "--list-left-out", place / "left.tsv",
            "--json",
        )  # fmt: skip
    assert Image.open(place / "sheet.png").width > 1000
    listed = (place / "left.tsv").read_text(encoding="utf-8").splitlines()
    return Converted(place / "data", json.loads(printed), listed, tiles)


def files(data: Path) -> dict[str, dict[str, Any]]:
    """Own name -> a candidate's row."""
    (path,) = (data / "cand_pool" / "local").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {json.loads(row["src_content"])["file"]: row for row in rows}


# -- converting ------------------------------------------------------------------------------------


def test_nothing_is_left_out_without_a_word(root: Path, converted: Converted) -> None:
    printed = converted.printed
    assert printed["queries"] == {"i2i": len(GOOD)} and printed["candidates"] == len(GOOD)
    assert printed["pictures"] == len(GOOD) and printed["bad"] == DAMAGED
    notice = "there are no captions: each picture asks for itself"
    assert printed["notices"] == [notice, KEPT, *LEFT_OUT]
    counts = {why: len(names) for why, names in people.LEFT_OUT.items()}
    assert printed["left_out"] == {**counts, "damaged": 3}
    why_and_name = [line.split("\t") for line in converted.listed]
    everything = sum(counts.values()) + 3
    assert len(why_and_name) == everything
    assert [
        "names that are not UTF-8; rename them, e.g. with convmv",
        r"Bl\xfcte.png",
    ] in why_and_name
    assert ["damaged", "leer.png"] in why_and_name
    below = sum(len(names) for _, _, names in os.walk(root)) + 2  # and two links to folders
    assert below == len(GOOD) + everything


def test_without_skip_bad_a_damaged_one_is_one_line_and_nothing_is_written(
    root: Path, tmp_path: Path
) -> None:
    said = call("data", "convert", "folder", root, "--output", tmp_path / "o", code=2)
    assert said == f"elva: {DAMAGED[0]}; --skip-bad leaves out as many\n"
    assert not list(tmp_path.iterdir())
    said = call(
        "data", "convert", "folder", root, "--output", tmp_path / "o", "--skip-bad", 2, code=2
    )
    assert said == f"elva: {DAMAGED[2]}; 2 bad rows were allowed\n"


def test_pictures_keep_their_names_and_bytes(root: Path, converted: Converted) -> None:
    found = files(converted.data)
    assert sorted(found) == GOOD
    for name, row in found.items():
        place = converted.data / row["img_path"]
        assert place.read_bytes() == (root / name).read_bytes()
        assert row["img_path"] == f"mbeir_images/folder_images/{name}"
    checked = json.loads(call("data", "check", converted.data, "--decode", "--json"))
    assert not checked["bad"] and checked["copies"] == 2


def test_pictures_come_back_upright(converted: Converted) -> None:
    pool = load(converted.data, split="test").pool("i2i")
    seen = 0
    for row in range(len(pool)):
        if str(pool.extra(row)["file"]).startswith("gedreht/"):
            image = pool[row].load_image()
            at = ((2, 2), (45, 2), (2, 29), (45, 29))
            found = np.array([image.getpixel(place) for place in at])
            assert image.size == SIZE == pool[row].image_size()
            assert np.abs(found - np.array(CORNERS)).max() < 4
            seen += 1
        elif pool.extra(row)["file"] == "gross.jpg":
            assert pool[row].load_image().size == (5800, 4350)
    assert seen == 8


def test_the_sheet_shows_own_names_under_upright_pictures(converted: Converted) -> None:
    assert [words for _, _, words in converted.tiles] == GOOD
    turned = [image for image, _, words in converted.tiles if words.startswith("gedreht/")]
    assert [image.getpixel((2, 2))[0] > 250 for image in turned] == [True] * 8
    assert report_pictures._short(people.LINES, 56) == r"zwei\nZeilen.png"
    short = report_pictures._short(people.LONG, 56)
    assert len(short) == 56 and short.endswith(".png") and "…" in short


def test_copies_are_dropped_where_they_are_not_wanted(root: Path, tmp_path: Path) -> None:
    settings = {"split": "test", "skip_bad": 3, "duplicates": "drop"}
    counts = convert_file("folder", root, tmp_path / "o", **settings)
    assert counts["left_out"]["duplicates"] == ["kopie/a.jpe", "verweis.jpg"]
    assert counts["candidates"] == len(GOOD) - 2
    assert "left out: 2 that show what another picture shows" in counts["notices"]
    with pytest.raises(DataError, match="duplicates must be keep or drop, got 'x'"):
        convert_file("folder", root, tmp_path / "p", duplicates="x")
    with pytest.raises(DataError, match="duplicates is for folder, got it for nli"):
        convert_file("nli", root, tmp_path / "p", duplicates="drop")


def draw(path: Path, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def ids(data: Path) -> dict[str, str]:
    return {name: row["did"] for name, row in files(data).items()}


def test_two_folders_share_no_id_and_one_folder_keeps_its_own(tmp_path: Path) -> None:
    for name, colours in (("a", ("red", "blue")), ("b", ("green", "blue"))):
        for i, colour in enumerate(colours):
            draw(tmp_path / name / f"{i}.png", colour)
        convert_file("folder", tmp_path / name, tmp_path / f"data {name}")
    first, second = ids(tmp_path / "data a"), ids(tmp_path / "data b")
    assert not {*first.values()} & {*second.values()}
    draw(tmp_path / "a" / "0 before.png", "white")
    draw(tmp_path / "a" / "2.png", "black")
    convert_file("folder", tmp_path / "a", tmp_path / "later")
    later = ids(tmp_path / "later")
    assert {**later, **first} == later and len(set(later.values())) == 4
    assert all(hashed_id(id) > 0 for id in later.values())
    convert_file("folder", tmp_path / "a", tmp_path / "numbered", number=77)
    assert all(id.startswith("77:") for id in ids(tmp_path / "numbered").values())


def test_a_folder_is_asked_by_words_a_picture_or_both(tmp_path: Path) -> None:
    draw(tmp_path / "s" / "a.png", "red")
    convert_file("folder", tmp_path / "s", tmp_path / "o")
    convert_file("folder", tmp_path / "s", tmp_path / "p", instruction="Find it.")
    number = folder.dataset_number(tmp_path / "s")
    from elva.data.mbeir import first_instructions

    assert first_instructions(tmp_path / "o", number, "image") == {
        "text": "Find the picture.", "image": "Find the same picture.",
        "image,text": "Find the picture that is so changed.",
    }  # fmt: skip
    assert set(first_instructions(tmp_path / "p", number, "image").values()) == {"Find it."}


def test_captions_of_pictures_that_are_left_out_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "s"
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        draw(root / name, colour)
    (root / "d.png").write_bytes((root / "c.png").read_bytes()[:-30])
    rows = ["file,caption,file name", "a.png,one,x", "b.png,two,y", "d.png,three,z"]
    (root / "captions.csv").write_text("\n".join(rows))
    counts = convert_file("folder", root, tmp_path / "o", skip_bad=1, duplicates="drop")
    assert counts["queries"] == {"t2i": 2} and counts["candidates"] == 2
    assert "1 captions are left out with their pictures" in counts["notices"]
    data = load(tmp_path / "o")
    pool = data.pool("t2i")
    answers = {q.text: [pool.extra(pool.row(p))["file"] for p in q.positives] for q in data.queries}
    assert answers == {"One.": ["a.png"], "Two.": ["a.png"]}
    assert pool.extra(0) == {"file": "a.png", "caption": "one", "file name": "x"}


def test_pictures_that_need_an_extra_are_counted_with_its_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    draw(tmp_path / "s" / "a.png", "red")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "s" / "b.heic", "HEIF")
    (tmp_path / "s" / "c.jpg").write_bytes((tmp_path / "s" / "b.heic").read_bytes())
    assert convert_file("folder", tmp_path / "s", tmp_path / "o")["candidates"] == 3
    monkeypatch.setattr("elva.data.pictures.find_spec", lambda name: None)
    counts = convert_file("folder", tmp_path / "s", tmp_path / "p")
    assert counts["left_out"] == {"HEIF": ["b.heic", "c.jpg"]} and counts["candidates"] == 1
    line = "left out: 2 HEIC pictures; pip install 'elva[heif]' to read them"
    assert line in counts["notices"]
    assert folder.contents(tmp_path / "s", Faults()).notices == [line]


# -- names and places ------------------------------------------------------------------------------


def test_a_name_that_cannot_be_kept_gives_way_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "0000000.png", "red")
    places = Places(tmp_path / "o", "mine")
    put = [
        places.put(tmp_path / "0000000.png", name, "")
        for name in ("0000/0000000.png", r"a\..\b.png", "x/" * 1500 + "c.png", "data:.png", "d.png")
    ]
    numbered = [f"mbeir_images/mine_images/0000/{i:07d}.png" for i in range(3)]
    own = "mbeir_images/mine_images"
    assert put == [numbered[0], numbered[1], numbered[2], f"{own}/data:.png", f"{own}/d.png"]
    assert places.put(tmp_path / "gone", "d.png", "") == put[-1] and len(places) == 5
    write = Places._write

    def refuse(self: Places, image: Path, place: Path) -> None:
        if "?" in place.name:
            raise OSError(errno.EINVAL, "Invalid argument")
        if place.name == "full.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, image, place)

    monkeypatch.setattr(Places, "_write", refuse)
    assert places.put(tmp_path / "0000000.png", "who?.png", "").endswith("/0000003.png")
    with pytest.raises(OSError, match="No space"):
        places.put(tmp_path / "0000000.png", "full.png", "")


def test_numbers_of_names_are_distinct_and_stay() -> None:
    names = [str(i) for i in range(50)]
    found = [Places(Path(), "x").number(name, 9_999_999) for name in names]
    assert all(1 <= number <= 9_999_999 for number in found) and len(set(found)) == 50
    one = Places(Path(), "x")
    assert sorted(one.number(name, 50) for name in names) == list(range(1, 51))


def test_what_cannot_be_looked_into_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "s" / "zu" / "a.png", "red")
    draw(tmp_path / "s" / "b.png", "red")
    (tmp_path / "s" / "im Kreis.png").symlink_to("im Kreis.png")
    draw(tmp_path / "s" / "data" / "mbeir_images" / "c.png", "red")
    listing = os.scandir

    def scandir(path: Path) -> Any:
        if Path(path).name == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    closed = "zu"
    (tmp_path / "link").symlink_to(tmp_path / "s")
    found = scan(tmp_path / "link")
    assert [picture.name for picture in found.pictures] == ["b.png"]
    assert found.left_out == {
        "closed": ["zu"],
        "links_broken": ["im Kreis.png"],
        "converted": ["data/mbeir_images/c.png"],
    }
    closed = "s"
    with pytest.raises(DataError, match=r"/s: Permission denied$"):
        scan(tmp_path / "s")
    with pytest.raises(DataError, match=r"b.png: not a folder$"):
        scan(tmp_path / "s" / "b.png")


def test_a_scan_tells_one_content_from_another(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        os.utime(draw(tmp_path / "s" / name, colour), ns=(1, 5_000_000_007))
    one, other, third = scan(tmp_path / "s").pictures
    assert one.digest() == other.digest() != third.digest()
    assert (
        one.modified_ns == 5_000_000_007 and one.size == (tmp_path / "s" / "a.png").stat().st_size
    )
    assert (one.item().id, one.item().load_image().size) == ("a.png", (8, 8))
    one.path.unlink()
    with pytest.raises(DataError, match=r"^a.png: No such file or directory$"):
        one.digest()


# -- from the folder to answers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write(tmp_path_factory.mktemp("model") / "small", "qwen2_vl", tied=True)


def test_answers_bear_the_pictures_names_by_way_of_data(
    root: Path, converted: Converted, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("embed", model, "--data", converted.data, "--output", tmp_path / "e", "--metadata",
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
    dry = json.loads(call(*words, "--dry-run", "--json"))
    assert dry["pictures"] == len(GOOD) + 3 and not (tmp_path / "i").exists()
    assert "abgebrochen.jpg: unreadable picture: damaged" in call(*words, code=2)
    made = json.loads(call(*words, "--skip-bad", 3, "--list-left-out", tmp_path / "left", "--json"))
    assert made["items"] == len(GOOD) and made["bad"] == DAMAGED
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
    ],
)
def test_what_cannot_be_built_is_one_line(
    words: tuple[str, ...], rule: str, tmp_path: Path
) -> None:
    draw(tmp_path / "s" / "a.png", "red")
    filled = [word.format(there=tmp_path / "s") for word in words]
    assert rule in call("index", "build", tmp_path / "i", *filled, code=2)
    assert not (tmp_path / "i").exists()


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
    rule = r"s: holds no picture that is read; left out: 1 of formats that are not read: 1 .svg$"
    with pytest.raises(DataError, match=rule):
        build(tmp_path / "i", tmp_path / "s", MeanColour())
    (tmp_path / "s" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="a picture that can be read"):
        build(tmp_path / "i", tmp_path / "s", MeanColour(), skip_bad=5)
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(DataError, match=r"s: not a folder$"):
        build(tmp_path / "i", tmp_path / "s", MeanColour())
