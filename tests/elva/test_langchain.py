"""LangChain's retriever over an index: LangChain's own tests, and the answers of `Searcher`."""

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests

from elva.errors import IndexFault, UserError
from elva.index import Index
from elva.integrations.langchain import ElvaRetriever
from elva.search import Hit, Searcher
from tests.elva import sentence_models, shelf

Shelf = tuple[Searcher, Index]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelf.build(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")
    shelf.offline(monkeypatch)


# In place: LangChain counts on a setting by which every coroutine is marked, and lets none of its
# tests be overridden.
pytest.mark.asyncio(RetrieversIntegrationTests.test_ainvoke_returns_documents)


class TestLangChainsOwn(RetrieversIntegrationTests):
    """What LangChain asks of every retriever."""

    @pytest.fixture(autouse=True)
    def _over(self, built: Shelf) -> None:
        self.directory = built[1].directory

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return ElvaRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"index": str(self.directory)}

    @property
    def retriever_query_example(self) -> str:
        return "a cat"


def same(found: list[Document], hits: list[Hit]) -> None:
    """Ids, places and scores to the bit."""
    assert [(d.id, d.metadata["rank"], d.metadata["score"]) for d in found] == [
        (hit.id, hit.rank, hit.score) for hit in hits
    ]


def test_answers_are_the_searchers(built: Shelf) -> None:
    """Of words, of a picture, under conditions; those of `invoke` come before the retriever's."""
    searcher, index = built
    retriever = ElvaRetriever(index=index.directory, k=4, where=[("year", ">=", 1992)])
    hits = searcher.search(index, "a cat", k=4, where=[("year", ">=", 1992)])
    same(retriever.invoke("a cat"), hits)
    assert len(hits) == 4
    image = shelf.picture(index.directory.parent, 3)
    shown = searcher.search(index, image=image, k=2, where=[("year", "<", 1998)])
    same(retriever.invoke("", image=str(image), k=2, where=[("year", "<", 1998)]), shown)
    assert (shown[0].id, shown[0].rank) == ("2:3", 1) and shown[0].score > 0.9999
    later = retriever.ainvoke("", image=image, k=2, where=[("year", "<", 1998)])
    same(asyncio.run(later), shown)


def test_what_is_set_afterwards_is_asked_with(built: Shelf) -> None:
    """Or, of what is opened once, refused."""
    searcher, index = built
    retriever = ElvaRetriever(index=index, model=searcher.encoder, k=2)
    retriever.k, retriever.where = 4, [("year", ">=", 1992)]
    hits = searcher.search(index, "a cat", k=4, where=[("year", ">=", 1992)])
    same(retriever.invoke("a cat"), hits)
    same(retriever.model_copy(update={"k": 3}).invoke("a cat"), hits[:3])
    for name in ("index", "model", "engine"):
        with pytest.raises(ValueError, match="frozen"):
            setattr(retriever, name, "other")


def test_a_document_says_what_is_known_of_an_item(built: Shelf) -> None:
    _, index = built
    found = {d.id: d for d in ElvaRetriever(index=index, k=9).invoke("a cat")}
    assert len(found) == 9
    text, picture = found["1:1"], found["2:4"]
    assert (text.page_content, text.metadata["image"]) == ("A dog on a beach.", None)
    assert picture.page_content == "Picture 4"
    assert picture.metadata == {
        "id": "2:4", "rank": picture.metadata["rank"], "score": picture.metadata["score"],
        "name": "Picture 4", "summary": "", "year": 1998, "source_score": "high",
        "image": str(shelf.picture(index.directory.parent, 4)),
    }  # fmt: skip


def test_threads_and_tasks_at_once_get_their_own_answers(built: Shelf) -> None:
    searcher, index = built
    retriever = ElvaRetriever(index=index, model=searcher.encoder, k=3)
    words = [f"{word} number {i}" for i in range(8) for word in ("a cat", "ice cream")]
    alone = [searcher.search(index, one, k=3) for one in words]
    for found, hits in zip(retriever.batch(words), alone, strict=True):
        same(found, hits)

    async def together() -> list[list[Document]]:
        return await retriever.abatch(words)

    for found, hits in zip(asyncio.run(together()), alone, strict=True):
        same(found, hits)


def test_it_is_a_part_of_a_chain(built: Shelf) -> None:
    retriever = ElvaRetriever(index=built[1], k=2)
    chain = retriever | (lambda found: " / ".join(d.page_content for d in found))
    assert chain.invoke("a cat") == " / ".join(d.page_content for d in retriever.invoke("a cat"))


def test_an_instruction_is_the_one_that_was_given(tmp_path: Path) -> None:
    model = sentence_models.text(
        tmp_path, longest=48, prompts={"query": "Instruct: Find it.\nQuery:", "document": ""}
    )
    searcher = Searcher(model)
    index = searcher.index(tmp_path / "texts.index", [*map(sentence_models.shown, "abc", "abc")])
    retriever = ElvaRetriever(index=index, instruction="Find a letter.", k=1)
    for told, asked in (("Find a letter.", {}), ("Another.", {"instruction": "Another."})):
        same(retriever.invoke("b", **asked), searcher.search(index, "b", instruction=told, k=1))
    assert retriever.invoke("b") != retriever.invoke("b", instruction="Another.")


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"where": [("colour", "=", "red")]}, "where must name a field, got 'colour'"),
        ({"engine": "faiss"}, "engine must be one of exact, "),
        ({"top_k": 3}, "an argument must be one of .*index, model, k, .*, got top_k; leave it out"),
        ({"index": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_asked_is_one_line_before_the_first_query(built, how, rule) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        ElvaRetriever(**{"index": built[1].directory, **how})
    assert "\n" not in str(caught.value)


def test_another_model_is_refused_before_the_first_query(built: Shelf, tmp_path: Path) -> None:
    other = sentence_models.clip(tmp_path, seed=1)
    with pytest.raises(IndexFault, match="model must be the one that made"):
        ElvaRetriever(index=built[1], model=other)
    with pytest.raises(UserError, match="query must hold words"):
        ElvaRetriever(index=built[1]).invoke(" ")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("datasets", "datasets", "datasets"),
        ("langchain", "langchain_core", "langchain"),
        ("llama_index", "llama_index", "llama-index"),
        ("mteb", "mteb", "mteb"),
    ],
)
def test_a_program_that_is_not_installed_is_one_line_with_its_extra(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [x for x in sys.modules if x.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"elva.integrations.{name}", raising=False)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"elva.integrations.{name}")
    assert str(caught.value).endswith(f"; pip install 'elva[{extra}]'")
    assert "\n" not in str(caught.value)
