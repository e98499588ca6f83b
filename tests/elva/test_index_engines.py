"""One suite for every engine: exact, FAISS's IVF and HNSW, Milvus."""

import sys

import pytest
import torch

from elva.errors import IndexFault, UserError
from elva.index import Index
from elva.index.engines import export, open_engine
from elva.model.identity import Identity

MODEL = Identity("a model", "revision", "preprocessing")
ENGINES = ("exact", "faiss-ivf", "faiss-hnsw", "milvus")
ROWS, DIM = 3000, 32
FLOOR = {"exact": 1.0, "faiss-ivf": 0.95, "faiss-hnsw": 0.98, "milvus": 0.999}


def clustered(count, seed):
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(40, DIM, generator=generator)
    generator.manual_seed(seed)
    chosen = torch.randint(40, (count,), generator=generator)
    return centres[chosen] + 0.4 * torch.randn(count, DIM, generator=generator)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    ids = [f"i{i}" for i in range(ROWS)]
    columns = {"year": list(range(ROWS)), "kind": ["cat", 'dog "x"'] * (ROWS // 2)}
    made = Index.build(
        tmp_path_factory.mktemp("index") / "i", ids[:2000], clustered(ROWS, 1)[:2000], model=MODEL,
        columns={k: v[:2000] for k, v in columns.items()},
    )  # fmt: skip
    made = made.add(ids[2000:], clustered(ROWS, 1)[2000:], model=MODEL,
                    columns={k: v[2000:] for k, v in columns.items()})  # fmt: skip
    return made.delete([f"i{i}" for i in range(0, 60, 2)])


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, index, tmp_path_factory):
    spec = request.param
    if spec == "milvus":
        spec = f"milvus:{tmp_path_factory.mktemp('milvus')}/items.db"
    if spec != "exact":
        export(index, spec)
    return request.param, open_engine(index, spec)


def test_recall_and_scores_against_exact(engine, index):
    name, answers = engine
    query = clustered(200, 2)
    found, truth = answers.search(query, 10, model=MODEL), index.search(query, 10)
    hits = 0
    for i in range(len(query)):
        known = dict(zip(truth.rows[i].tolist(), truth.scores[i].tolist(), strict=True))
        for row, score in zip(found.rows[i].tolist(), found.scores[i].tolist(), strict=True):
            if row in known:
                assert score == known[row]
                hits += 1
    recall = hits / truth.rows.numel()
    print(f"\n{name}: recall@10 {recall:.4f}")
    assert recall >= FLOOR[name]
    assert (found.scores[:, 1:] <= found.scores[:, :-1]).all()


def test_an_item_finds_itself(engine, index):
    own = index.embeddings([777, 2500])
    found = engine[1].search(own, 1)
    assert found.rows[:, 0].tolist() == [777, 2500]
    assert found.scores[:, 0].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize(
    "where",
    [
        [("year", "<", 300)],
        [("year", ">=", "2990")],
        [("kind", "=", 'dog "x"'), ("year", "in", [1, 61, 63, 2999])],
    ],
)
def test_filters_hold(engine, index, where):
    query = clustered(20, 3)
    found, truth = (e.search(query, 5, where=where) for e in (engine[1], index))
    allowed = set(index.allowed(where).nonzero()[0].tolist())
    rows = [row for row in found.rows.flatten().tolist() if row >= 0]
    assert set(rows) <= allowed and len(rows) >= 0.9 * truth.rows.numel()


def test_deleted_items_are_not_found(engine, index):
    gone = index.segments[0].embeddings[:60:2].float()
    found = engine[1].search(gone, 3).rows
    assert not set(found.flatten().tolist()) & set(range(0, 60, 2))


def test_more_than_there_is(engine, index):
    found = engine[1].search(clustered(2, 4), 5000, where=[("year", "<", 64)])
    assert found.rows.shape == (2, len(index.allowed([("year", "<", 64)]).nonzero()[0]))


def test_no_queries_and_no_matches(engine):
    assert engine[1].search(torch.empty(0, DIM), 3).rows.shape[0] == 0
    assert engine[1].search(clustered(1, 5), 3, where=[("year", ">", 9999)]).rows.shape == (1, 0)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda e: e.search(torch.ones(1, 3), 3), r"query must be \[Q, 32\]"),
        (lambda e: e.search(torch.ones(1, DIM), 0), "k must be at least 1"),
        (lambda e: e.search(torch.ones(1, DIM), 1, model=Identity("b", "x", "y")), "model must be"),
        (lambda e: e.search(torch.ones(1, DIM), 1, where=[("size", "=", 1)]), "must name a field"),
        (lambda e: e.search(torch.ones(1, DIM), 1, where=[("year", "=", "x")]), "value of type"),
    ],
)
def test_bad_input_is_refused_alike(engine, call, rule):
    with pytest.raises(IndexFault, match=rule):
        call(engine[1])


@pytest.mark.parametrize("kind", ["faiss-hnsw", "faiss-ivf", "milvus"])
def test_what_was_exported_before_a_change_is_refused(kind, tmp_path):
    index = Index.build(tmp_path / "i", [f"{i}" for i in range(200)], clustered(200, 1),
                        model=MODEL)  # fmt: skip
    spec = f"milvus:{tmp_path}/items.db" if kind == "milvus" else kind
    with pytest.raises(UserError, match="must be exported first"):
        open_engine(index, spec)
    export(index, spec)
    assert open_engine(index, spec).search(clustered(1, 1), 1).rows.shape == (1, 1)
    index = index.delete(["3"])
    with pytest.raises(IndexFault, match=r"must be of the index as it is, got"):
        open_engine(index, spec)
    export(index, spec)
    open_engine(index, spec)
    if kind != "milvus":
        path = tmp_path / "i" / "derived" / f"{kind.removeprefix('faiss-')}.faiss"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        with pytest.raises(IndexFault, match="must have its checksum"):
            open_engine(index, spec)


@pytest.mark.parametrize("spec", ["", "annoy", "faiss-", "faiss-pq", "milvus:", "milvus"])
def test_an_unknown_engine_is_named(index, spec):
    for call in (open_engine, export):
        with pytest.raises(UserError, match="must be") as caught:
            call(index, spec)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "spec", "extra"),
    [("faiss", "faiss-ivf", "faiss"), ("pymilvus", "milvus:x.db", "milvus")],
)
def test_a_missing_package_names_the_extra(index, module, spec, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'elva\[{extra}\]'"):
        open_engine(index, spec)


def test_a_server_that_is_not_there_is_one_line(index):
    with pytest.raises(UserError, match=r"must be a Milvus file or server|Milvus must answer"):
        open_engine(index, "milvus:http://127.0.0.1:9")
