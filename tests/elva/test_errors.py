"""What a person can mend is one line and exit code 2; a defect keeps its traceback."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

import elva_kernels
from elva.cli.console import one_line_errors
from elva.errors import MAX_MESSAGE, DataError, IndexFault, PictureFault, RunError, UserError
from tests.elva.people import call, draw


def refused_value():
    elva_kernels.topk(torch.ones(2, 4), torch.ones(3, 5), 1)


def refused_type():
    elva_kernels.topk("query", torch.ones(3, 4), 1)


@pytest.mark.parametrize("call", [refused_value, refused_type])
def test_what_the_kernels_refuse_is_one_line(call, capsys):
    with pytest.raises((TypeError, ValueError)) as refused:
        call()
    with pytest.raises(typer.Exit) as ended, one_line_errors():
        call()
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == f"elva: {refused.value}\n"


@pytest.mark.parametrize("kind", [DataError, RunError, IndexFault])
def test_errors_are_of_one_family(kind, capsys):
    assert issubclass(kind, UserError)
    with pytest.raises(typer.Exit) as ended, one_line_errors():
        raise kind("a: must be b; do c")
    assert ended.value.exit_code == 2 and capsys.readouterr().err == "elva: a: must be b; do c\n"


@pytest.mark.parametrize("kind", [UserError, DataError, RunError, IndexFault, PictureFault])
def test_an_error_is_plain_text_whatever_a_file_holds(kind):
    """Not only where `elva` prints it: also in a log, a page, a list of what was left out."""
    said = str(kind("a.csv:2: cell '\x1b[2J\n\u202e\ud800\x9b\0' is no id; mend it"))
    assert said == r"a.csv:2: cell '\x1b[2J\n\u202e\ud800\x9b\x00' is no id; mend it"
    long = str(kind("a" + "\x1b" * 10**7 + "z"))
    assert len(long) == MAX_MESSAGE + 3 and long.isprintable()
    assert str(kind(kind(said))) == said


@pytest.mark.parametrize("kind", [TypeError, ValueError, KeyError])
def test_a_defect_keeps_its_traceback(kind):
    with pytest.raises(kind, match="ours"), one_line_errors():
        raise kind("ours")


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "a: cannot write, No space left on device; free space or"),
        (errno.EACCES, "a: Permission denied; change its rights or choose another"),
        (errno.EISDIR, "a: Is a directory; name a file, or choose another name"),
        (errno.ENAMETOOLONG, "a: File name too long; choose a shorter name"),
    ],
)
def test_advice_fits_what_the_system_says(number, line, capsys):
    with pytest.raises(typer.Exit) as ended, one_line_errors():
        raise OSError(number, os.strerror(number), "a.partial")
    assert ended.value.exit_code == 2 and capsys.readouterr().err.startswith(f"elva: {line}")
    with pytest.raises(FileNotFoundError), one_line_errors():
        os.open("/not there", os.O_RDONLY)  # a file of ours: a defect, no place that takes no files


@pytest.mark.parametrize("place", ["x" * 300, "/proc/x/y", "/proc/y", "file/y", ""])
def test_a_place_that_takes_nothing_is_one_line_before_work_starts(
    place, recipe_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    draw(tmp_path / "s" / "a.png", "red")
    np.save("v.npy", np.eye(3, dtype=np.float32))
    Path("ids.txt").write_text("a\nb\nc\n")
    before = sorted(tmp_path.rglob("*"))
    words = ("data", "convert", "folder", "s", "--output")
    for command in (
        (*words, place),
        (*words, "d", "--sheet", place and f"{place}.png"),
        (*words, "d/e", "--list-left-out", place),
        ("search", "no index", "x", "--sheet", place and f"{place}.png"),
        ("index", "build", place, "--npy", "v.npy", "--ids", "ids.txt", "--model", "m"),
        ("train", "--recipe", "smoke", "--config", recipe_file, "--output", place),
    ):
        said = call(*command, code=2)
        assert place[:4] in said and "no index" not in said, said
        assert sorted(tmp_path.rglob("*")) == before


def test_a_sheet_and_a_source_that_cannot_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "s" / "a.png", "red")
    words = ("data", "convert", "folder", "s", "--output")
    said = call(*words, "d", "--sheet", "x.docx", code=2)
    assert said == "elva: --sheet: must end in .png, got x.docx; name a PNG file\n"
    said = call(*words, "d", "--sheet", "s", code=2)
    assert said.startswith("elva: --sheet: must")
    said = call("data", "convert", "folder", "", "--output", "d", code=2)
    assert "a path must name a file or directory, got ''" in said
    said = call(*words, "s/d", code=2)
    assert said.startswith("elva: s/d: must lie outside of the folder s;")
    for said in ("abc", "1e9", "0", "-1"):
        monkeypatch.setenv("ELVA_MAX_PIXELS", said)
        line = call(*words, "d", "--skip-bad", 5, code=2)
        assert line.startswith("elva: ELVA_MAX_PIXELS: must be a whole number of pixels above 0")
        assert "--skip-bad" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
