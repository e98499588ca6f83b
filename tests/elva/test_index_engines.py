"""One suite for every engine: exact, FAISS's IVF and HNSW, Milvus as a file and over TCP."""

import contextlib
import datetime
import json
import shutil
import sys
import time

import pytest
import torch

from elva.errors import IndexFault, UserError
from elva.index import Index
from elva.index.engines import export, milvus, open_engine
from elva.index.engines.faiss import FaissEngine
from elva.model.identity import Identity
from tests.elva import milvus_server

MODEL = Identity("a model", "revision", "preprocessing")
ENGINES = ("exact", "faiss-ivf", "faiss-hnsw", "milvus", "milvus server")
ROWS, DIM = 3000, 32
FLOOR = {
    "exact": 1.0,
    "faiss-ivf": 0.95,
    "faiss-hnsw": 0.98,
    "milvus": 0.999,
    "milvus server": 0.999,
}


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
    with contextlib.ExitStack() as stack:
        if spec == "milvus server":
            place = tmp_path_factory.mktemp("server")
            spec = f"milvus:{stack.enter_context(milvus_server.serving(place))[0]}"
        if spec == "milvus":
            spec = f"milvus:{tmp_path_factory.mktemp('milvus')}/items.db"
        if spec != "exact":
            export(index, spec)
        yield request.param, open_engine(index, spec)


@pytest.fixture
def server(tmp_path):
    with milvus_server.serving(tmp_path) as (uri, recorded):
        yield f"milvus:{uri}", recorded


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


@pytest.mark.parametrize(
    ("kind", "effort", "k", "told"),
    [
        ("hnsw", None, 3, "efSearch 64"),
        ("hnsw", None, 20, "efSearch 80"),
        ("hnsw", 5, 20, "efSearch 5"),
        ("ivf", None, 3, "nprobe 8"),
        ("ivf", 5, 3, "nprobe 5"),
    ],
)
def test_how_much_faiss_looks_at(index, kind, effort, k, told, monkeypatch):
    export(index, f"faiss-{kind}")
    answers = FaissEngine(index, kind, effort=effort)
    asked, search = [], answers._found.search
    monkeypatch.setattr(
        answers._found, "search", lambda *given, params: asked.append(params) or search(*given)
    )
    answers.search(clustered(2, 2), k)
    name, number = told.split()
    assert [getattr(params, name) for params in asked] == [int(number)]


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


def test_a_password_in_an_address_is_not_repeated(index):
    for spec in ("milvus:http://me:hidden@127.0.0.1:9", "milvus:http://hidden@127.0.0.1:9/a"):
        for call in (open_engine, export):
            with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9") as caught:
                call(index, spec)
            assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        "Search",
        *(pytest.param(x, marks=pytest.mark.thorough) for x in ("ShowCollections", "Insert")),
    ],
)
def test_a_server_that_takes_a_call_and_does_not_answer_gets_a_line(
    tmp_path, server, monkeypatch, call
):
    spec, recorded = server
    index = small(tmp_path / "i")
    export(index, spec)
    answers = open_engine(index, spec)
    recorded.stalls = call
    monkeypatch.setattr(milvus, "SECONDS", {})
    monkeypatch.setattr(milvus, "WORK_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match="Milvus must answer"):
        if call == "Search":
            answers.search(clustered(1, 2), 3)
        else:
            export(index, spec)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "rows",
    [[40], [3, 3],
     *(pytest.param(x, marks=pytest.mark.thorough) for x in ([-1], [1 << 62], [*range(40)] * 2))],
)  # fmt: skip
def test_rows_that_a_server_makes_up_are_refused(tmp_path, server, monkeypatch, rows):
    from pymilvus import MilvusClient

    spec, _ = server
    index = small(tmp_path / "i")
    export(index, spec)
    answers = open_engine(index, spec)
    monkeypatch.setattr(MilvusClient, "search", lambda *_, **__: [[{"row": x} for x in rows]])
    with pytest.raises(UserError, match="must answer with rows of the index, each once"):
        answers.search(clustered(1, 2), 3)


# -- what a server is asked ------------------------------------------------------------------------


def small(path, count=40, **columns):
    return Index.build(path, [f"i{i}" for i in range(count)], clustered(count, 1), model=MODEL,
                       columns=columns)  # fmt: skip


