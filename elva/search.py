"""`elva search`: the pictures of the corpus that a text, a picture or both ask for.

A query is embedded exactly as a test query is: same instruction, same greedy summary, same [RET].
The pool's embeddings are computed once for each model and kept beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import elva_kernels
from elva import checkpoint, pictures
from elva.data import DataError, Item, Pool, Query, load
from elva.data.mbeir import read_instructions
from elva.data.schema import normalise
from elva.errors import UserError
from elva.evaluate import source
from elva.files import write_text
from elva.model import Retriever
from elva.progress import Reporter
from elva.rollout import encode
from elva.run import Run

TASKS = {"text": "t2i", "image": "i2i", "image,text": "it2i"}
"""What is in a query -> the task that it then is."""

MAX_CHARACTERS = 2000
"""Ours: longer than any query of M-BEIR, short enough for one row of the model."""

ROOM, HEADER, EMBEDDINGS = "pool", "pool.json", "embeddings.safetensors"


@dataclass(frozen=True)
class Hit:
    """One picture that was found."""

    rank: int  # from 1
    id: str
    name: str  # what the data calls it, else its id
    score: float  # cosine similarity to the query
    summary: str  # what the model wrote about the picture
    image: Path

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "image": str(self.image)}


def search(
    run: Run,
    query: str = "",
    *,
    k: int = 10,
    stage: str | None = None,
    image: Path | None = None,
    reporter: Reporter | None = None,
) -> list[Hit]:
    """The k best pictures of the whole test pool, best first; a tie goes to the earlier row.

    Args:
        query: what the picture should show; may be empty where there is an image.
        k: how many; all of them where the pool is smaller.
        stage: the stage or control whose model answers; the last trained stage for None.
        image: a picture to start from.

    Raises:
        UserError: an argument that cannot be answered, in one line.
    """
    _check(query, k, image)
    name = _stage(run, stage)
    settings = list(run.recipe.stages.values())[-1]
    root = source(settings.data, run)
    pool = load(root, split="test", tasks=["t2i"]).pool("t2i")
    asked = _query(root, pool, query, image)
    retriever = Retriever.load(run.model(name))
    embeddings, notes = _embedded(run, name, retriever, pool, root, reporter)
    limit = settings.max_completion_length
    vector = encode(retriever, [asked], max_completion_length=limit).embeddings
    scores = elva_kernels.ranking_reward(vector, embeddings[:1], embeddings[None, 1:]).scores[0]
    order = scores.sort(descending=True, stable=True).indices[:k].tolist()
    hits = []
    for rank, row in enumerate(order, start=1):
        item = pool[row]
        assert isinstance(item.image, Path)  # a pool of pictures from files
        called = notes["names"][row] or item.id
        hits.append(
            Hit(rank, item.id, called, scores[row].item(), notes["summaries"][row], item.image)
        )
    return hits


def write_sheet(hits: list[Hit], path: Path, query: str) -> None:
    """Write a contact sheet: each picture with its rank and score over it and its name under it."""
    tiles = [
        (
            pictures.small(Item(hit.id, None, hit.image, "image")),
            f"{hit.rank}   {hit.score:.3f}",
            hit.name,
        )
        for hit in hits[: pictures.SHEET_TILES]
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


def _stage(run: Run, stage: str | None) -> str:
    if stage is not None:
        if stage in (*run.recipe.stages, *run.recipe.controls) and run.is_trained(stage):
            return stage
        raise UserError(
            f"search: stage must be trained, got {stage!r}; "
            f"trained in {run.directory}: {', '.join(run.trained) or 'none'}"
        )
    for name in reversed(list(run.recipe.stages)):
        if run.is_trained(name):
            return name
    raise UserError(
        f"search: run must hold a trained stage, got none in {run.directory}; "
        "finish it with elva train --resume"
    )


def _query(root: Path, pool: Pool, words: str, image: Path | None) -> Query:
    """The query as the data's own reader would have made it."""
    text = normalise(words) or None
    modality = ",".join(m for m, there in (("image", image), ("text", text)) if there is not None)
    file = root / "instructions" / "query_instructions.tsv"
    dataset = int(pool.ids[0].partition(":")[0])
    prompts = read_instructions(file).get((dataset, modality, "image"))
    if prompts is None:
        raise UserError(
            f"search: {modality.replace(',', ' and ')} to image must have an instruction, got "
            f"none in {file}; add one, or ask by text alone"
        )
    return Query(
        "search", text, image, modality, instruction=prompts[0], task=TASKS[modality],
        positives=(), raw_text=words, where="search",
    )  # fmt: skip


# -- the pool --------------------------------------------------------------------------------------


def _embedded(
    run: Run, name: str, retriever: Retriever, pool: Pool, root: Path, reporter: Reporter | None
) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings [P, D], names and summaries of the pool; from `stage-*/pool` where they fit."""
    room = run.stage(name) / ROOM
    key = _key(run, name, pool)
    if checkpoint.is_whole(room):
        notes: dict[str, Any] = json.loads((room / HEADER).read_text(encoding="utf-8"))
        if notes["key"] == key:
            return load_file(room / EMBEDDINGS)["embeddings"], notes
    if reporter is not None:
        reporter.start(f"{run.title(name)}: embed {len(pool):,} pictures", len(pool), "pictures")
    out = encode(
        retriever,
        [pool[row] for row in range(len(pool))],
        max_completion_length=list(run.recipe.stages.values())[-1].max_completion_length,
        batch_size=run.recipe.evaluate_batch_size,
        progress=None if reporter is None else reporter.advance,
    )
    if reporter is not None:
        reporter.finish("")
    known = pictures.names(root)
    notes = {"key": key, "names": [known.get(id) for id in pool.ids], "summaries": out.summaries}

    def fill(partial: Path) -> None:
        save_file({"embeddings": out.embeddings}, partial / EMBEDDINGS)
        write_text(partial / HEADER, json.dumps(notes))

    shutil.rmtree(room, ignore_errors=True)  # damaged, or of another model or pool
    checkpoint.write_directory(room, fill)
    return out.embeddings, notes


def _key(run: Run, name: str, pool: Pool) -> str:
    """A hash of what the embeddings depend on: the model's files, the pool, the length limit."""
    manifest = (run.model(name) / checkpoint.MANIFEST).read_bytes()
    limit = list(run.recipe.stages.values())[-1].max_completion_length
    rows = [str(pool.root), pool.ids, pool.table["image"].to_pylist(), limit]
    return hashlib.sha256(manifest + json.dumps(rows).encode()).hexdigest()
