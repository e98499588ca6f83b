"""Milvus over an index: a file by milvus-lite (`items.db`), or a cluster (`http://host:19530`)."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
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

SECONDS = {"search": 60.0, "list_collections": 60.0}
WORK_SECONDS = 1800.0
"""Ours: of a call, and of one that makes, fills or loads a collection; pymilvus would wait for
ever for a server that takes a call and does not answer it."""

LOCAL = ("create_schema", "prepare_index_params", "close")
"""Calls that ask no server."""

EXACT_BELOW = 16_384
"""Ours: where a filter leaves so few rows, exact search among them is as fast and misses none, as a
graph that is searched around the filter does."""

PLAIN = (
    pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string,
    pa.types.is_large_string,
)  # fmt: skip
"""Kinds of fields that Milvus filters by."""


def export(index: Index, uri: str) -> str:
    """Put an index's items and metadata into a collection, in the place of the one there.

    It gets its name once it is whole: an export that is killed leaves what was there.
    """
    final, unfinished = _collection(index), f"unfinished_{_collection(index)}"
    with _client(uri) as client:
        types = _types()
        schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("row", types.INT64, is_primary=True)
        schema.add_field("vector", types.FLOAT_VECTOR, dim=index.dim)
        kinds = client.prepare_index_params()
        flat = _is_file(uri)
        kinds.add_index("vector", index_type="FLAT" if flat else "HNSW", metric_type="COSINE",
                        params={} if flat else {"M": 32, "efConstruction": 200})  # fmt: skip
        if unfinished in client.list_collections():
            client.drop_collection(unfinished)
        client.create_collection(unfinished, schema=schema, index_params=kinds)
        names = _names(index.table.schema)
        fields = index.table.select([*names]).rename_columns([*names.values()])
        rows = index.alive.nonzero()[0]
        for start in range(0, len(rows), BATCH_ROWS):
            some = rows[start : start + BATCH_ROWS]
            vectors = index.embeddings(some).tolist()
            known = fields.take(some).to_pylist()
            client.insert(
                unfinished,
                [
                    {"row": int(row), "vector": vector,
                     **{k: v for k, v in one.items() if v is not None and v == v}}
                    for row, vector, one in zip(some, vectors, known, strict=True)
                ],
            )  # fmt: skip
        client.flush(unfinished)
        old = _collections(client, index)
        if final in old:
            client.drop_collection(final)
        client.rename_collection(unfinished, final)
        for name in old:
            if name != final:
                client.drop_collection(name)
    return _shown(uri)


class MilvusEngine:
    """Search of an index by Milvus; scores come from the index's own rows.

    Raises:
        IndexFault: nothing exported there, or an older index.
    """

    def __init__(self, index: Index, uri: str) -> None:
        self.index, self.uri = index, uri
        with _client(uri) as client:
            again = f"run elva index export {index.directory} --to milvus:{_shown(uri)}"
            there = _collections(client, index)
        if not there:
            raise IndexFault(f"{_shown(uri)}: must be exported first, got no collection; {again}")
        if _collection(index) not in there:
            raise IndexFault(f"{_shown(uri)}: must be of the index as it is, got another; {again}")

    def search(
        self, query: Tensor, k: int, *, model: Identity | None = None, where: Where | None = None
    ) -> Found:
        """As `Index.search`; a query with fewer than k answers is padded with row -1 and -inf."""
        query, k = self.index.check_query(query, k, model)
        allowed = self.index.allowed(where)
        live = len(self.index.alive) if allowed is None else int(allowed.sum())
        if allowed is not None and not _is_file(self.uri) and live < EXACT_BELOW:
            return self.index.search(query, k, where=where)
        k = min(k, live)
        if not k or not len(query):
            return exact.merge([], len(query), k)
        depth = min(live, max(OVERFETCH * k, k + 16), MAX_ANSWERS)
        chosen = _expression(self.index.conditions(where), _names(self.index.table.schema))
        effort = {} if _is_file(self.uri) else {"ef": max(64, depth)}
        with _client(self.uri) as client:
            client.load_collection(_collection(self.index))
            answers = client.search(
                _collection(self.index), query.tolist(), limit=depth, filter=chosen,
                search_params={"metric_type": "COSINE", "params": effort}, output_fields=["row"],
            )  # fmt: skip
        candidates = []
        for hits in answers:
            rows = [int(hit["row"]) for hit in hits]
            self._check_rows(rows, depth)
            fine = [row for row in rows if allowed is None or allowed[row]]
            candidates.append(torch.tensor(fine, dtype=torch.int64))
        stack = exact.Stack([s.embeddings for s in self.index.segments])
        return exact.rescored(query, stack, candidates, k)

    def _check_rows(self, rows: list[int], depth: int) -> None:
        """UserError for what no search of this index finds."""
        there = range(len(self.index.alive))
        if len(set(rows)) > depth or len(set(rows)) < len(rows) or set(rows) - set(there):
            raise UserError(f"{_shown(self.uri)}: Milvus must answer with rows of the index, each "
                            "once, got others; export it again")  # fmt: skip


def _collection(index: Index) -> str:
    """Named after the index, and after what must match: its items."""
    return f"{_prefix(index)}{index.fingerprint[:16]}"


def _prefix(index: Index) -> str:
    made = f"{index.directory.resolve().name} {index.model.revision} {index.model.preprocessing}"
    return f"{PREFIX}{hashlib.sha256(made.encode()).hexdigest()[:16]}_"


def _collections(client: Any, index: Index) -> list[str]:
    """Those of this index, as it is or was; a server may hold others'."""
    return [name for name in client.list_collections() if name.startswith(_prefix(index))]