def test_what_a_server_is_asked(tmp_path, server, monkeypatch):
    """The calls of an export and a search; where a filter leaves few rows, none."""
    spec, recorded = server
    index = small(tmp_path / "i", year=[*range(40)])
    export(index, spec)
    done = [name for name, _ in recorded.calls]
    order = ("CreateCollection", "CreateIndex", "Insert", "Flush", "RenameCollection")
    assert [name for name in done if name in order] == [*order]
    (asked,) = recorded.asked("CreateIndex")
    given = {pair.key: pair.value for pair in asked.extra_params}
    assert given == {
        "index_type": "HNSW", "metric_type": "COSINE", "M": "32", "efConstruction": "200"
    }  # fmt: skip
    answers = open_engine(index, spec)
    recorded.calls.clear()
    answers.search(clustered(2, 2), 3, where=[("year", "<", 20)])
    assert recorded.calls == []
    monkeypatch.setattr(milvus, "EXACT_BELOW", 0)
    found = answers.search(clustered(2, 2), 3, where=[("year", "<", 20)])
    assert torch.equal(found.rows, index.search(clustered(2, 2), 3, where=[("year", "<", 20)]).rows)
    (asked,) = recorded.asked("Search")
    assert asked.dsl == "m_year < 20" and list(asked.output_fields) == ["row"]
    given = {pair.key: pair.value for pair in asked.search_params}
    assert given["topk"] == "19" and json.loads(given["params"])["ef"] == 64


@pytest.mark.thorough
@pytest.mark.parametrize(
    "call",
    ["Insert", "RenameCollection", *(pytest.param(name, marks=pytest.mark.thorough)
                                     for name in ("CreateCollection", "CreateIndex", "Flush"))],
)  # fmt: skip
def test_an_export_that_fails_leaves_what_was_there(tmp_path, server, call):
    """At any of its calls, and the next one is not hindered by what it left."""
    spec, recorded = server
    index = small(tmp_path / "i")
    export(index, spec)
    wanted = open_engine(index, spec).search(clustered(3, 2), 5).rows
    shutil.copytree(tmp_path / "i", tmp_path / "copy" / "i")
    later = Index(tmp_path / "copy" / "i").delete(["i0"])
    recorded.fails = call
    with pytest.raises(UserError, match=r"Milvus must answer; .*the disk is full") as caught:
        export(later, spec)
    assert "\n" not in str(caught.value)
    recorded.fails = ""
    assert torch.equal(open_engine(index, spec).search(clustered(3, 2), 5).rows, wanted)
    with pytest.raises(IndexFault, match="must be of the index as it is"):
        open_engine(later, spec)
    export(later, spec)
    assert 0 not in open_engine(later, spec).search(clustered(3, 2), 39).rows


def test_indexes_on_one_server_leave_each_other_alone(tmp_path, server):
    spec, recorded = server
    one, two = small(tmp_path / "one"), small(tmp_path / "two", 30)
    export(one, spec)
    export(two, spec)
    export(one, spec)
    assert len(recorded.asked("DropCollection")) == 1  # its own, of the export before
    for index in (one, two):
        own = index.embeddings([*range(30)])
        found = open_engine(index, spec).search(own, 1).rows[:, 0]
        assert torch.equal(found, torch.arange(30))


@pytest.mark.parametrize("kind", ["faiss-hnsw", "milvus"])
def test_an_index_built_anew_in_the_same_place_is_another(kind, tmp_path):
    """As many changes in, with the same model: told by what it holds."""
    spec = f"milvus:{tmp_path}/items.db" if kind == "milvus" else kind
    first = small(tmp_path / "i")
    export(first, spec)
    kept = tmp_path / "derived"
    if kind != "milvus":
        shutil.copytree(tmp_path / "i" / "derived", kept)
    shutil.rmtree(tmp_path / "i")
    index = Index.build(tmp_path / "i", [*"abc"], clustered(3, 5), model=MODEL)
    assert index.manifest.generation == first.manifest.generation
    if kind != "milvus":
        shutil.copytree(kept, tmp_path / "i" / "derived")
    with pytest.raises(IndexFault, match="must be of the index as it is"):
        open_engine(index, spec)


def test_fields_of_any_name_and_type_are_kept_apart_from_milvus_own(tmp_path):
    spec = f"milvus:{tmp_path}/items.db"
    day = datetime.date(2020, 1, 1)
    index = small(
        tmp_path / "i", 40, row=[*range(100, 140)], vector=["v"] * 40, day=[day] * 40,
        **{"or": [True, False] * 20, "a b' or 1 == 1": [*range(40)], "#row": [0.5] * 40},
    )  # fmt: skip
    export(index, spec)
    answers = open_engine(index, spec)
    for where in (
        [("row", "<", 110)], [("vector", "=", "v"), ("or", "=", True)],
        [("a b' or 1 == 1", ">", 30)], [("#row", "<", 1), ("row", "in", [101, 139])],
    ):  # fmt: skip
        query = clustered(4, 2)
        assert torch.equal(answers.search(query, 5, where=where).rows,
                           index.search(query, 5, where=where).rows), where  # fmt: skip
    with pytest.raises(IndexFault, match="must name a field of numbers, texts or booleans"):
        answers.search(clustered(1, 2), 1, where=[("day", "=", day)])
