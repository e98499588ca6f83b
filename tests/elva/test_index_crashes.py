"""Whatever happens while an index is written: it is the old one or the new one, and says so when
it is neither.

`pytest --thorough tests/elva/test_index_crashes.py -s` prints the figures that
benchmarks/README.md quotes.
"""

import errno
import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest
import torch

from elva.errors import IndexFault
from elva.index import Index
from elva.index.compact import compact
from elva.model.identity import Identity

MODEL = Identity("a model", "revision", "preprocessing")
CALLS = ("open", "write", "pwrite", "fsync", "replace", "link")


def embeddings(count, seed, dim=256):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def content(path):
    """Everything that an index answers with, in how many segments, checksums compared."""
    index = Index(path)
    alive = index.alive.nonzero()[0]
    found = dict(zip(index.ids(alive), index.embeddings(alive).sum(1).tolist(), strict=True))
    return len(index.segments), index.is_coded, found


def changes(path, step, more):
    """The six ways in which an index changes, once without codes at first, once with them."""
    kind, ids = step % 6, [f"{step}-{i}" for i in range(200)]
    if kind == 0:
        Index.build(
            path, ids, embeddings(200, step), model=MODEL, overwrite=True, codes=step % 12 >= 6
        )
    elif kind == 1:
        Index(path).add(ids, embeddings(200, step), model=MODEL)
    elif kind == 2:
        Index(path).delete(Index(path).ids(range(0, 150, 3)))
    elif kind == 3:
        Index(path).add_segments([more], overwrite=True)
    elif kind == 4:
        compact(path)
    else:
        Index.with_codes(path)


@pytest.fixture
def more(tmp_path):
    index = Index.build(
        tmp_path / "more", [f"m{i}" for i in range(50)], embeddings(50, 7), model=MODEL
    )
    return index.segments[0].path


def test_an_index_is_built_where_a_kill_left_a_half_manifest(tmp_path):
    path = tmp_path / "index"
    (path / "segments").mkdir(parents=True)
    (path / "index.json.partial").write_text("{")
    Index.build(path, ["a"], embeddings(1, 0), model=MODEL)
    assert list(content(path)[2]) == ["a"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.partial").touch()
    with pytest.raises(IndexFault, match="must be empty or an index"):
        Index.build(tmp_path / "other", ["a"], embeddings(1, 0), model=MODEL)


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.thorough)])
def test_killed_at_any_moment_it_is_the_old_or_the_new_index(tmp_path, more, kills):
    path, wanted, draw = tmp_path / "index", tmp_path / "wanted", random.Random(0)
    seen = Counter()
    began = time.perf_counter()
    changes(path, 0, more)
    shutil.copytree(path, wanted)
    changes(wanted, 1, more)
    duration = max(0.005, time.perf_counter() - began) * 1.5
    for step in range(kills):
        old = content(path) if step else None
        shutil.rmtree(wanted)
        if step:
            shutil.copytree(path, wanted)
        changes(wanted, step, more)
        new = content(wanted)
        if step == 0:
            shutil.rmtree(path)
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the pool's threads did not come along
                changes(path, step, more)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            now = content(path)
        except IndexFault as error:
            assert step == 0 and "got no index.json" in str(error)  # nothing was there before
            now = old
        assert now in (old, new), step
        seen["new" if now == new else "old"] += 1
        duration *= 1.15 if now == old else 0.87  # both are to be seen, however busy the machine
        if now == old:
            changes(path, step, more)  # what a kill left behind is no obstacle
            assert content(path) == new
        assert not list(path.rglob("*.partial"))
    print(
        f"\n{kills} kills while indexing: {seen['old']} left the old index, {seen['new']} the new"
    )
    assert min(seen["old"], seen["new"]) > kills // 20


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.thorough)]
)
def test_every_write_that_fails_leaves_the_old_or_the_new_index(
    tmp_path, more, number, monkeypatch
):
    path, tried = tmp_path / "index", 0
    changes(path, 6, more)
    for step in (6, 7, 8, 9, 10, 0, 5):  # with codes, and then where codes are to come
        first = step // 6 * 6
        for n in range(1, 1000):
            old = content(path)
            left = [n]

            def fail(real, left=left):
                def call(*args, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        raise OSError(number, os.strerror(number))
                    return real(*args, **kwargs)

                return call

            with monkeypatch.context() as patch:
                for name in CALLS:
                    patch.setattr(os, name, fail(getattr(os, name)))
                try:
                    changes(path, step, more)
                    done = True
                except OSError as error:
                    done = False
                    assert error.errno == number
                except IndexFault as error:  # where it was reading
                    done = False
                    assert f"got {os.strerror(number)};" in str(error)
            now = content(path)
            assert not list(path.rglob("*.partial"))
            if left[0] > 0:
                assert done  # fewer calls than n: this one succeeded as a whole
                break
            tried += 1
            if now != old:  # it failed after the one step that counts, or got around the failure
                shutil.rmtree(path)
                changes(path, first, more)
                for earlier in range(first + 1, step):
                    changes(path, earlier, more)
        else:
            raise AssertionError("no end to the writes")
    print(f"\n{tried} writes failed with {os.strerror(number)}: none left a third state")
    assert tried > 20


@pytest.mark.parametrize("flips", [2_000, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_every_flipped_byte_is_found(tmp_path, more, flips):
    path, draw = tmp_path / "index", random.Random(1)
    for step in (6, 7, 8):
        changes(path, step, more)
    files = [p for p in path.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) == 5
    sizes = [p.stat().st_size for p in files]
    for number in range(flips):
        file = draw.randrange(5)
        # One in four where the structure lies, in the first page or the last.
        edge = draw.choice((0, max(0, sizes[file] - 4096)))
        at = (edge + draw.randrange(min(4096, sizes[file])) if number % 4 == 0
              else draw.randrange(sizes[file]))  # fmt: skip
        with open(files[file], "r+b", buffering=0) as stream:
            stream.seek(at)
            (old,) = stream.read(1)
            stream.seek(at)
            stream.write(bytes([old ^ draw.randrange(1, 256)]))
            with pytest.raises(IndexFault) as caught:
                Index(path)
            stream.seek(at)
            stream.write(bytes([old]))
        assert "\n" not in str(caught.value) and str(files[file].name) in str(caught.value), at
    Index(path)
    print(f"\n{flips} of {flips} flipped bytes detected")
