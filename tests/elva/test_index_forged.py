"""Files that somebody else wrote, every checksum right: refused in one line, or they answer as the
real ones; never another error, nor memory or time beyond what the files hold."""

import os
import struct

import pyarrow as pa
import pytest
import torch

from benchmarks.reliability.crashes import forged
from benchmarks.reliability.row import Outcome
from elva.errors import RunError, UserError
from elva.index import Index, segment
from elva.index.embeddings import Embeddings
from elva.training.resumed import best_weights, restored

MODEL = forged.MODEL


@pytest.fixture(scope="module")
def rows():
    return forged.rows()


@pytest.fixture
def place(tmp_path):
    return forged.make(tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", forged.MAKERS)
def test_every_forgery_is_refused_or_answers_as_the_real_file(name):
    outcome = Outcome()
    for number in range(len(forged.target(name).forged)):
        forged.tried(name, number, outcome)
    assert outcome.wrong == []
    assert outcome.tried > 150 and outcome.counts[f"{name} refused"] > 0.7 * outcome.tried


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", "x"), ("step", -5), ("elapsed", None), ("best", []), ("guards", {"since": 3})],
)
def test_a_checkpoint_whose_numbers_no_stage_writes_is_one_line(
    field, value, tmp_path, monkeypatch
):
    monkeypatch.setitem(forged.FACTS, field, value)
    with pytest.raises(
        RunError, match=rf"must be a checkpoint of this stage, got .*{field}"
    ) as caught:
        restored(forged.save(tmp_path), forged.Small())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["lacking", "more", "shape"])
def test_a_checkpoint_of_another_model_is_one_line(fault, tmp_path):
    path, other = forged.save(tmp_path), forged.Small()
    if fault == "lacking":
        other.c = torch.nn.Parameter(torch.zeros(2))
    elif fault == "shape":
        other.b = torch.nn.Parameter(torch.zeros(3))
    else:
        other.b.requires_grad_(False)
    for read in (restored, best_weights):
        with pytest.raises(RunError, match="must be a checkpoint of this stage, got") as caught:
            read(path, other)
        assert "\n" not in str(caught.value)


def stream(table, packed=None):
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=packed)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def broken_offsets():
    """Ten texts of which one claims to reach a gigabyte beyond the buffer."""
    good = stream(pa.table({"id": [f"item {i}" for i in range(10)]}))
    offsets = struct.pack("<11i", *range(0, 66, 6))
    assert good.count(offsets) == 1
    return good.replace(offsets, struct.pack("<11i", 0, 6, 2**30, *range(18, 66, 6)))


LONG = pa.table({"id": [*"abcdefghi", "j" * (64 << 20)]})
KINDS = pa.table({"id": [*"abcdefghij"], "kind": pa.array(["x" * 99] * 10).dictionary_encode()})
TABLES = {
    "64 MB in a few kB": stream(LONG, "zstd"),
    "the same by another packer": stream(LONG, "lz4"),
    "a packed dictionary": stream(KINDS, "zstd"),
    "no ids": stream(pa.table({"name": ["a"] * 10})),
    "a null id": stream(pa.table({"id": pa.array([None, *"abcdefghi"])})),
    "ids that are numbers": stream(pa.table({"id": [*range(10)]})),
    "another count": stream(pa.table({"id": [*"abc"]})),
    "a field twice": stream(pa.table([pa.array([*"abcdefghij"])] * 2, names=["id", "id"])),
    "offsets out of the buffer": broken_offsets(),
    "no UTF-8": stream(pa.table({"id": [*"abcdefghiQ"]})).replace(b"abcdefghiQ", b"abcdefghi\xff"),
    "no stream": b"\xff" * 512,
    "nothing": b"",
    "a stream that ends early": stream(pa.table({"id": [*"abcdefghij"]}))[:200],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_forged_table_is_refused(place, name):
    target = forged.write_table(place, TABLES[name])
    found = segment.Segment(target)
    found.verify()
    before = pa.total_allocated_bytes()
    with pytest.raises(UserError, match=r"forged.elva: must have a readable table of ids"):
        _ = found.table
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_dictionary_is_kept_as_it_is(tmp_path, rows):
    index = Index.build(
        tmp_path / "i", KINDS["id"].to_pylist(), rows, model=MODEL, columns={"kind": KINDS["kind"]}
    )
    assert index.table["kind"].to_pylist() == KINDS["kind"].to_pylist()
    assert index.allowed([("kind", "=", "x" * 99)]) is not None


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "endless", "absent"])
def test_what_is_no_file_is_one_line(place, kind):
    for path in (place / "i" / "index.json", Index(place / "i").segments[0].path,
                 place / "e" / "embeddings.json"):  # fmt: skip
        kept = path.read_bytes()
        path.unlink()
        if kind == "directory":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind != "absent":
            path.symlink_to(path.name if kind == "loop" else "/dev/zero")
        with pytest.raises(UserError, match=r"must be|must hold") as caught:
            (Embeddings.open(place / "e") if "embeddings" in path.name else Index(place / "i"))
        assert "\n" not in str(caught.value)
        path.rmdir() if kind == "directory" else path.unlink(missing_ok=True)
        path.write_bytes(kept)
