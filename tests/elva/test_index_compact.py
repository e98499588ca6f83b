"""An index as one segment: the same answers, fewer bytes, little memory."""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from elva.cli import app
from elva.errors import IndexFault
from elva.index import Index
from elva.index import compact as compacting
from elva.index.compact import compact
from elva.model.identity import Identity

MODEL = Identity("a model", "revision", "preprocessing")


def rows(count, seed=0, dim=16):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def parted(path, dtype="float16", codes=True):
    """Three segments of 300, 200 and 100 items, some of each deleted, with fields of their own."""
    index = Index.build(path, [f"a{i}" for i in range(300)], rows(300), model=MODEL, dtype=dtype,
                        columns={"year": [*range(300)]}, codes=codes)  # fmt: skip
    index = index.add([f"b{i}" for i in range(200)], rows(200, 1), model=MODEL,
                      columns={"year": [0.5] * 200, "kind": ["cat"] * 200})  # fmt: skip
    index = index.add([f"c{i}" for i in range(100)], rows(100, 2), model=MODEL)
    gone = [f"a{i}" for i in range(0, 300, 3)] + [f"b{i}" for i in range(150)] + ["c99"]
    return index.delete(gone)


def answers(index):
    """Ids, scores and fields of everything that a search finds, best first."""
    found = index.search(rows(20, 9), 50)
    fields = sorted(index.table.schema.names)
    return (
        [index.ids(r.tolist()) for r in found.rows],
        found.scores.tolist(),
        [[index.table.take(r.tolist())[name].to_pylist() for name in fields] for r in found.rows],
        index.embeddings(np.flatnonzero(index.alive)).tolist(),
        [int(index.allowed(w).sum()) for w in ([("year", "<", 1)], [("kind", "=", "cat")])],
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("block", [1, 65_536])
def test_a_compact_index_answers_as_before(tmp_path, dtype, codes, block, monkeypatch):
    monkeypatch.setattr(compacting, "BLOCK_ROWS", block * 7)
    monkeypatch.setattr(compacting, "BLOCK_MB", 0 if block == 1 else 16)
    index = parted(tmp_path / "i", dtype, codes)
    wanted, before = answers(index), index.info()
    made = compact(tmp_path / "i")
    after = made.info()
    assert answers(made) == wanted == answers(index)  # the old one is open and reads on
    assert (after["items"], after["deleted"], after["segments"]) == (before["items"], 0, 1)
    assert after["rows_bytes"] == 349 * 16 * (4 if dtype == "float32" else 2)
    assert (after["codes_bytes"] > 0) == codes == made.is_coded
    if block > 1:  # a batch of ids costs some bytes of its own
        assert before["bytes"] - after["bytes"] > 0.8 * before["deleted_bytes"] > 0
    assert len(os.listdir(tmp_path / "i" / "segments")) == 1 + codes
    Index(tmp_path / "i")
    again = compact(tmp_path / "i")
    assert again.manifest.generation == made.manifest.generation  # nothing to do, nothing written
    assert len(again.add(["new"], rows(1, 4), model=MODEL)) == 350


def test_an_index_of_nothing_is_compacted_to_nothing(tmp_path):
    index = Index.build(tmp_path / "i", ["a", "b"], rows(2), model=MODEL).add(
        ["c"], rows(1, 1), model=MODEL
    )
    index = index.delete(["a", "c"])
    assert len(compact(tmp_path / "i")) == 1
    index = index.delete(["b"])
    assert len(compact(tmp_path / "i")) == 0 and os.listdir(tmp_path / "i" / "segments") == []


def test_damage_is_not_carried_into_a_segment_of_new_checksums(tmp_path):
    index = parted(tmp_path / "i")
    path = index.segments[0].path
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(IndexFault, match="must have its checksum in the block at byte 4,096"):
        compact(tmp_path / "i")
    assert Index(tmp_path / "i", verify=False).info() == index.info()


def test_no_space_and_a_second_writer_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    index = parted(tmp_path / "i")
    usage = shutil.disk_usage(tmp_path)._replace(free=5)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(IndexFault, match=r"must have [\d,]+ bytes free .* got 5; free space"):
            compact(tmp_path / "i")
    held, go = threading.Event(), threading.Event()

    class Held:
        def start(self, *_): ...
        def finish(self, line): ...
        def advance(self, done):
            held.set()
            assert go.wait(10)

    worker = threading.Thread(target=compact, args=(tmp_path / "i", Held()))
    worker.start()
    assert held.wait(10)
    with pytest.raises(IndexFault, match="one writer at a time"):
        index.delete(["a1"])
    assert answers(Index(tmp_path / "i")) == answers(index)  # readers go on
    go.set()
    worker.join()
    assert Index(tmp_path / "i").info()["segments"] == 1


def test_memory_is_bounded(tmp_path):
    """90 MB of rows and 20 MB of ids are copied in a process that grows by less than 60 MB beside
    the files that it maps."""
    count = 60_000
    Index.build(tmp_path / "i", [f"{i:0300d}" for i in range(count)], rows(count, dim=768),
                model=MODEL, codes=False).delete([f"{7:0300d}"])  # fmt: skip
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            compacting.BLOCK_MB, compacting.BLOCK_ROWS = 4, 4096
            before = anonymous_kb()
            most = 0

            class Watch:
                def start(self, *_): ...
                def finish(self, line): ...
                def advance(self, done):
                    nonlocal most
                    most = max(most, anonymous_kb())

            compact(tmp_path / "i", Watch())
            (tmp_path / "grown").write_text(str(max(most, anonymous_kb()) - before))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    grown = int((tmp_path / "grown").read_text())
    print(f"\ncompacting 110 MB took {grown / 1e3:.1f} MB")
    assert grown < 60_000
    assert Index(tmp_path / "i").info()["items"] == count - 1


def anonymous_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_the_commands_say_sizes_and_what_was_saved(tmp_path):
    parted(tmp_path / "i")

    def call(*words):
        done = CliRunner().invoke(app, ["index", words[0], str(tmp_path / "i"), *words[1:]])
        assert done.exit_code == 0, done.output
        return done.stdout

    before = json.loads(call("info", "--json"))
    assert re.search(r"251 deleted \(\d+\.\d kB, elva index compact frees them\)", call("info"))
    assert "model: a model (revision, preprocessi" in call("info")
    parts = [before[f"{name}_bytes"] for name in ("rows", "fields", "codes")]
    files = [p.stat().st_size for p in (tmp_path / "i" / "segments").iterdir()]
    assert sum(parts) == before["bytes"] == sum(files)
    assert re.search(r"3 segments, 251 deleted items of \d+\.\d kB$", call("compact", "--dry-run"))
    assert json.loads(call("info", "--json")) == before
    assert "3 segments before" in call("compact")
    after = json.loads(call("info", "--json"))
    assert (after["segments"], after["deleted"]) == (1, 0) and after["bytes"] < before["bytes"]
    assert json.loads(call("compact", "--json")) == after
    assert json.loads(call("verify", "--json"))["bytes"] == after["bytes"]
    assert "every one as written; " in call("verify") and " MB/s" in call("verify")
