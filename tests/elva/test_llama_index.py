"""LlamaIndex's retriever over an index: the answers of `Searcher`, as nodes."""

import asyncio

import pytest
from llama_index.core import Settings
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode

from elva.errors import IndexFault, UserError
from elva.index import Index
from elva.integrations.llama_index import ElvaRetriever
from elva.search import Hit, Searcher
from tests.elva import sentence_models, shelf

Shelf = tuple[Searcher, Index]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelf.build(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.offline(monkeypatch)


def same(found: list[NodeWithScore], hits: list[Hit]) -> None:
    assert [(n.node_id, n.score, n.metadata["rank"]) for n in found] == [
        (hit.id, hit.score, hit.rank) for hit in hits
    ]


def test_answers_are_the_searchers(built: Shelf) -> None:
    """Of words, of a picture; an embedding that another retriever left in the query is not read."""
    searcher, index = built
    retriever = ElvaRetriever(index.directory, k=4, where=[("year", ">=", 1992)])
    hits = searcher.search(index, "a cat", k=4, where=[("year", ">=", 1992)])
    assert len(hits) == 4
    same(retriever.retrieve("a cat"), hits)
    same(retriever.retrieve(QueryBundle("a cat", embedding=[1.0] * 24)), hits)
    same(asyncio.run(retriever.aretrieve("a cat")), hits)
    image = str(shelf.picture(index.directory.parent, 3))
    shown = retriever.retrieve(QueryBundle("", image_path=image))
    assert shown[0].node_id == "2:3" and shown[0].score > 0.9999
    with pytest.raises(UserError, match=r"must be text or pictures .*, got pictures with text"):
        retriever.retrieve(QueryBundle("a cat", image_path=image))  # CLIP reads no such thing


def test_pictures_are_image_nodes(built: Shelf) -> None:
    _, index = built
    found = {n.node_id: n.node for n in ElvaRetriever(index, k=9).retrieve("a cat")}
    assert len(found) == 9
    text, picture = found["1:1"], found["2:4"]
    assert type(text) is TextNode and text.text == "A dog on a beach."
    path = str(shelf.picture(index.directory.parent, 4))
    assert isinstance(picture, ImageNode)
    assert (picture.image_path, picture.image_mimetype) == (path, "image/png")
    assert picture.resolve_image() == path and picture.text == "Picture 4"
    assert picture.metadata == {
        "id": "2:4", "rank": picture.metadata["rank"], "score": picture.metadata["score"],
        "name": "Picture 4", "summary": "", "image": path, "year": 1998, "source_score": "high",
    }  # fmt: skip
    again = ImageNode.from_dict(picture.to_dict())
    assert again.image_path == path and again.metadata == picture.metadata


def test_many_at_once_get_their_own_answers(built: Shelf) -> None:
    searcher, index = built
    retriever = ElvaRetriever(index, searcher.encoder, k=3)
    words = [f"{word} number {i}" for i in range(8) for word in ("a cat", "ice cream")]

    async def together() -> list[list[NodeWithScore]]:
        return await asyncio.gather(*map(retriever.aretrieve, words))

    for one, found in zip(words, asyncio.run(together()), strict=True):
        same(found, searcher.search(index, one, k=3))


def test_a_query_engine_reads_from_it(built: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    synthesizer = get_response_synthesizer(response_mode=ResponseMode.CONTEXT_ONLY)
    engine = RetrieverQueryEngine(ElvaRetriever(built[1], k=2), synthesizer)
    response = engine.query("a cat")
    assert [n.node_id for n in response.source_nodes] == [
        hit.id for hit in built[0].search(built[1], "a cat", k=2)
    ]
    assert all(n.text in str(response) for n in response.source_nodes)


def test_what_cannot_be_asked_is_one_line(built: Shelf, tmp_path) -> None:
    for how, rule in (
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"where": [("colour", "=", "red")]}, "where must name a field, got 'colour'"),
        ({"engine": "faiss"}, "engine must be one of exact, "),
    ):
        with pytest.raises(UserError, match=rule):
            ElvaRetriever(built[1], **how)
    with pytest.raises(IndexFault, match="model must be the one that made"):
        ElvaRetriever(built[1], sentence_models.clip(tmp_path, seed=1))
    with pytest.raises(UserError, match="no custom_embedding_strs, got 2; ask with query_str"):
        ElvaRetriever(built[1]).retrieve(QueryBundle("a", custom_embedding_strs=["a", "b"]))
