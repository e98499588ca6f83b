"""A collection and the model that searches it: an index, or the test pictures of a run, which are
indexed on first use and kept beside its model."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from elva.data import Pool, load
from elva.data.instructions import first_instructions
from elva.errors import IndexFault
from elva.index import Index
from elva.model.encoder import unfamiliar
from elva.progress import SILENT, Reporter
from elva.report import pictures
from elva.run import Run
from elva.search import Searcher

ROOM = "index"
"""A run's own index, beside the model that made it."""


@dataclass(frozen=True)
class Collection:
    """An index and the model that searches it."""

    searcher: Searcher
    index: Index


def open_collection(
    target: Run | Index,
    *,
    stage: str | None = None,
    model: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> Collection:
    """An index with its model, or a run's model with the index of its test pictures.

    Args:
        stage: of a run, the stage or control whose model answers; the last trained for None.
        model: of an index, where its model lies now; where it lay for None.

    Raises:
        UserError: no such stage, or an index that does not say what made it.
    """
    if isinstance(target, Run):
        found = _of_run(target, stage, reporter)
    else:
        found = Collection(Searcher.of(target, model, stage=stage), target)
    if line := unfamiliar(found.searcher.encoder, _datasets(found.index)):
        reporter.say(line)
    return found


def data_of(run: Run) -> Path:
    """The data whose test pictures a run is searched by: its last stage's."""
    return run.source(list(run.recipe.stages.values())[-1].data)


def _of_run(run: Run, stage: str | None, reporter: Reporter) -> Collection:
    """The run's model and the index of its test pictures, made again where it does not fit."""
    name = run.answering(stage)
    root = data_of(run)
    pool = load(root, split="test", tasks=["t2i"]).pool("t2i")
    searcher = Searcher(run.directory, stage=name)
    directory = run.stage(name) / ROOM
    key = _key(pool)
    try:
        index = Index(directory)
        if index.about.get("key") == key and index.model.matches(searcher.encoder.identity):
            return Collection(searcher, index)
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
    return Collection(searcher, index)


def _key(pool: Pool) -> str:
    """A hash of the pool's items."""
    rows = [str(pool.root), pool.ids, pool.table["image"].to_pylist()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _datasets(index: Index) -> list[int]:
    """The numbers of the datasets whose items are here; -1 for items of no dataset."""
    before = pc.split_pattern(index.table["id"], ":", max_splits=1)
    names = pc.unique(pc.list_element(before, 0)).to_pylist()
    return [int(name) if name.isascii() and name.isdigit() else -1 for name in names]
