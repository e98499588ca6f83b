"""A folder of a person's own pictures, from converting to the answer, under its own names."""

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from elva.commands.search import write_sheet
from elva.data import load
from elva.data.formats import convert_file, folder
from elva.data.formats.places import Places
from elva.data.formats.scan import scan
from elva.data.schema import hashed_id
from elva.data.strict import Faults
from elva.errors import DataError
from elva.report import drawing
from elva.report import pictures as report_pictures
from elva.search import Hit
from tests.elva import people
from tests.elva.people import FAULTS, GOOD, call, draw
from tests.elva.test_data_pictures import CORNERS, SIZE

LEFT_OUT = [
    "left out: 4 of formats that are not read: 2 .svg, 1 without an ending, 1 .mov",
    "left out: 1 too large or too long a picture",
    "left out: 5 hidden files of systems and tools",
    "left out: 2 thumbnails that a tool keeps",
    "left out: 2 links that lead out of the folder",
    "left out: 1 link to its own folders, whose files are read where they lie",
    "left out: 1 link that leads nowhere",
    "left out: 1 name that is not UTF-8; rename it, e.g. with convmv",
    "left out: 1 pipe, socket or device",
]
KEPT = "2 pictures show what another one shows, and are kept; --duplicates drop leaves them out"


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
    assert printed["pictures"] == len(GOOD) and printed["bad"] == FAULTS
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
    assert said == f"elva: {FAULTS[0]}; --skip-bad leaves out as many\n"
    assert not list(tmp_path.iterdir())
    said = call(
        "data", "convert", "folder", root, "--output", tmp_path / "o", "--skip-bad", 2, code=2
    )
    assert said == f"elva: {FAULTS[2]}; 2 bad rows were allowed, this is number 3\n"


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
    from elva.data.instructions import first_instructions

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
    rows = ["file,caption,file name,name", "a.png,one,x,n", "b.png,two,y,n", "d.png,three,z,n"]
    (root / "captions.csv").write_text("\n".join(rows))
    counts = convert_file("folder", root, tmp_path / "o", skip_bad=1, duplicates="drop")
    assert counts["queries"] == {"t2i": 2} and counts["candidates"] == 2
    assert "1 caption is left out with its picture" in counts["notices"]
    assert "column name is kept as source_name: an index has its own" in counts["notices"]
    data = load(tmp_path / "o")
    pool = data.pool("t2i")
    answers = {q.text: [pool.extra(pool.row(p))["file"] for p in q.positives] for q in data.queries}
    assert answers == {"One.": ["a.png"], "Two.": ["a.png"]}
    assert pool.extra(0) == {"file": "a.png", "caption": "one", "file name": "x", "name": "n"}


def test_one_of_a_kind_is_said_in_the_singular(tmp_path: Path) -> None:
    draw(tmp_path / "s" / "a.png", "red")
    (tmp_path / "s" / "b.png").symlink_to("/dev/null")
    said = call("data", "convert", "folder", tmp_path / "s", "--output", tmp_path / "o")
    assert "1 candidate, 1 picture\n" in said
    assert "left out: 1 link that leads out of the folder\n" in said
    draw(tmp_path / "s" / "c.png", "red")
    said = call("data", "convert", "folder", tmp_path / "s", "--output", tmp_path / "p")
    kept = "1 picture shows what another one shows, and is kept; --duplicates drop leaves it out"
    assert kept in said and "2 candidates, 2 pictures\n" in said
    said = call("embed", "no model", "--data", tmp_path / "o", "--output", tmp_path / "e",
                "--dry-run", code=2)  # fmt: skip
    assert said.endswith("_test.jsonl; pass --split train\n")


def test_a_sheet_spells_what_no_font_has_and_tells_equal_names_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_drawn", lambda: frozenset(map(ord, "Blüte.png")))
    assert drawing.drawable("Blüte \u65e5.png") == r"Blüte \u65e5.png"
    monkeypatch.undo()
    assert drawing.families()[0] == "DejaVu Sans" and ord("ü") in drawing._drawn()
    assert drawing.drawable("Blüte\n\U000e0001") == "Blüte\n\\U000e0001"
    draw(tmp_path / "a.png", "red")
    hits = [
        Hit(rank, id, name, 0.5, "", tmp_path / "a.png")
        for rank, (id, name) in enumerate([("1:1", "a.png"), ("2:1", "a.png"), ("2:2", "b.png")])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiles: list[Any] = []
        monkeypatch.setattr(report_pictures, "sheet", lambda *given: tiles.extend(given[2]))
        write_sheet(hits, tmp_path / "sheet.png", "x")
    assert [words for _, _, words in tiles] == ["a.png (1:1)", "a.png (2:1)", "b.png"]


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


def test_pillows_own_warnings_are_nobodys_matter(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    Image.new("RGB", (8, 8)).save(tmp_path / "s" / "a.jpg", exif=exif)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "s" / "a.jpg") as image:
            image.getexif()
        assert any("Corrupt EXIF" in str(one.message) for one in told)
        told.clear()
        call("data", "convert", "folder", tmp_path / "s", "--output", tmp_path / "o")
    assert not any("EXIF" in str(one.message) for one in told)


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
