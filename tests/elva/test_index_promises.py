"""What an index promises around its bytes: no change, race, planted file or odd value makes it
anything but the old index, the new one, or one line."""

import hashlib
import json
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from elva import files
from elva.errors import IndexFault, UserError
from elva.index import Index, blocks, change
from elva.index import manifest as manifest_file
from elva.model.identity import Identity

MODEL = Identity("a model", "revision", "preprocessing")


def rows(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def build(path, ids, **columns):
    return Index.build(path, ids, rows(len(ids)), model=MODEL, columns=columns)


# -- one table -------------------------------------------------------------------------------------

APART = [
    ([1999], ["1999"], "int64 and string"),
    ([1999], [True], "int64 and bool"),
    ([[1999]], [1999], "list<.*: int64> and int64"),
    ([2**60 + 1], [0.5], "int64 and double"),  # no type holds both values
]


@pytest.mark.parametrize(("here", "more", "kinds"), APART)
def test_an_add_of_another_type_is_refused_and_changes_nothing(tmp_path, here, more, kinds):
    index = build(tmp_path / "i", ["a"], year=here)
    other = build(tmp_path / "o", ["b"], year=more)
    paths = [index.segments[0].path, other.segments[0].path]
    before = (tmp_path / "i" / "index.json").read_bytes()
    rule = f"index: field year must have one type in all of an index, got {kinds}; convert"
    for call in (
        lambda: index.add(["b"], rows(1), model=MODEL, columns={"year": more}),
        lambda: index.add_segments(paths[1:]),
        lambda: Index.assemble(tmp_path / "n", paths),
        lambda: Index.assemble(tmp_path / "i", paths, overwrite=True),
    ):
        with pytest.raises(IndexFault, match=rule):
            call()
        assert (tmp_path / "i" / "index.json").read_bytes() == before
        assert Index(tmp_path / "i").table["year"].to_pylist() == here
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "o"]


def test_types_that_one_type_holds_are_added(tmp_path):
    index = build(tmp_path / "i", ["a"], year=[1999], colour=[None])
    index = index.add(["b"], rows(1), model=MODEL, columns={"year": [0.5], "colour": ["red"]})
    assert index.table["year"].to_pylist() == [1999.0, 0.5]
    assert index.table["colour"].to_pylist() == [None, "red"]
    assert index.conflicts == {}


def test_an_index_of_two_types_opens_and_is_mended_by_delete(tmp_path, monkeypatch):
    """As versions before this check could make one."""
    index = build(tmp_path / "i", ["a", "b"], year=[1999, 2000], colour=["red", "blue"])
    with monkeypatch.context() as patch:
        patch.setattr(change, "check_fields", lambda tables: None)
        index = index.add(["c"], rows(1, seed=5), model=MODEL, columns={"year": ["1999"]})
        index.add(["d"], rows(1, seed=6), model=MODEL)  # without such a field
    index = Index(tmp_path / "i")
    assert index.info()["fields"] == {"id": "string", "colour": "string"}
    assert index.info()["conflicts"] == {"year": "int64 and string"}
    assert index.search(rows(1, seed=5), 1).rows.tolist() == [[2]]
    assert index.allowed([("colour", "=", "red")]).tolist() == [True, False, False, False]
    with pytest.raises(IndexFault, match="must name a field of one type, got year of int64 and"):
        index.search(rows(1), 1, where=[("year", "=", 1999)])
    with pytest.raises(IndexFault, match="field year must have one type"):
        index.add(["e"], rows(1), model=MODEL)
    index = index.delete(["c"])
    assert index.conflicts == {} and index.table["year"].to_pylist() == [1999, 2000, None]
    assert len(index.add(["e"], rows(1), model=MODEL, columns={"year": [1]})) == 4


# -- writers and readers ---------------------------------------------------------------------------


def test_a_build_that_is_refused_removes_nothing_of_the_winners(tmp_path, monkeypatch):
    """Held between its look and its lock, while the winner writes."""
    looked, won = threading.Event(), threading.Event()
    lock = manifest_file._locked

    def held(directory, make):
        if threading.current_thread().name == "loser":
            looked.set()
            assert won.wait(10)
        return lock(directory, make)

    monkeypatch.setattr(manifest_file, "_locked", held)
    refused = []

    def lose():
        try:
            build(tmp_path / "i", ["loser"])
        except IndexFault as error:
            refused.append(str(error))

    loser = threading.Thread(target=lose, name="loser")
    loser.start()
    assert looked.wait(10)
    build(tmp_path / "i", ["winner"])
    won.set()
    loser.join()
    assert refused and "must not hold an index yet" in refused[0]
    assert Index(tmp_path / "i").ids([0]) == ["winner"]


