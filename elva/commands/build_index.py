"""`elva index build` and `add`: from files of embeddings to an index."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elva.data.strict import lines
from elva.errors import NPY_FAULTS, UserError
from elva.index import Index
from elva.index.embeddings import Embeddings
from elva.model.identity import Identity
from elva.progress import SILENT, Reporter

ROWS_AT_ONCE = 16_384


def build(
    directory: Path,
    embeddings: Sequence[Path],
    *,
    npy: Path | None = None,
    ids: Path | None = None,
    model: str | None = None,
    dtype: str = "float16",
    overwrite: bool = False,
    codes: bool = True,
    reporter: Reporter = SILENT,
) -> Index:
    """Make an index of what `elva embed` wrote, or of a .npy file and its ids.

    Raises:
        UserError: neither or both, unfinished or foreign embeddings, a file that is no matrix.
    """
    if (npy is None) == (not embeddings):
        raise UserError(
            "index: must be given embeddings, --folder with --model, or --npy with --ids and "
            "--model; pass one of them"
        )
    if npy is None:
        if ids is not None or model is not None:
            raise UserError(
                "index: --model is for --folder and --npy, --ids for --npy, got embeddings, which "
                "know theirs; leave it out"
            )
        opened = [Embeddings.open(path) for path in embeddings]
        about = dict(opened[0].about)
        asked = [one.about.get("instructions", {}) for one in reversed(opened)]
        about["instructions"] = {k: v for known in asked for k, v in known.items()}
        shards = [path for one in opened for path in one.segments()]
        return Index.assemble(
            directory, shards, about=about, overwrite=overwrite, codes=codes, reporter=reporter
        )
    if ids is None or model is None:
        raise UserError("index: --npy must come with --ids and --model, got less; name them")
    rows = _matrix(npy)
    names = [_id(where, line) for where, line in lines(ids)]
    reporter.start(f"{directory}: write rows", len(rows), "rows")
    return Index.build(
        directory,
        names,
        _chunks(rows, reporter),
        model=Identity(model, model, "unknown"),
        dtype=dtype,
        overwrite=overwrite,
        codes=codes,
        reporter=reporter,
    )


def add(
    directory: Path,
    embeddings: Sequence[Path],
    *,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> Index:
    """Add what `elva embed` wrote to an index of the same model."""
    index = Index(directory, verify=False)
    shards = [path for one in embeddings for path in Embeddings.open(one).segments()]
    return index.add_segments(shards, overwrite=overwrite, reporter=reporter)


def _id(where: str, line: str) -> str:
    if not line:
        raise UserError(f"{where}: must hold an id, is an empty line; take it out")
    return line


def _matrix(path: Path) -> np.ndarray:
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_FAULTS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: must be a .npy file of numbers; {reason}") from None
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise UserError(f"{path}: must be [n, D] of floats, got {rows.shape} of {rows.dtype}")
    return rows


def _chunks(rows: np.ndarray, reporter: Reporter) -> Iterator[Tensor]:
    for start in range(0, max(1, len(rows)), ROWS_AT_ONCE):
        yield torch.from_numpy(np.array(rows[start : start + ROWS_AT_ONCE]))
        reporter.advance(min(start + ROWS_AT_ONCE, len(rows)))
