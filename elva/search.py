"""`elva search`: the items of an index that a text, a picture or both ask for.

A query is embedded exactly as a test query is: same instruction, same greedy summary, same [RET].
What is asked is an index (`elva index build`), or a run, whose test pictures are indexed on first
use and kept beside its model.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elva.commands.embed import columns
from elva.data import DataError, Item, Pool, Query, load
from elva.data.mbeir import first_instructions
from elva.data.schema import normalise
from elva.errors import UserError
from elva.evaluation.trained import source
from elva.index import Index, IndexFault
from elva.index.engines import Engine, open_engine
from elva.index.index import Where
from elva.model.encoder import Encoder
from elva.progress import Reporter
from elva.report import pictures
from elva.run import Run

MAX_CHARACTERS = 2000
"""Ours: longer than any query of M-BEIR, short enough for one row of the model."""

ROOM = "index"
"""A run's own index, beside the model that made it."""


@dataclass(frozen=True)
class Hit:
    """One item that was found."""

    rank: int  # from 1
    id: str
    name: str  # what the data calls it, else its text, its file's name, its id
    score: float  # cosine similarity to the query
    summary: str  # what the model wrote about it
    image: Path | None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "image": None if self.image is None else str(self.image)}


class Searcher:
    """A model with three verbs: embed items, index them, search.

    Args:
        model: a run, a Qwen2-VL checkpoint directory, or a hub name.
        options: `stage`, `max_completion_length`, `read`, `batch_size` of `Encoder.open`.

    Example::

        searcher = Searcher("runs/one")
        index = searcher.index("my.index", [Item("1", None, Path("cat.jpg"), "image")])
        hits = searcher.search(index, "a sleeping cat", instruction="Find the picture.")
    """

    def __init__(self, model: str | Path | Encoder, **options: Any) -> None:
        self.encoder = model if isinstance(model, Encoder) else Encoder.open(model, **options)

    def embed(self, items: Sequence[Item], reporter: Reporter | None = None) -> Tensor:
        """[n, D] fp32 embeddings."""
        return self.encoder(items, None if reporter is None else reporter.advance).embeddings

    def index(
        self,
        directory: str | Path,
        items: Sequence[Item],
        *,
        dtype: str = "float16",
        names: Mapping[str, str] | None = None,
        metadata: Mapping[str, Sequence[Any]] | None = None,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        reporter: Reporter | None = None,
    ) -> Index:
        """Embed items and make an index of them.

        Args:
            names: id -> what to call it.
            metadata: further fields to search by, a value for each item.
            about: noted in the index; `instructions` ({modality of a query: instruction}) are used
                by `search`.
        """
        out = self.encoder(items, None if reporter is None else reporter.advance)
        return Index.build(
            directory,
            [item.id for item in items],
            out.embeddings,
            model=self.encoder.identity,
            dtype=dtype,
            columns={
                **columns(items, names or {}), "summary": out.summaries, **(metadata or {}),
            },
            about={**self.encoder.about, **(about or {})},
            overwrite=overwrite,
        )  # fmt: skip

    def search(
        self,
        index: Index,
        query: str = "",
        *,
        image: Path | None = None,
        k: int = 10,
        where: Where | None = None,
        instruction: str | None = None,
        engine: Engine | None = None,
    ) -> list[Hit]:
        """The k best items, best first; a tie goes to the earlier row.

        Args:
            query: what the item should show or say; may be empty where there is an image.
            image: a picture to start from.
            k: how many; all of them where the index is smaller.
            where: conditions on the index's fields; see `Index.search`.
            instruction: what to look for, as in training; the index's own for None.
            engine: what finds them, of `open_engine`; exact search for None.

        Raises:
            UserError: an argument that cannot be answered, in one line.
        """
        _check(query, k, image)
        index.check_model(self.encoder.identity)
        asked = _query(index, query, image, instruction)
        found = (engine or index).search(self.embed([asked]), k, where=where)
        rows = found.rows[0][found.rows[0] >= 0].numpy()
        table = index.table.take(rows).to_pylist()
        return [
            Hit(
                rank,
                item["id"],
                item.get("name") or item["id"],
                score,
                item.get("summary") or "",
                Path(item["image"]) if item.get("image") else None,
            )
            for rank, (score, item) in enumerate(
                zip(found.scores[0].tolist(), table, strict=False), start=1
            )
        ]


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
    reporter: Reporter | None = None,
) -> list[Hit]:
    """Search an index, or the test pictures of a run; see `Searcher.search`.

    Args:
        stage: of a run, the stage or control whose model answers; the last trained for None.
        model: of an index, where its model lies now; where it lay for None.
        engine: `exact`, or what `elva index export` made: `faiss-ivf`, `faiss-hnsw`, `milvus:URI`.

    Raises:
        UserError: an argument that cannot be answered, in one line.
    """
    _check(query, k, image)
    if isinstance(target, Run):
        searcher, index = _of_run(target, stage, reporter)
    else:
        about = target.about
        lay = model or about.get("model")
        if lay is None:
            raise UserError(
                f"search: {target.directory} does not say which model made it; pass --model"
            )
        index, searcher = target, Searcher(
            lay,
            stage=stage,
            max_completion_length=about.get("max_completion_length"),
            read=about.get("read", "at_ret"),
        )  # fmt: skip
    return searcher.search(
        index, query, image=image, k=k, where=where, instruction=instruction,
        engine=open_engine(index, engine),
    )  # fmt: skip


