"""The index: what a search finds, what may change, what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from elva.errors import IndexFault, UserError
from elva.index import Index, exact
from elva.index import manifest as manifest_file
from elva.model.identity import Identity

MODEL = Identity("a model", "revision", "preprocessing")
DTYPES = ("float16", "bfloat16", "float32")


def rows(count, dim=48, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def names(count, start=0):
    return [f"item {i}" for i in range(start, start + count)]


def build(path, embeddings, dtype="float16", codes=True, **columns):
    return Index.build(
        path, names(len(embeddings)), embeddings, model=MODEL, dtype=dtype, columns=columns,
        codes=codes,
    )  # fmt: skip


@pytest.fixture(params=[True, False], ids=["codes", "rows"])
def codes(request, monkeypatch):
    """Codes are read where rows are many; these tests have few."""
    monkeypatch.setattr(exact, "CODED_BYTES", 0)
    monkeypatch.setattr(exact, "DEEP", 4)
    return request.param


def truth(query, embeddings, dtype, k, allowed=None):
    """Scores and rows in float64 of the embeddings as they are stored."""
    stored = embeddings.to(getattr(torch, dtype)).double()
    scores = torch.nn.functional.normalize(query.double(), dim=1)
    scores = scores @ torch.nn.functional.normalize(stored, dim=1).T
    if allowed is not None:
        scores[:, ~torch.from_numpy(allowed)] = -float("inf")
        k = min(k, int(allowed.sum()))
    best = scores.sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], best.indices[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 10, 3000])
def test_search_is_exact(tmp_path, dtype, k, codes):
    embeddings, query = rows(2500), rows(5, seed=1)
    index = build(tmp_path / "i", embeddings[:2000], dtype, codes)
    index = index.add(names(500, 2000), embeddings[2000:], model=MODEL)
    scores, expected = truth(query, embeddings, dtype, k)
    found = index.search(query, k)
    # Rows may change places only where float64 tells their scores apart by less than fp32 can.
    moved = found.rows != expected
    assert (found.scores.double() - scores).abs().max() < 1e-6
    assert moved.sum() <= 4 and torch.equal(found.rows.sort().values, expected.sort().values)
    assert found.scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_search_is_exact_where_scores_lie_close(tmp_path, dtype, monkeypatch):
    """A collapsed model: candidates of the rounded query cannot be proven, nor believed."""
    embeddings = 1 + 2e-2 * rows(3000)
    query = 1 + 1e-3 * rows(4, seed=1)
    widened, widen = [], exact.Stack.widened
    monkeypatch.setattr(exact.Stack, "widened", lambda *a: widened.append(1) or widen(*a))
    found = build(tmp_path / "i", embeddings, dtype, codes=False).search(query, 10)
    scores, _ = truth(query, embeddings, dtype, 10)
    stored = embeddings.to(getattr(torch, dtype)).double()
    own = torch.cosine_similarity(query.double()[:, None], stored[found.rows], dim=-1)
    assert widened
    assert (own - scores).abs().max() < 2e-7  # nothing better was left out


def test_copies_of_a_row_come_in_order(tmp_path):
    one = rows(1)
    index = build(tmp_path / "i", one.repeat(40, 1))
    index = index.add(["last"], one, model=MODEL)
    assert index.search(one, 41).rows[0].tolist() == list(range(41))
    assert index.search(torch.zeros(1, 48), 3).rows[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kept", [1, 40, 1500, 1990, 2000])
def test_a_filter_leaves_the_exact_answer_among_the_rest(tmp_path, kept, codes):
    embeddings, query = rows(2000), rows(6, seed=2)
    place = np.random.default_rng(0).permutation(2000)
    columns = {"place": place.tolist(), "kind": ["a", "b"] * 1000}
    index = build(tmp_path / "i", embeddings, codes=codes, **columns)
    found = index.search(query, 30, where=[("place", "<", kept)])
    scores, expected = truth(query, embeddings, "float16", 30, place < kept)
    assert torch.equal(found.rows, expected) and torch.equal(found.scores.isinf(), scores.isinf())
    both = index.search(query, 30, where=[("place", "<", str(kept)), ("kind", "in", ["b"])])
    odd = np.arange(2000) % 2 == 1
    assert torch.equal(both.rows, truth(query, embeddings, "float16", 30, (place < kept) & odd)[1])


def test_added_and_deleted_items_are_found_and_not_found(tmp_path):
    embeddings = rows(600)
    index = build(tmp_path / "i", embeddings[:300], colour=["red"] * 300)
    first = sorted((tmp_path / "i" / "segments").glob("*.elva"))
    stamp = first[0].stat()
    index = index.add(names(300, 300), embeddings[300:], model=MODEL)
    index = index.delete(["item 5", "item 500"])
    assert len(index) == 598 and index.info()["deleted"] == 2
    assert first[0].stat().st_mtime_ns == stamp.st_mtime_ns  # never written again
    best = index.search(embeddings[[5, 6, 500, 501]], 1).rows[:, 0]
    assert index.ids(best)[1::2] == ["item 6", "item 501"]
    assert not {"item 5", "item 500"} & set(index.ids(best))
    assert index.search(embeddings[:1], 10, where=[("colour", "=", "red")]).rows.max() < 300
    index = index.add(["item 5"], embeddings[500:501], model=MODEL)  # free again
    assert index.ids(index.search(embeddings[500:501], 1).rows[0]) == ["item 5"]
    index = index.add(["item 5"], embeddings[5:6], model=MODEL, overwrite=True)
    assert index.ids(index.search(embeddings[5:6], 1).rows[0]) == ["item 5"]
    assert len(index) == 599
    assert Index(tmp_path / "i").info() == index.info()


def test_an_index_can_be_emptied_and_built_empty(tmp_path):
    index = build(tmp_path / "i", rows(3)).delete(names(3))
    assert len(index) == 0 and index.search(rows(2), 5).rows.shape == (2, 0)
    empty = Index.build(tmp_path / "e", [], torch.empty(0, 48), model=MODEL)
    assert empty.search(rows(2), 5).scores.shape == (2, 0)
    assert len(empty.add(["a"], rows(1), model=MODEL)) == 1


def test_an_open_index_is_not_changed_by_a_writer(tmp_path):
    embeddings = rows(50)
    old = build(tmp_path / "i", embeddings)
    before = old.search(embeddings[:4], 5)
    Index.build(tmp_path / "i", ["x"], rows(1, seed=9), model=MODEL, overwrite=True)
    after = old.search(embeddings[:4], 5)
    assert torch.equal(before.rows, after.rows) and torch.equal(before.scores, after.scores)
    assert len(Index(tmp_path / "i")) == 1 and len(os.listdir(tmp_path / "i" / "segments")) == 2


def test_segments_are_assembled_without_being_written_again(tmp_path):
    parts = [build(tmp_path / f"p{i}", rows(20, seed=i)) for i in range(2)]
    paths = [p.segments[0].path for p in parts]
    with pytest.raises(IndexFault, match="ids must be unique, got 'item 0' twice"):
        Index.assemble(tmp_path / "i", paths)
    assert not (tmp_path / "i").exists()
    other = Index.build(tmp_path / "o", names(20, 20), rows(20, seed=5), model=MODEL)
    paths[1] = other.segments[0].path
    index = Index.assemble(tmp_path / "i", paths)
    assert len(index) == 40
    assert index.segments[0].path.stat().st_ino == paths[0].stat().st_ino
    late = Index.build(tmp_path / "l", ["late"], rows(1, seed=6), model=MODEL)
    assert len(index.add_segments([late.segments[0].path])) == 41


def test_embeddings_and_rows_go_back_and_forth(tmp_path):
    embeddings = rows(30)
    index = build(tmp_path / "i", embeddings, "float32").add(["z"], rows(1, seed=3), model=MODEL)
    asked = ["item 7", "z", "item 0"]
    assert index.rows(asked).tolist() == [7, 30, 0]
    assert torch.equal(index.embeddings([30, 7]), torch.cat([rows(1, seed=3), embeddings[7:8]]))


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda i, p: i.search(rows(1, 47), 3), r"search: query must be \[Q, 48\] of floats"),
        (lambda i, p: i.search(rows(1), 0), "search: k must be at least 1, got 0"),
        (lambda i, p: i.search(rows(1), 3, model=Identity("b", "other", "preprocessing")),
         "index: model must be the one that made"),
        (lambda i, p: i.search(rows(1), 3, model=Identity("a", "revision", "other")),
         "index: model must be the one that made"),
        (lambda i, p: i.search(rows(1), 3, where=[("size", "=", 1)]),
         "search: where must name a field, got 'size'; there are id, year"),
        (lambda i, p: i.search(rows(1), 3, where=[("year", "~", 1)]), "where must compare by one"),
        (lambda i, p: i.search(rows(1), 3, where=[("year", "=", "red")]),
         "where must give year a value of type int64, got 'red'"),
        (lambda i, p: i.add(["item 3"], rows(1), model=MODEL), "ids must be new, got 'item 3'"),
        (lambda i, p: i.add([*"baa"], rows(3), model=MODEL), "ids must be unique, got 'a' twice"),
        (lambda i, p: i.add(["a"], rows(2), model=MODEL), "ids must be one a row, got 1 for 2"),
        (lambda i, p: i.add([None], rows(1), model=MODEL), "ids must be text, got null"),
        (lambda i, p: i.add(["a"], rows(1) * float("nan"), model=MODEL), "must be finite.*row 0"),
        (lambda i, p: i.add(["a"], rows(1, 47), model=MODEL), r"embeddings must be \[n, 48\]"),
        (lambda i, p: i.delete(["absent"]), "ids must be in the index, got 'absent'"),
        (lambda i, p: Index(p), "must be an index, got no index.json"),
        (lambda i, p: Index.build(i.directory, ["a"], rows(1), model=MODEL), "must not hold"),
        (lambda i, p: Index.build(p, ["a"], rows(1), model=MODEL), "must be empty or an index"),
        (lambda i, p: Index.build(p / "n", ["a"], rows(1), model=MODEL, dtype="int8"), "dtype"),
        (lambda i, p: Index.build(p / "n", ["a"], [], model=MODEL), r"must be \[n, D\]"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_changes_nothing(tmp_path, call, rule):
    index = build(tmp_path / "i", rows(10), year=list(range(10)))
    before = index.info()
    with pytest.raises(UserError, match=rule) as caught:
        call(index, tmp_path)
    assert "\n" not in str(caught.value)
    assert Index(tmp_path / "i").info() == before
    assert len(list((tmp_path / "i" / "segments").iterdir())) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i"]


def test_a_second_writer_is_refused(tmp_path):
    index = build(tmp_path / "i", rows(3))
    with manifest_file.writing(tmp_path / "i"):
        before = len(os.listdir("/dev/fd"))
        with pytest.raises(IndexFault, match="one writer"):
            index.delete(["item 1"])
        assert len(os.listdir("/dev/fd")) <= before  # and keeps no file open
    assert len(index.delete(["item 1"])) == 2


@pytest.mark.parametrize("size", [0, 8, 47, 4095, 4096, 5000])
def test_a_truncated_segment_is_refused_before_it_is_read(tmp_path, size):
    path = build(tmp_path / "i", rows(100)).segments[0].path
    os.truncate(path, size)
    with pytest.raises(IndexFault, match=f"{path}: must have") as caught:
        Index(tmp_path / "i", verify=False)
    assert "\n" not in str(caught.value)


def test_another_index_segment_does_not_pass_for_its_own(tmp_path):
    one, two = (build(tmp_path / n, rows(100, seed=s)) for s, n in enumerate("ab"))
    Path(one.segments[0].path).write_bytes(two.segments[0].path.read_bytes())
    with pytest.raises(IndexFault, match="the header that"):
        Index(tmp_path / "a", verify=False)


def test_rows_of_any_strides_are_stored(tmp_path):
    for embeddings in (torch.randn(1, 3).t(), torch.randn(3, 8)[:, ::2], torch.empty(0, 8)):
        ids = names(len(embeddings))
        index = Index.build(tmp_path / "i", ids, embeddings, model=MODEL, overwrite=True)
        assert torch.equal(index.embeddings(range(len(ids))), embeddings.half().float())


def test_an_id_that_is_no_text_is_not_there(tmp_path):
    """As the command line takes a name with bytes that are no UTF-8."""
    index = Index.build(tmp_path / "i", ["a"], torch.ones(1, 4), model=Identity("m", "r", "p"))
    with pytest.raises(IndexFault, match="must be in the index"):
        index.delete(["a\udc9b"])
    assert len(Index(tmp_path / "i")) == 1


def test_an_index_is_built_where_a_kill_left_a_half_manifest(tmp_path):
    path = tmp_path / "index"
    (path / "segments").mkdir(parents=True)
    (path / "index.json.partial").write_text("{")
    Index.build(path, ["a"], rows(1), model=MODEL)
    assert Index(path).ids([0]) == ["a"] and not [*path.rglob("*.partial")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.partial").touch()
    with pytest.raises(IndexFault, match="must be empty or an index"):
        Index.build(tmp_path / "other", ["a"], rows(1), model=MODEL)