@pytest.mark.parametrize("rounds", [30, pytest.param(1_000, marks=pytest.mark.thorough)])
def test_of_many_builds_at_once_one_wins_and_readers_see_a_whole_index(tmp_path, rounds):
    """Four writers into one fresh path, then two that rebuild beside two readers."""
    with ThreadPoolExecutor(4) as pool:
        for number in range(rounds):
            path = tmp_path / f"{number}"

            def one(name, path=path, overwrite=False):
                try:
                    return Index.build(path, [name], rows(1), model=MODEL, overwrite=overwrite)
                except IndexFault as error:
                    assert "one writer at a time" in str(error) or "must not hold" in str(error)

            def read(path=path):
                index = Index(path)
                return index.ids([0])[0], index.search(rows(1), 1).rows.tolist()

            built = [made for made in pool.map(one, "abcd") if made is not None]
            assert len(built) == 1
            assert Index(path).ids([0]) == built[0].ids([0])
            again = [pool.submit(one, name, overwrite=True) for name in "ef"]
            seen = [pool.submit(read) for _ in range(2)]
            assert {s.result()[0] for s in seen} <= {*built[0].ids([0]), "e", "f"}
            assert any(a.result() is not None for a in again)
            assert not list(path.rglob("*.partial"))
            assert len(os.listdir(path / "segments")) == 2
            shutil.rmtree(path)


def test_a_rebuild_while_a_reader_opens_is_read_whole(tmp_path, monkeypatch):
    build(tmp_path / "i", ["old"])
    header, rebuilt = blocks._header, []

    def rebuild(path, *rest):
        if not rebuilt:
            rebuilt.append(path)
            Index.build(tmp_path / "i", ["new"], rows(1, seed=3), model=MODEL, overwrite=True)
            assert not path.exists()
        return header(path, *rest)

    monkeypatch.setattr(blocks, "_header", rebuild)
    index = Index(tmp_path / "i")
    assert rebuilt and index.ids([0]) in (["old"], ["new"])
    assert torch.equal(index.embeddings([0]), rows(1, seed=3 * (index.ids([0]) == ["new"])).half())


def test_an_index_that_is_removed_is_read_on_and_not_made_again(tmp_path):
    index = build(tmp_path / "i", ["a", "b"], year=[1, 2])
    shutil.rmtree(tmp_path / "i")
    assert index.search(rows(2), 2, where=[("year", ">", 1)]).rows.tolist() == [[1], [1]]
    index.verify()
    assert index.info()["items"] == 2
    for call in (
        lambda: index.add(["c"], rows(1), model=MODEL),
        lambda: index.delete(["a"]),
        lambda: Index(tmp_path / "i"),
    ):
        with pytest.raises(IndexFault, match=r"must be an index, got no index\.json"):
            call()
    assert not (tmp_path / "i").exists()


def test_a_build_for_nothing_leaves_what_was_there(tmp_path):
    (tmp_path / "there").mkdir()
    for place in ("there", "new"):
        with pytest.raises(IndexFault, match="must be finite"):
            Index.build(tmp_path / place, ["a"], rows(1) * math.nan, model=MODEL)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("damage", ["a flipped byte", "a later version", "nothing"])
def test_a_damaged_index_is_refused_by_all_but_a_build_over_it(tmp_path, damage):
    index = build(tmp_path / "i", ["a", "b"])
    path = tmp_path / "i" / "index.json"
    body = json.dumps({**json.loads(path.read_bytes().split(b"\n")[0]), "version": 99}).encode()
    if damage == "a flipped byte":
        path.write_bytes(path.read_bytes()[:-9] + b"00000000\n")
    elif damage == "nothing":
        path.write_bytes(b"")
    else:
        path.write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")
    for call in (
        lambda: Index(tmp_path / "i"), lambda: index.delete(["a"]),
        lambda: index.add(["c"], rows(1), model=MODEL), lambda: build(tmp_path / "i", ["c"]),
    ):  # fmt: skip
        with pytest.raises(IndexFault, match="must"):
            call()
        assert index.segments[0].path.exists()  # nothing of it is removed
    made = Index.build(tmp_path / "i", ["c"], rows(1), model=MODEL, overwrite=True)
    assert made.ids([0]) == ["c"] and not index.segments[0].path.exists()


