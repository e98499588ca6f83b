"""LlamaIndex: an index as a retriever. Written against llama-index-core 0.14."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from elva.errors import UserError
from elva.index import Index
from elva.index.where import Where
from elva.integrations.asking import Asked, content, known
from elva.model.encoder import Encoder
from elva.search import Hit

try:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode
except ModuleNotFoundError as error:
    raise ImportError(
        f"elva.integrations.llama_index needs llama-index-core ({error}); "
        "pip install 'elva[llama-index]'"
    ) from None


class ElvaRetriever(BaseRetriever):
    """A LlamaIndex retriever over an index of `elva index build`.

    A picture is found as an `ImageNode` with its path, a text as a `TextNode`; `score` is the
    cosine, `text` what the item says or is called, and `metadata` has `id`, `rank` (from 1),
    `score`, `name`, `summary`, `image` (a path or None) and the index's further fields, of which a
    `rank` or `score` becomes `source_rank`, `source_score`. Calls from several threads wait for
    each other.

    A query's `query_str` and `image_path` ask, alone or together; its `embedding`, which other
    retrievers leave in it, is another model's and is not read.

    Args:
        index: a directory, whose every byte is read and compared first, or an open `Index`.
        model: where the index's model lies now, or its encoder; where it lay for None.
        k: nodes a query, at least 1.
        instruction: what to look for, as in training; the index's own for None.
        where: conditions on the index's fields, all of which must hold; see `Index.search`.
        engine: "exact", or what `elva index export` made: `faiss-ivf`, `faiss-hnsw`, `milvus:URI`.
        base: of LlamaIndex's `BaseRetriever`: `callback_manager`, `verbose`.

    Raises:
        UserError: in one line: no index there, another model, a query that cannot be answered.

    Example::

        retriever = ElvaRetriever("pictures.index", k=3)
        retriever.retrieve("a dog on a beach")
        retriever.retrieve(QueryBundle("the same in winter", image_path="beach.jpg"))
    """

    def __init__(
        self,
        index: str | Path | Index,
        model: str | Path | Encoder | None = None,
        *,
        k: int = 10,
        instruction: str | None = None,
        where: Where | None = None,
        engine: str = "exact",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self._asked = Asked(index, model, k=k, where=where, engine=engine)
        self._how: dict[str, Any] = {"k": k, "instruction": instruction, "where": where}

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if query_bundle.custom_embedding_strs is not None:
            raise UserError(
                "llama_index: a query must have no custom_embedding_strs, got "
                f"{len(query_bundle.custom_embedding_strs)}; ask with query_str and image_path"
            )
        hits = self._asked.hits(query_bundle.query_str, query_bundle.image_path, **self._how)
        return [NodeWithScore(node=_node(hit), score=hit.score) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(hit: Hit) -> TextNode:
    parts = {"id_": hit.id, "text": content(hit), "metadata": known(hit)}
    return TextNode(**parts) if hit.image is None else ImageNode(image_path=str(hit.image), **parts)
