"""LangChain: an index as a retriever. Written against langchain-core 1.8."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from elva.errors import UserError
from elva.index.where import Where
from elva.integrations.asking import Asked, content, known

try:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import run_in_executor
    from pydantic import Field, PrivateAttr
except ModuleNotFoundError as error:
    raise ImportError(
        f"elva.integrations.langchain needs langchain-core ({error}); pip install 'elva[langchain]'"
    ) from None


class ElvaRetriever(BaseRetriever):
    """A LangChain retriever over an index of `elva index build`.

    A document's `page_content` is the item's text, or what a picture is called; its `metadata` has
    `id`, `rank` (from 1), `score` (the cosine), `name`, `summary`, `image` (a path or None), and
    the index's further fields, of which a `rank` or `score` becomes `source_rank`, `source_score`.
    Calls from several threads wait for each other.

    Args:
        index: a directory, whose every byte is read and compared first, or an open `Index`.
        model: where the index's model lies now, or its encoder; where it lay for None.
        k: documents a query, at least 1.
        instruction: what to look for, as in training; the index's own for None.
        where: conditions on the index's fields, all of which must hold; see `Index.search`.
        engine: "exact", or what `elva index export` made: `faiss-ivf`, `faiss-hnsw`, `milvus:URI`.

    `k`, `instruction` and `where` may be given to `invoke` as well, and `image`, a picture's path
    to start from beside words or, with an empty query, in their place.

    Raises:
        UserError: in one line: no index there, another model, a query that cannot be answered.

    Example::

        retriever = ElvaRetriever(index="pictures.index", k=3)
        retriever.invoke("a dog on a beach")
        retriever.invoke("the same in winter", image="beach.jpg", where=[("year", ">=", 1999)])
    """

    index: Any = Field(frozen=True)  # opened once, with the model and the engine
    model: Any = Field(None, frozen=True)
    k: int = 10
    instruction: str | None = None
    where: Any = None
    engine: str = Field("exact", frozen=True)

    _asked: Asked = PrivateAttr()

    def __init__(self, **fields: Any) -> None:
        unknown = [name for name in fields if name not in type(self).model_fields]
        if unknown:
            raise UserError(
                f"langchain: an argument must be one of {', '.join(type(self).model_fields)}, got "
                f"{unknown[0]}; leave it out"
            )
        super().__init__(**fields)  # what is raised inside, pydantic makes pages of
        self._asked = Asked(self.index, self.model, k=self.k, where=self.where, engine=self.engine)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        image: str | Path | None = None,
        k: int | None = None,
        instruction: str | None = None,
        where: Where | None = None,
    ) -> list[Document]:
        hits = self._asked.hits(
            query, image,
            k=self.k if k is None else k,
            instruction=self.instruction if instruction is None else instruction,
            where=self.where if where is None else where,
        )  # fmt: skip
        return [Document(content(hit), id=hit.id, metadata=known(hit)) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: Any, **asked: Any
    ) -> list[Document]:
        ask = partial(
            self._get_relevant_documents, query, run_manager=run_manager.get_sync(), **asked
        )
        return await run_in_executor(None, ask)