def test_writers_of_one_directory_do_not_remove_each_others(tmp_path):
    filling, done, refused = threading.Event(), threading.Event(), []

    def fill(place):
        (place / "a").write_text("winner")
        filling.set()
        assert done.wait(10)

    winner = threading.Thread(target=files.write_directory, args=(tmp_path / "d", fill))
    winner.start()
    assert filling.wait(10)
    try:
        files.write_directory(tmp_path / "d", lambda place: (place / "a").write_text("loser"))
    except UserError as error:
        refused.append(str(error))
    done.set()
    winner.join()
    assert refused == [f"{tmp_path / 'd'}: must have one writer at a time, got a second; wait for "
                       "the other"]  # fmt: skip
    assert (tmp_path / "d" / "a").read_text() == "winner" and files.is_whole(tmp_path / "d")
    assert os.listdir(tmp_path) == ["d"]


# -- planted files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", ["link", "hard link", "pipe", "file", "nothing to link to"])
def test_what_is_planted_for_a_writer_is_not_written_through(tmp_path, plant):
    index, victim = build(tmp_path / "i", ["a"]), tmp_path / "victim"
    victim.write_text("mine")
    place = tmp_path / "i" / "index.json.partial"
    if plant == "link":
        place.symlink_to(victim)
    elif plant == "hard link":
        os.link(victim, place)
    elif plant == "pipe":
        os.mkfifo(place)
    elif plant == "file":
        place.write_text("{")
    else:
        place.symlink_to(tmp_path / "absent")
    index.add(["b"], rows(1), model=MODEL)
    assert victim.read_text() == "mine" and not (tmp_path / "absent").exists()
    assert len(Index(tmp_path / "i")) == 2
    assert not (tmp_path / "i" / "index.json").is_symlink() and not os.path.lexists(place)


@pytest.mark.parametrize("plant", ["link", "file", "directory"])
def test_what_is_planted_for_a_directory_is_not_filled(tmp_path, plant):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").touch()
    place = tmp_path / "d.partial"
    if plant == "link":
        place.symlink_to(tmp_path / "victim")
    elif plant == "file":
        place.touch()
    else:
        place.mkdir()
        (place / "evil.safetensors").touch()
    files.write_directory(tmp_path / "d", lambda made: (made / "a").touch())
    assert os.listdir(tmp_path / "victim") == ["mine"]
    assert sorted(os.listdir(tmp_path / "d")) == ["a", "manifest.json"]


def test_writers_of_one_file_take_turns(tmp_path):
    """Each file is one writer's from end to end, whoever comes last."""

    def write(number):
        for _ in range(20):
            files.write_bytes(tmp_path / "f", bytes([number]) * 10_000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    content = (tmp_path / "f").read_bytes()
    assert len(content) == 10_000 and len(set(content)) == 1
    assert os.listdir(tmp_path) == ["f"]


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("scale", "source"),
    [(s, torch.float32) for s in (1e-40, 1e-8, 1e-5, 1.0, 1e6, 3e37)]
    + [(s, torch.float64) for s in (1e-308, 1e-300, 1e300)],
)
def test_the_size_of_a_row_does_not_matter(tmp_path, dtype, scale, source):
    """Cosines of rows of any finite size are those of the same rows near 1."""
    near = rows(200, 32).to(source)
    wanted = Index.build(tmp_path / "n", names := [f"{i}" for i in range(200)], near, model=MODEL,
                         dtype=dtype).search(near[:5], 10)  # fmt: skip
    index = Index.build(tmp_path / "i", names, near * scale, model=MODEL, dtype=dtype)
    found = index.search((near * scale)[:5], 10)
    bits = {"float16": 11, "bfloat16": 8, "float32": 24}[dtype]
    if scale == 1e-40:  # float32 itself has only 13 bits left there, or fewer
        bits = min(bits, 10)
    assert (found.scores - wanted.scores).abs().max() < 2.0**-bits + 1e-6
    assert (found.rows == wanted.rows).double().mean() > 0.9
    assert found.rows[:, 0].tolist() == list(range(5))


def test_a_row_in_range_is_stored_as_it_is_and_a_small_one_exactly(tmp_path):
    given = torch.stack([rows(1)[0], torch.tensor([2.0**-30, 3 * 2.0**-32, 0, 0, 0, 0, 0, 0])])
    stored = Index.build(tmp_path / "i", ["a", "b"], given, model=MODEL).embeddings([0, 1])
    assert torch.equal(stored[0], given[0].half().float())
    assert torch.equal(stored[1], given[1] * 2.0**30)