def condition(text: str) -> tuple[str, str, str]:
    """(field, comparison, value) of `field>=value`; UserError for anything else."""
    match = re.fullmatch(r"\s*([^\s=!<>]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text)
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
            hit.name,
        )
        for hit in [h for h in hits if h.image is not None][: pictures.SHEET_TILES]
    ]
    asked = " ".join(query.split()) or "a picture"
    pictures.sheet(path, asked, tiles, pictures.attribution(hit.id for hit in hits))


# -- the query -------------------------------------------------------------------------------------


def _check(query: str, k: int, image: Path | None) -> None:
    if k < 1:
        raise UserError(f"search: k must be at least 1, got {k}; ask for 10")
    if not normalise(query) and image is None:
        raise UserError(f"search: query must hold words, got {query!r}; pass some, or a picture")
    if len(query) > MAX_CHARACTERS:
        raise UserError(
            f"search: query must have at most {MAX_CHARACTERS} characters, got {len(query)}; "
            "shorten it"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in query):
        raise UserError(f"search: query must be valid text, got {query!r}; pass it as UTF-8")
    if image is None:
        return
    try:
        Item("", None, image, "image", where="search").load_image()
    except DataError as error:
        why = str(error).removeprefix("search: ")
        raise UserError(
            f"search: image must be a readable JPEG, PNG or WebP file, got {why}; pass another"
        ) from None


def _query(index: Index, words: str, image: Path | None, instruction: str | None) -> Query:
    """The query as the data's own reader would have made it."""
    text = normalise(words) or None
    modality = ",".join(m for m, there in (("image", image), ("text", text)) if there is not None)
    known = index.about.get("instructions", {})
    if instruction is None and modality not in known:
        raise UserError(
            f"search: {modality.replace(',', ' and ')} must have an instruction, got none in "
            f"{index.directory}; pass --instruction, or ask by {' or '.join(known) or 'another'}"
        )
    asked = known[modality] if instruction is None else instruction
    return Query(
        "search", text, image, modality, instruction=asked, task="t2i",
        positives=(), raw_text=words, where="search",
    )  # fmt: skip


# -- a run's own index -----------------------------------------------------------------------------


def _of_run(run: Run, stage: str | None, reporter: Reporter | None) -> tuple[Searcher, Index]:
    """The run's model and the index of its test pictures, made again where it does not fit."""
    name = run.answering(stage)
    root = source(list(run.recipe.stages.values())[-1].data, run)
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
    shutil.rmtree(directory, ignore_errors=True)
    if reporter is not None:
        reporter.start(f"{run.title(name)}: embed {len(pool):,} pictures", len(pool), "pictures")
    dataset = int(pool[0].id.partition(":")[0])
    index = searcher.index(
        directory,
        list(pool),
        dtype="float32",
        names=pictures.names(root),
        about={"key": key, "instructions": first_instructions(root, dataset, "image")},
        reporter=reporter,
    )
    if reporter is not None:
        reporter.finish("")
    return searcher, index


def _key(pool: Pool) -> str:
    """A hash of the pool's items."""
    rows = [str(pool.root), pool.ids, pool.table["image"].to_pylist()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
