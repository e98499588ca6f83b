"""Search beyond exact and beyond one machine, behind `Index.search`'s own interface.

An engine finds candidates; their scores are computed from the index's rows, so a row that any
engine finds has the score that exact search gives it, bit for bit. What an engine may do is miss.
"""

from typing import Protocol

from torch import Tensor

from elva.errors import UserError
from elva.index.exact import Found
from elva.index.index import Index
from elva.index.where import Where
from elva.model.identity import Identity

ENGINES = ("exact", "faiss-ivf", "faiss-hnsw", "milvus:URI")


class Engine(Protocol):
    """What answers a search. `Index` itself is one, the exact one."""

    def search(
        self, query: Tensor, k: int, *, model: Identity | None = None, where: Where | None = None
    ) -> Found: ...


def open_engine(index: Index, spec: str) -> Engine:
    """`exact`, or one that `export` made: `faiss-ivf`, `faiss-hnsw`, `milvus:URI`.

    Raises:
        UserError: another word, a missing package, nothing exported, or that of an older index.
    """
    kind, _, rest = spec.partition("-" if spec.startswith("faiss") else ":")
    if spec == "exact":
        return index
    if kind == "faiss" and rest:
        from elva.index.engines.faiss import FaissEngine

        return FaissEngine(index, rest)
    if kind == "milvus" and rest:
        from elva.index.engines.milvus import MilvusEngine

        return MilvusEngine(index, rest)
    raise UserError(f"search: engine must be one of {', '.join(ENGINES)}, got {spec!r}")


def export(index: Index, spec: str) -> str:
    """Make what `open_engine` opens; where it lies.

    Raises:
        UserError: a word that is no engine to export to, or a missing package.
    """
    kind, _, rest = spec.partition("-" if spec.startswith("faiss") else ":")
    if kind == "faiss" and rest:
        from elva.index.engines import faiss

        return str(faiss.export(index, rest))
    if kind == "milvus" and rest:
        from elva.index.engines import milvus

        return milvus.export(index, rest)
    raise UserError(f"index: --to must be one of {', '.join(ENGINES[1:])}, got {spec!r}")
