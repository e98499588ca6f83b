"""`elva search`: the items of an index that a text, a picture or both ask for.

What is asked is an index (`elva index build`), or a run, whose test pictures are indexed on first
use and kept beside its model.
"""

import hashlib
import json
import re
from pathlib import Path

import pyarrow.compute as pc

from elva.data import Item, Pool, load
from elva.data.mbeir import first_instructions
from elva.errors import IndexFault, UserError
from elva.index import Index
from elva.index.engines import open_engine
from elva.index.where import Where
from elva.model.encoder import unfamiliar
from elva.progress import SILENT, Reporter
from elva.report import pictures
from elva.run import Run
from elva.search import Hit, Searcher, check_query

ROOM = "index"
"""A run's own index, beside the model that made it."""


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
    if isinstance(target, Run):
        searcher, index = _of_run(target, stage, reporter)
    else:
        index, searcher = target, Searcher.of(target, model, stage=stage)
    if line := unfamiliar(searcher.encoder, _datasets(index)):
        reporter.say(line)
    return searcher.search(
        index, query, image=image, k=k, where=where, instruction=instruction,
        engine=open_engine(index, engine),
    )  # fmt: skip


def _datasets(index: Index) -> list[int]:
    """The numbers of the datasets whose items are here; -1 for items of no dataset."""
    before = pc.split_pattern(index.table["id"], ":", max_splits=1)
    names = pc.unique(pc.list_element(before, 0)).to_pylist()
    return [int(name) if name.isascii() and name.isdigit() else -1 for name in names]


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


# -- a run's own index -----------------------------------------------------------------------------


def _of_run(run: Run, stage: str | None, reporter: Reporter) -> tuple[Searcher, Index]:
    """The run's model and the index of its test pictures, made again where it does not fit."""
    name = run.answering(stage)
    root = run.source(list(run.recipe.stages.values())[-1].data)
    pool = load(root, split="test", tasks=["t2i"]).pool("t2i")
    searcher = Searcher(run.directory, stage=name)
    directory = run.stage(name) / ROOM
    key = _key(pool)
    try:
        index = Index(directory)
        if index.about.get("key") == key and index.model.matches(searcher.encoder.identity):
            return searcher, index
    except IndexFault:
        pass  # absent or damaged; either way it can be had again from the model
    reporter.start(f"{run.title(name)}: embed {len(pool):,} pictures", len(pool), "pictures")
    dataset = int(pool[0].id.partition(":")[0])
    index = searcher.index(
        directory,
        list(pool),
        dtype="float32",
        names=pictures.names(root),
        about={"key": key, "instructions": first_instructions(root, dataset, "image")},
        overwrite=True,
        reporter=reporter,
    )
    reporter.finish("")
    return searcher, index


def _key(pool: Pool) -> str:
    """A hash of the pool's items."""
    rows = [str(pool.root), pool.ids, pool.table["image"].to_pylist()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
