"""Files that somebody else wrote, every checksum right: refused in one line, or they answer as the
real ones; never another error, nor memory or time beyond what the files hold."""

import json
import os
import struct
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from elva.errors import UserError
from elva.index import Index, segment
from elva.index.embeddings import Embeddings
from tests.elva import forged
from tests.elva.forged import MODEL
from tests.elva.forgeries import forgeries

MOST_BYTES, MOST_SECONDS = 120 << 20, 2.0


@pytest.fixture(scope="module")
def rows():
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def place(tmp_path, rows):
    return forged.make(tmp_path, rows)


def hold(tried, answer, wanted):
    """Every forgery is refused in one line or answers as the real file, within bounds."""
    refused = 0
    for what, write in tried:
        write()
        tracemalloc.start()
        began = time.perf_counter()
        try:
            found = answer()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1_000, what
        else:
            assert found in wanted, what
        took, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert took < MOST_SECONDS and peak < MOST_BYTES, (what, took, peak)
    return refused


def test_a_forged_manifest_is_refused_or_the_same_index(place, rows):
    data = forged.manifest(place)

    def write(body):
        forged.write_manifest(place, body)

    def answer():
        about = Index(place / "i").about
        asked = about.get("instructions", {}).items()
        assert all(len(text.split()) < 99 for pair in asked for text in pair)
        _ = Path(about.get("model") or "") / (about.get("folder") or "")
        return forged.answer(place, rows)

    wanted = [answer()]
    first, last = data["segments"]
    whole = {**first, "deleted": ""}
    # What its writer might have written: fewer segments, or none of their rows deleted.
    for segments in ([whole, last], [first], [last], []):
        write(json.dumps({**data, "segments": segments}).encode())
        wanted.append(answer())
    assert [count for _, count in wanted] == [10, 11, 9, 1, 0]
    tried = [(what, lambda b=body: write(b)) for what, body in forgeries(data)]
    refused = hold(tried, answer, wanted)
    print(f"\n{refused} of {len(tried)} forged manifests refused")
    assert len(tried) > 900 and refused > 0.85 * len(tried)


@pytest.mark.parametrize("part", ["segment", "codes"])
def test_a_forged_header_is_refused_or_the_same_file(place, rows, part):
    """The manifest names the forged header, so that nothing but its fields is wrong."""
    header = forged.Header(place, part)
    write = header.write

    def answer():
        return forged.answer(place, rows)

    real = answer()
    tried = [(what, lambda b=body: write(b)) for what, body in forgeries(header.fields)]
    refused = hold(tried, answer, [real])
    print(f"\n{refused} of {len(tried)} forged headers of {part} refused")
    assert len(tried) > 150 and refused > 0.85 * len(tried)


def test_a_forged_plan_is_refused_or_the_same_embeddings(place, rows):
    path = place / "e" / "embeddings.json"
    data = json.loads(path.read_bytes())

    def answer():
        ids, query = Embeddings.open(place / "e").queries()
        return ids, query.tolist()

    real = answer()
    tried = [(what, lambda b=body: path.write_bytes(b)) for what, body in forgeries(data)]
    refused = hold(tried, answer, [real])
    print(f"\n{refused} of {len(tried)} forged plans refused")
    assert len(tried) > 250 and refused > 0.7 * len(tried)


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
