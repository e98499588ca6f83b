"""Milvus over an index: a file by milvus-lite (`items.db`), or a cluster (`http://host:19530`)."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from elva.errors import IndexFault, UserError
from elva.index import exact
from elva.index.exact import Found
from elva.index.index import Index
from elva.index.where import Where
from elva.model.identity import Identity

PREFIX = "elva_"
BATCH_ROWS = 1000
MAX_ANSWERS = 16_384
"""Milvus's own limit."""

OVERFETCH = 4


def export(index: Index, uri: str) -> str:
    """Put an index's items and metadata into a collection, in the place of the one there."""
    with _client(uri) as client:
        types = _types()
        schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("row", types.INT64, is_primary=True)
        schema.add_field("vector", types.FLOAT_VECTOR, dim=index.dim)
        kinds = client.prepare_index_params()
        lite = not uri.startswith(("http://", "https://"))
        kinds.add_index("vector", index_type="FLAT" if lite else "HNSW", metric_type="COSINE",
                        params={} if lite else {"M": 32, "efConstruction": 200})  # fmt: skip
        collection = _collection(index)
        for old in _collections(client):
            client.drop_collection(old)
        client.create_collection(collection, schema=schema, index_params=kinds)
        rows = index.alive.nonzero()[0]
        for start in range(0, len(rows), BATCH_ROWS):
            some = rows[start : start + BATCH_ROWS]
            vectors = index.embeddings(some).tolist()
            known = index.table.take(some).to_pylist()
            client.insert(
                collection,
                [
                    {"row": int(row), "vector": vector,
                     **{k: v for k, v in fields.items() if v is not None}}
                    for row, vector, fields in zip(some, vectors, known, strict=True)
                ],
            )  # fmt: skip
        client.flush(collection)
    return uri


class MilvusEngine:
    """Search of an index by Milvus; scores come from the index's own rows.

    Raises:
        IndexFault: nothing exported there, or an older index.
    """

    def __init__(self, index: Index, uri: str) -> None:
        self.index, self.uri = index, uri
        with _client(uri) as client:
            again = f"run elva index export {index.directory} --to milvus:{uri}"
            there = _collections(client)
        if not there:
            raise IndexFault(f"{uri}: must be exported first, got no collection; {again}")
        if _collection(index) not in there:
            raise IndexFault(f"{uri}: must be of the index as it is, got another; {again}")

    def search(
        self, query: Tensor, k: int, *, model: Identity | None = None, where: Where | None = None
    ) -> Found:
        """As `Index.search`; a query with fewer than k answers is padded with row -1 and -inf."""
        query, k = self.index.check_query(query, k, model)
        allowed = self.index.allowed(where)
        live = len(self.index.alive) if allowed is None else int(allowed.sum())
        k = min(k, live)
        if not k or not len(query):
            return exact.merge([], len(query), k)
        depth = min(live, max(OVERFETCH * k, k + 16), MAX_ANSWERS)
        chosen = _expression(self.index.conditions(where))
        with _client(self.uri) as client:
            client.load_collection(_collection(self.index))
            answers = client.search(
                _collection(self.index), query.tolist(), limit=depth, filter=chosen,
                search_params={"metric_type": "COSINE"}, output_fields=["row"],
            )  # fmt: skip
        candidates = []
        for hits in answers:
            rows = [int(hit["row"]) for hit in hits]
            fine = [row for row in rows if allowed is None or allowed[row]]
            candidates.append(torch.tensor(fine, dtype=torch.int64))
        stack = exact.Stack([s.embeddings for s in self.index.segments])
        return exact.rescored(query, stack, candidates, k)


def _collection(index: Index) -> str:
    """Named after what must match: the index's generation and model."""
    made = f"{index.directory.name} {index.model.revision} {index.model.preprocessing}"
    digest = hashlib.sha256(made.encode()).hexdigest()[:16]
    return f"{PREFIX}{index.manifest.generation}_{digest}"


def _collections(client: Any) -> list[str]:
    return [name for name in client.list_collections() if name.startswith(PREFIX)]


def _expression(conditions: Where) -> str:
    """Milvus's filter of conditions that the index has checked."""
    parts = []
    for name, comparison, value in conditions:
        said = "==" if comparison == "=" else comparison
        values = list(value) if comparison == "in" else value
        parts.append(f"{name} {said} {json.dumps(values, ensure_ascii=False)}")
    return " and ".join(parts)


def _types() -> Any:
    from pymilvus import DataType

    return DataType


@contextmanager
def _client(uri: str) -> Iterator[Any]:
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ImportError:
        raise UserError(
            "search: engine milvus must have pymilvus, got none; pip install 'elva[milvus]'"
        ) from None
    try:
        client = MilvusClient(uri)
    except (MilvusException, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{uri}: must be a Milvus file or server; {reason}") from None
    try:
        yield client
    except MilvusException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{uri}: Milvus must answer; {reason}") from None
    finally:
        client.close()
