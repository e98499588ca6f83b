"""A run directory's small files: begun by one process, appended to whole or not at all."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from elva import files
from elva.commands import build_index
from elva.errors import RunError, UserError
from elva.recipe import Recipe, StageConfig
from elva.run import Run


def test_of_two_that_begin_a_run_in_one_directory_one_is_refused(tmp_path, monkeypatch):
    """Both had found it empty before either wrote: the loser's recipe lay beside the winner's."""
    both, gate = threading.Barrier(2), files.make_directory
    monkeypatch.setattr("elva.run.make_directory", lambda path: (gate(path), both.wait(20)))
    found: dict[int, object] = {}

    def begin(seed: int) -> None:
        try:
            found[seed] = Run.create(
                tmp_path / "run", Recipe("tiny", seed=seed, stages={"1": StageConfig(steps=1)})
            )
        except RunError as error:
            found[seed] = str(error)

    threads = [threading.Thread(target=begin, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [seed for seed, one in found.items() if isinstance(one, Run)]
    assert "must be empty" in str(found[3 - won]) or "by one process" in str(found[3 - won])
    assert Run.open(tmp_path / "run").recipe.seed == won


def test_a_line_of_metrics_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", Recipe("tiny", stages={"1": StageConfig(steps=1)}))
    run.log("1", 1, {"loss": 0.5})
    before, real = run.metrics_file.read_bytes(), os.write

    def half(descriptor: int, content: memoryview) -> int:
        if len(content) < 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content[: len(content) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space") as caught:
        run.log("1", 2, {"loss": 0.25})
    monkeypatch.undo()
    assert str(caught.value.filename).startswith(f"{run.metrics_file} at byte ")
    assert run.metrics_file.read_bytes() == before
    run.log("1", 2, {"loss": 0.25})
    assert [line["step"] for line in run.metrics()] == [1, 2]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_that_names_no_file_is_given_its_place(call, tmp_path, monkeypatch):
    """The system does not say of which file an error of a descriptor is."""

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), *["x"] * (call == "replace"))

    def fill(directory: Path) -> None:
        (directory / "a.json").write_text("{}")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="Input/output") as caught:
        files.write_text(tmp_path / "a.txt", "text")
    assert caught.value.filename == ("x" if call == "replace" else f"{tmp_path}/a.txt at byte 4")
    with pytest.raises(OSError, match="Input/output") as caught:
        files.write_directory(tmp_path / "b", fill)
    assert caught.value.filename == ("x" if call == "replace" else f"{tmp_path}/b at byte 2")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk, as Linux has one")
def test_a_full_disk_under_a_tokenizer_has_its_place(tmp_path):
    """tokenizers raises a bare Exception, with the system's number in its text."""
    words = Tokenizer(BPE())
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_directory(tmp_path / "model", lambda place: words.save("/dev/full"))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == f"{tmp_path}/model at byte 0"

    def other(place: Path) -> None:
        raise Exception("mine")

    with pytest.raises(Exception, match="mine") as caught:
        files.write_directory(tmp_path / "model", other)
    assert type(caught.value) is Exception and [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "header", ["{'descr': (", "{'descr': '<f4', 'shape': (2,", "{]", "(" * 300]
)
def test_a_matrix_whose_header_is_no_python_is_one_line(header, tmp_path):
    """numpy reads it as a piece of Python, and lets the tokenizer's own errors through."""
    text = header.encode().ljust(320) + b"\n"
    start = b"\x93NUMPY\x01\x00" + np.uint16(len(text)).tobytes() + text
    (tmp_path / "v.npy").write_bytes(start + bytes(64))
    (tmp_path / "ids.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"v.npy: must be a .npy file of numbers;") as caught:
        build_index.build(
            tmp_path / "i", [], npy=tmp_path / "v.npy", ids=tmp_path / "ids.txt", model="m"
        )
    assert "\n" not in str(caught.value)