def _names(schema: pa.Schema) -> dict[str, str]:
    """field -> its name in Milvus, of the fields that it can filter by: none is a word of its
    language or a field of ours there."""
    found = {}
    for number, field in enumerate(schema):
        if any(is_kind(field.type) for is_kind in PLAIN):
            word = re.fullmatch(r"[A-Za-z_]\w*", field.name, re.A)
            found[field.name] = f"m_{field.name if word else number}"
    return found


def _expression(conditions: Where, names: Mapping[str, str]) -> str:
    """Milvus's filter of conditions that the index has checked."""
    parts = []
    for name, comparison, value in conditions:
        if name not in names:
            raise IndexFault(
                f"search: where must name a field of numbers, texts or booleans for milvus, got "
                f"{name}; search by --engine exact"
            )
        said = "==" if comparison == "=" else comparison
        parts.append(f"{names[name]} {said} {json.dumps(value, ensure_ascii=False)}")
    return " and ".join(parts)


def _is_file(uri: str) -> bool:
    """Whether it is milvus-lite's, whose search is exact."""
    return not uri.startswith(("http://", "https://", "tcp://", "unix:"))


def _shown(uri: str) -> str:
    """An address without the name and the password that it may hold."""
    return re.sub(r"//[^/]*@", "//", uri)


class _Bounded:
    """A client of Milvus, of whose calls each has an end."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if name in LOCAL:
            return call
        return partial(call, timeout=SECONDS.get(name, WORK_SECONDS))


def _types() -> Any:
    from pymilvus import DataType

    return DataType


@contextmanager
def _client(uri: str) -> Iterator[Any]:
    try:
        from grpc import RpcError
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ImportError:
        raise UserError(
            "search: engine milvus must have pymilvus, got none; pip install 'elva[milvus]'"
        ) from None
    log = logging.getLogger("pymilvus")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints tracebacks of what is one line below
    try:
        try:
            client = MilvusClient(uri)
        except (MilvusException, RpcError, ValueError, OSError) as error:
            raise UserError(
                f"{_shown(uri)}: must be a Milvus file or server; {_reason(error, uri)}"
            ) from None
        try:
            yield _Bounded(client)
        except (MilvusException, RpcError) as error:
            raise UserError(f"{_shown(uri)}: Milvus must answer; {_reason(error, uri)}") from None
        finally:
            client.close()
    finally:
        log.setLevel(level)


def _reason(error: Exception, uri: str) -> str:
    details = str(error.details() if hasattr(error, "details") else error)
    return " ".join(details.replace(uri, _shown(uri)).split())[:200]