WRONG = [
    (lambda i, p: i.add(["z"], rows(1).int(), model=MODEL), "must be of floats, got torch.int32"),
    (lambda i, p: i.add(["z"], rows(1) > 0, model=MODEL), "must be of floats, got torch.bool"),
    (lambda i, p: i.add(["z"], rows(1) * 1j, model=MODEL), "be of floats, got torch.complex64"),
    (lambda i, p: i.search(rows(1) * math.nan, 3), "query must be finite, got NaN or .* row 0"),
    (lambda i, p: i.search(rows(1) / 0, 3), "query must be finite, got NaN or infinity in row 0"),
    (lambda i, p: i.search([[1.0] * 8], 3), r"query must be a tensor \[Q, 8\], got a list"),
    (lambda i, p: i.search(rows(1), 1.5), "k must be at least 1, got 1.5"),
    (lambda i, p: i.search(rows(1), True), "k must be at least 1, got True"),
    (lambda i, p: i.search(rows(1), "3"), "k must be at least 1, got '3'"),
    (lambda i, p: i.search(rows(1), 3, where=[("year", "<", 2**70)]), "give year a value of type"),
    (lambda i, p: i.search(rows(1), 3, where=[("year", "in", [2**70])]), "give year values of"),
    (lambda i, p: i.search(rows(1), 3, where=[("id", "in", "item 1")]), "give id values of type"),
    (lambda i, p: i.search(rows(1), 3, where=[("year", "=", {1})]), "give year a value of type"),
    (lambda i, p: i.search(rows(1), 3, where=[("year", "=")]), "must be conditions of field"),
    (lambda i, p: i.search(rows(1), 3, where=[(["year"], "=", 1)]), "must name a field, got"),
    (lambda i, p: Index.build(p / "n", ["a"], rows(1), model=MODEL, about={"x": {1}}),
     "about must be plain JSON; Object of type set"),
    (lambda i, p: Index.build(p / "n", ["a"], rows(1), model=MODEL, about={"x": math.nan}),
     "about must be plain JSON"),
    (lambda i, p: Index.build(p / "n", ["a"], rows(1), model=MODEL, about={"x": "\ud800"}),
     "surrogates not allowed"),
    (lambda i, p: Index.build(p / "n", ["a"], rows(1), model=MODEL, columns={"id": ["b"]}),
     "columns must have names beside id"),
    (lambda i, p: Index.build(p / "n", ["a"], rows(1), model=MODEL, columns={"x": [2**70]}),
     "ids and columns must be as long and text"),
    (lambda i, p: Index.build(p / "n", ["a"], rows(1), model=Identity("m" * 5000, "r", "p")),
     "name must be under 3 kB"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "rule"), WRONG)
def test_what_cannot_be_meant_is_one_line_and_changes_nothing(tmp_path, call, rule):
    index = build(tmp_path / "i", ["a", "b"], year=[1, 2])
    before = Index(tmp_path / "i").info()
    with pytest.raises(UserError, match=rule) as caught:
        call(index, tmp_path)
    assert "\n" not in str(caught.value)
    assert Index(tmp_path / "i").info() == before
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


def test_a_column_may_have_any_name(tmp_path):
    index = build(tmp_path / "i", ["a", "b"], **{"#row": [5, 6], "": [1, 2]})
    assert index.allowed([("#row", "=", 6), ("", "<", 9)]).tolist() == [False, True]


def test_what_another_writer_made_anew_is_left_alone(tmp_path, monkeypatch):
    """Two clear away what a killed writer left: the slower one meets the faster one's directory."""
    partial = tmp_path / "d.partial"
    partial.mkdir()
    (partial / "left").touch()
    real, met = files.lock, []

    def slower(path, descriptor, *, wait=True):
        if not met:  # the faster one has removed it, and fills another
            met.append(path)
            shutil.rmtree(partial)
            partial.mkdir()
            (partial / "faster").touch()
            return real(path, descriptor, wait=wait)
        assert (partial / "faster").exists()
        raise BlockingIOError

    monkeypatch.setattr(files, "lock", slower)
    with pytest.raises(UserError, match="one writer at a time"):
        files.write_directory(tmp_path / "d", lambda place: (place / "slower").touch())
    assert os.listdir(partial) == ["faster"] and len(met) == 1


def test_a_directory_that_cannot_be_swapped_stays(tmp_path, monkeypatch):
    final = tmp_path / "d"
    final.mkdir()
    (final / "old").touch()
    real, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        files.swap_directory(final, lambda place: place.mkdir(), ".scratch")
    assert os.listdir(final) == ["old"]
