"""CC-Neg: rows of its list, those that are none, and the pickle that it is published as."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elva.data.formats import choices, convert_file
from elva.errors import DataError
from tests.elva import unseen
from tests.elva.unseen import converted, read, run


def test_ccneg_is_tested_on_its_last_rows_without_the_commas_of_the_negated(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "CCNEG_TEST", 3)
    one = read(converted("ccneg", tmp_path))["ccneg_task3"]
    assert [q.negatives for q in one.queries] and [item.text for item in one.pool][:2] == [
        "A lamp, number 1.", "A lamp without light number 1.",
    ]  # fmt: skip
    assert [len(one.queries), len(one.pool)] == [3, 6]
    train = read(converted("ccneg", tmp_path, "train"), "train")["ccneg_task3"]
    assert train.pool[0].text == "A lamp, number 0."
    few = convert_file("ccneg", tmp_path / "source", tmp_path / "few", split="test")
    assert few["notices"] == []
    monkeypatch.setattr(choices, "CCNEG_TEST", 40_000)
    few = convert_file("ccneg", tmp_path / "source", tmp_path / "all", split="test")
    assert few["notices"] == ["4 rows; CC-Neg evaluates on 40,000"]


def test_a_row_of_ccneg_that_is_left_out_keeps_its_place(tmp_path, monkeypatch):
    """And no row for training comes into the test in its stead."""
    monkeypatch.setattr(choices, "CCNEG_TEST", 3)
    unseen.neg(tmp_path / "source", [*map(unseen.neg_row, (0, 1)), 2, unseen.neg_row(3)])
    counts = convert_file("ccneg", tmp_path / "source", tmp_path / "x", split="test", skip_bad=1)
    assert counts["bad"] == [f"{tmp_path}/source/ccneg.json:12: [2]: not a JSON object"]
    one = read(tmp_path / "x")["ccneg_task3"]
    assert [item.text for item in one.pool][::2] == ["A lamp, number 1.", "A lamp, number 3."]
    with pytest.raises(DataError, match=r"ccneg.json:12: \[2\]: not a JSON object"):
        converted("ccneg", tmp_path)


@pytest.mark.parametrize("images", [None, ".", "ccneg_images", unseen.CCNEG_IMAGES])
def test_ccnegs_pictures_lie_where_its_paths_or_its_readme_say(images, tmp_path):
    root = "/workspace/datasets/cc3m/cc3m_subset_images_extracted_final"
    rows = [{**unseen.neg_row(i), "image_paths": f"{root}/{i}.jpg"} for i in (0, 1)]
    root = unseen.neg(tmp_path / "source", rows)
    found = read(converted("ccneg", tmp_path, images=None if images is None else root / images))
    assert len({query.load_image().getpixel((0, 0)) for query in found["ccneg_task3"].queries}) == 2


NEG = [
    ({"caption": 1}, r"ccneg.json:7: \[1\]: caption is not a string or null"),
    ({"caption": None}, r"ccneg.json:7: \[1\]: the caption is empty"),
    ({"negative-prompt": ", "}, r":7: \[1\]: the negative caption is empty"),
    ({"negative-prompt": "a lamp, number 1", "caption": "a lamp number 1"}, r"\[1\]: .* the same"),
    ({"image_paths": "/etc/passwd"}, r":7: \[1\]: .* is absolute"),
    ({"image_paths": "/workspace/datasets/cc3m/../a.jpg"},
     r":7: \[1\]: image_paths '../a.jpg' leaves the root"),
    ({"image_paths": "gone.jpg"}, r":7: \[1\]: no such picture: gone"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "rule"), NEG)
def test_a_row_of_ccneg_that_is_none(fields, rule, tmp_path):
    unseen.neg(tmp_path / "source", [unseen.neg_row(0), {**unseen.neg_row(1), **fields}])
    with pytest.raises(DataError, match=rule):
        converted("ccneg", tmp_path)


@pytest.mark.parametrize("field", ["image_paths", "caption", "negative-prompt"])
def test_a_row_of_ccneg_that_lacks_a_field(field, tmp_path):
    row = unseen.neg_row(0)
    del row[field]
    unseen.neg(tmp_path / "source", [row])
    with pytest.raises(DataError, match=rf"ccneg.json:2: \[0\]: {field} is missing"):
        converted("ccneg", tmp_path)


OPENED = """
import sys
from elva.cli import app
def told(event, words):
    if event == "open" and "/source/ccneg" in str(words[0]):
        print("opened", words[0])
sys.addaudithook(told)
app(sys.argv[1:])
"""
"""`elva`, and what of the source it opens."""


@pytest.mark.parametrize("named", ["", "ccneg_preprocessed.pt", "ccneg.json"])
def test_ccnegs_pickle_is_not_opened(named, tmp_path):
    source = unseen.neg_pickle(tmp_path / "source")
    if named == "ccneg.json":
        (source / named).write_text("[]")
    words = ["data", "convert", "ccneg", str(source / named), "--split=test", "--output=out"]
    done = subprocess.run(
        [sys.executable, "-c", OPENED, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert [*tmp_path.iterdir()] == [source]
    if named == "ccneg.json":
        assert done.stdout == f"opened {source / named}\n"
    else:
        assert done.stdout == ""
        assert f"{source}/ccneg_preprocessed.pt: is a pickle, and none is opened;" in done.stderr


@pytest.mark.thorough
def test_the_command_that_the_error_names_converts_ccneg(tmp_path, monkeypatch):
    source = unseen.neg_pickle(tmp_path / ("long" * 60) / "source")
    said = run("data", "convert", "ccneg", source, "--split", "test", "--output", tmp_path / "out")
    command = said.stderr[said.stderr.index("python -c") :].strip()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    subprocess.run(command, shell=True, cwd=source, check=True)
    assert json.loads((source / "ccneg.json").read_text()) == [*map(unseen.neg_row, range(4))]
    one = read(converted("ccneg", source.parent))["ccneg_task3"]
    assert [item.text for item in one.pool][-2:] == [
        "A lamp, number 3.", "A lamp without light number 3.",
    ]  # fmt: skip
