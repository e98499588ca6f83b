"""FAISS (Douze et al., arXiv:2401.08281) over an index: IVF and HNSW, beside its segments.

derived/ivf.faiss, derived/hnsw.faiss     FAISS's own files, over unit rows in fp32
derived/ivf.json                          of which index, and the file's SHA-256
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elva.errors import IndexFault, UserError
from elva.files import read_bounded, replacing, sha256, write_text
from elva.index import exact
from elva.index.exact import Found
from elva.index.index import Index
from elva.index.where import Where
from elva.model.identity import Identity
from elva.settings import JSON_BYTES, Places, Sha256, build, read_json

KINDS = ("ivf", "hnsw")
_DERIVED = "derived"

NEIGHBOURS, _BUILD_DEPTH = 32, 200
"""HNSW's M and efConstruction: FAISS's own advice for high recall."""

_TRAINING_ROWS_A_LIST = 64
"""Of IVF: rows a cluster that k-means looks at; FAISS warns below 39."""

EXACT_BELOW = 16_384
"""Ours: where a filter leaves so few rows, exact search among them is as fast and misses none."""

OVERFETCH = 4
"""Ours: candidates asked for, times k, that rescoring may choose among."""


@dataclass(frozen=True)
class _About:
    """What lies beside FAISS's file: its SHA-256, and of which index it is by its fingerprint."""

    index: Sha256
    sha256: Sha256


def export(index: Index, kind: str) -> Path:
    """Build FAISS's file from an index's rows, block by block."""
    faiss = _faiss(kind)
    rows, dim = len(index.alive), index.dim
    if not rows:
        raise IndexFault(f"index: {index.directory} must hold items to export, got none; add some")
    if kind == "hnsw":
        made = faiss.IndexHNSWFlat(dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = _BUILD_DEPTH
    else:
        lists = max(1, min(int(4 * sqrt(rows)), rows // _TRAINING_ROWS_A_LIST))
        made = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        chosen = np.random.default_rng(0).permutation(rows)[: lists * _TRAINING_ROWS_A_LIST]
        made.train(_unit(index.embeddings(np.sort(chosen))))
    for block in _blocks(index):
        made.add(block)
    place = index.directory / _DERIVED / f"{kind}.faiss"
    with replacing(place) as sink:
        faiss.write_index(made, faiss.PyCallbackIOWriter(sink.write))
    about = _About(index.fingerprint, sha256(place))
    write_text(place.with_suffix(".json"), json.dumps(asdict(about)) + "\n")
    return place


class FaissEngine:
    """Approximate search of an index.

    Args:
        kind: ivf or hnsw, as it was exported.
        effort: IVF's lists looked into (a sixteenth of them and at least 8 for None), HNSW's search
            depth (4 k and at least 64 for None): more finds more and takes longer.

    Raises:
        IndexFault: nothing exported, a damaged file, or one of an older index.
    """

    def __init__(self, index: Index, kind: str, *, effort: int | None = None) -> None:
        self._lib = _faiss(kind)
        self.index, self.kind, self.effort = index, kind, effort
        place = index.directory / _DERIVED / f"{kind}.faiss"
        again = f"run elva index export {index.directory} --to faiss-{kind}"
        try:
            content = read_bounded(place.with_suffix(".json"), JSON_BYTES)
            about = build(_About, read_json(content, Places("")), Places(""))
            whole = sha256(place) == about.sha256
        except (OSError, UserError):
            raise IndexFault(f"{place}: must be exported first, got nothing; {again}") from None
        if not whole:
            raise IndexFault(f"{place}: must have its checksum, got another; {again}")
        if about.index != index.fingerprint:
            raise IndexFault(f"{place}: must be of the index as it is, got an older one; {again}")
        self._found = self._lib.read_index(str(place))

    def search(
        self, query: Tensor, k: int, *, model: Identity | None = None, where: Where | None = None
    ) -> Found:
        """As `Index.search`, but rows may be missed; a query with fewer than k answers is padded
        with row -1 and score -inf."""
        query, k = self.index.check_query(query, k, model)
        allowed = self.index.allowed(where)
        rows = len(self.index.alive)
        live = rows if allowed is None else int(allowed.sum())
        if allowed is not None and live < min(EXACT_BELOW, rows // 2):
            return self.index.search(query, k, where=where)
        k = min(k, live)
        if not k or not len(query):
            return exact.merge([], len(query), k)
        depth = min(rows, max(OVERFETCH * k, k + 16))
        _, found = self._found.search(_unit(query), depth, params=self._params(depth, allowed))
        candidates = [torch.from_numpy(row[row >= 0]) for row in found]
        stack = exact.Stack([s.embeddings for s in self.index.segments])
        return exact.rescored(query, stack, candidates, k)

    def _params(self, depth: int, allowed: np.ndarray | None) -> Any:
        faiss = self._lib
        chosen: dict[str, Any] = {}
        if allowed is not None:
            self._mask = np.packbits(allowed, bitorder="little")  # FAISS reads it where it lies
            chosen["sel"] = faiss.IDSelectorBitmap(self._mask)
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=self.effort or max(64, depth), **chosen)
        probes = self.effort or max(8, self._found.nlist // 16)
        return faiss.SearchParametersIVF(nprobe=probes, **chosen)


def _faiss(kind: str) -> Any:
    if kind not in KINDS:
        raise UserError(f"search: engine must be faiss-ivf or faiss-hnsw, got 'faiss-{kind}'")
    try:
        import faiss
    except ImportError:
        raise UserError(
            f"search: engine faiss-{kind} must have FAISS, got none; pip install 'elva[faiss]'"
        ) from None
    return faiss


def _blocks(index: Index) -> Iterator[np.ndarray]:
    stack = exact.Stack([s.embeddings for s in index.segments])
    for part in stack.parts:
        for block in part.split(stack.rows_a_block):
            yield _unit(block.float())


def _unit(rows: Tensor) -> np.ndarray:
    unit: np.ndarray = torch.nn.functional.normalize(rows, dim=1).contiguous().numpy()
    return unit
