"""`elva search`: the items of an index that a text, a picture or both ask for.

What is asked is an index (`elva index build`), or a run, whose test pictures are indexed on first
use and kept beside its model.
"""

import re
from pathlib import Path

from elva.collection import open_collection
from elva.data import Item
from elva.errors import UserError
from elva.index import Index
from elva.index.engines import open_engine
from elva.index.where import Where
from elva.progress import SILENT, Reporter
from elva.report import pictures
from elva.run import Run
from elva.search import Hit, check_query


def search(
    target: Run | Index,
    query: str = "",
    *,
    k: int = 10,
    stage: str | None = None,
    image: Path | None = None,
    where: Where | None = None,
    instruction: str | None = None,
    model: str | Path | None = None,
    engine: str = "exact",
    reporter: Reporter = SILENT,
) -> list[Hit]:
    """Search an index, or the test pictures of a run; see `Searcher.search`.

    Args:
        stage: of a run, the stage or control whose model answers; the last trained for None.
        model: of an index, where its model lies now; where it lay for None.
        engine: `exact`, or what `elva index export` made: `faiss-ivf`, `faiss-hnsw`, `milvus:URI`.

    Raises:
        UserError: an argument that cannot be answered, in one line.
    """
    check_query(query, k, image)
    collection = open_collection(target, stage=stage, model=model, reporter=reporter)
    return collection.searcher.search(
        collection.index, query, image=image, k=k, where=where, instruction=instruction,
        engine=open_engine(collection.index, engine),
    )  # fmt: skip


def condition(text: str) -> tuple[str, str, str]:
    """(field, comparison, value) of `field>=value`; UserError for anything else."""
    match = re.fullmatch(r"\s*([^\s=!<>]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text, re.DOTALL)
    if match is None:
        raise UserError(
            f"search: --where must read FIELD=VALUE (or != < <= > >=), got {text!r}; "
            "e.g. --where modality=image"
        )
    return match[1], match[2], match[3]


def write_sheet(hits: list[Hit], path: Path, query: str) -> None:
    """Write a contact sheet: each picture with its rank and score over it and its name under it;
    items without a picture are left out."""
    tiles = [
        (
            pictures.small(Item(hit.id, None, hit.image, "image")),
            f"{hit.rank}   {hit.score:.3f}",
            hit.title(hits),
        )
        for hit in [h for h in hits if h.image is not None][: pictures.SHEET_TILES]
    ]
    asked = " ".join(query.split()) or "a picture"
    pictures.sheet(path, asked, tiles, pictures.attribution(hit.id for hit in hits))
