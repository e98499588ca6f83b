"""Hugging Face's `datasets`: data directories as streams, for whatever trains on such.

Written against datasets 5.2. Every row comes of a reader of `elva.data`; nothing is converted or
copied first. Pictures are paths until a row is taken: shards, shuffling and resuming decode none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image as Pillow

from elva.data import Item
from elva.data.parts import Candidates, Directory, Part, Parts, Row, open_source
from elva.data.schema import modalities
from elva.errors import DataError, UserError

try:
    from datasets import Features, Image, IterableDataset, List, Value
except ModuleNotFoundError as error:
    raise ImportError(
        f"elva.integrations.datasets needs datasets ({error}); pip install 'elva[datasets]'"
    ) from None


class Picture(Image):
    """A feature of `datasets`: a picture as `elva.data.pictures` shows it, RGB, upright, over
    white. Its own `Image` leaves transparency, which a conversion to RGB would turn black."""

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Pillow.Image:
        """The picture of a path or of bytes; DataError where it cannot be read."""
        if not self.decode or not isinstance(value, Mapping):
            return super().decode_example(value, token_per_repo_id)  # which knows what is refused
        path = value.get("path")
        image = value["bytes"] if value.get("bytes") is not None else Path(path)
        return Item("", None, image, "image", where=path or "a picture").load_image()


def examples(
    source: str | Path,
    *,
    format: str = "mbeir",
    split: str = "train",
    tasks: Sequence[str] | None = None,
    images: str | Path | None = None,
    negatives: int | None = None,
    num_shards: int | None = None,
) -> IterableDataset:
    """A stream of queries with all their answers, in the order in which they are read.

    Columns: `id`, `task` ("t2i"), `instruction`, `text` and `image` of the query, either of which
    may be None; `positives` and `negatives`, lists of `id`, `text`, `image`. Texts are as M-BEIR
    normalises them. An id is M-BEIR's, of a folder the picture's name, else a query's file and row
    and no answer's. Answers outside the pool that is searched (OVEN, InfoSeek) are left out. The
    other candidates of MMEB's test rows are their negatives.

    A stream resumes (`state_dict`) where it was. Behind `shuffle`'s buffer, `datasets` loses the
    rows in it; `shuffle(buffer_size=1)` with small shards draws as well and loses none.

    Args:
        source: a data directory of `elva data`; MMEB's folder or one of its files; a file of NLI;
            a folder of pictures with or without captions.
        format: "mbeir", "mmeb", "mmeb-test", "nli" or "folder".
        split: train, val or test of a data directory; of others only what the stream is called.
        tasks: as `elva.data.load` takes them, of a data directory; all for None.
        images: where MMEB's paths of pictures start, if not beside the tables.
        negatives: so many of each query's own, the first; all for None.
        num_shards: parts that workers and processes share, of a data directory or a folder of
            pictures; one per 1,000 rows for None. Other formats have one a file.

    Raises:
        UserError: an argument, in one line.
        DataError: a row or picture that is not as its format has it, when it is reached.

    Example::

        stream = examples("data/emoji", tasks=["t2i"]).shuffle(seed=0, buffer_size=1000)
        loader = DataLoader(stream, batch_size=None, num_workers=4)
    """
    if negatives is not None and negatives < 0:
        raise UserError(f"datasets: negatives must be at least 0, got {negatives}; None for all")
    opened = open_source(source, format, split, tasks, images)
    item = {"id": Value("string"), "text": Value("string"), "image": Picture()}
    named = {name: Value("string") for name in ("id", "task", "instruction", "text")}
    columns = {**named, "image": Picture(), "positives": List(item), "negatives": List(item)}
    return _stream(opened, partial(_whole, negatives), columns, split, num_shards)


def pairs(
    source: str | Path,
    *,
    format: str = "mbeir",
    split: str = "train",
    tasks: Sequence[str] | None = None,
    images: str | Path | None = None,
    negatives: int = 0,
    instructions: bool = False,
    num_shards: int | None = None,
) -> IterableDataset:
    """A stream of columns `anchor`, `positive`, `negative_1` to `negative_n`, in the order and of
    the kinds that sentence-transformers' trainer and losses take: a text, a picture, or a dict of
    `image` and `text`. All rows are of one kind, that of the first.

    Args:
        source, format, split, tasks, images, num_shards: as `examples` takes them.
        negatives: n; each query must have as many.
        instructions: begin an anchor's words with its instruction, as M-BEIR joins them; a picture
            becomes one with words.

    A query's positive is the first of its right answers, so that no other is a negative of the
    batch; one without a right answer in the pool is left out.

    Raises:
        UserError: an argument, or rows of several kinds, in one line.
        DataError: a query with too few negatives; further as `examples`.

    Example::

        stream = pairs("data/emoji", tasks=["t2i"])
        SentenceTransformerTrainer(model, args, stream, loss=loss).train()  # args.max_steps
    """
    if negatives < 0:
        raise UserError(f"datasets: negatives must be at least 0, got {negatives}; pass 0 or more")
    opened = open_source(source, format, split, tasks, images)
    task, told = opened.task(), instructions
    asked, shown = modalities(task)
    asked = "image,text" if told and asked == "image" else asked
    names = ("positive", *(f"negative_{i}" for i in range(1, negatives + 1)))
    columns = {"anchor": _feature(asked), **{name: _feature(shown) for name in names}}
    return _stream(opened, partial(_pair, task, names, told), columns, split, num_shards)


def candidates(
    source: str | Path,
    task: str,
    *,
    split: str = "train",
    num_shards: int | None = None,
) -> IterableDataset:
    """A stream of the pool that a task's queries are asked of: `id`, `text`, `image`, `modality`.

    Args:
        source: a data directory of `elva data`.
        task: a task (`t2i`) or a single set (`mscoco_task0`).
        split: train, val or test; a training pool holds no held-out row.
        num_shards: one per 1,000 rows for None.

    Raises:
        UserError, DataError: as `examples`.

    Example::

        for row in candidates("data/emoji", "t2i", split="test").decode(False):
            print(row["id"], row["image"]["path"])
    """
    opened = Candidates(Directory(Path(source).absolute(), split, (task,)))
    columns = {name: Value("string") for name in ("id", "text", "modality")}
    return _stream(opened, _candidate, {**columns, "image": Picture()}, split, num_shards)


# -- rows as columns -------------------------------------------------------------------------------


def _whole(negatives: int | None, row: Row) -> dict[str, Any]:
    query = row.query
    return {
        **_item(query), "task": query.task, "instruction": query.instruction,
        "positives": [*map(_item, row.positives)],
        "negatives": [*map(_item, row.negatives[:negatives])],
    }  # fmt: skip


def _pair(task: str, names: Sequence[str], told: bool, row: Row) -> dict[str, Any] | None:
    query, wanted = row.query, len(names) - 1
    if query.task != task:
        raise UserError(
            f"datasets: pairs must be of one task, got {task} and {query.task} ({query.where}); "
            "take one of them, or examples"
        )
    if not row.positives:
        return None
    if len(row.negatives) < wanted:
        raise DataError(
            f"{query.where}: must have {wanted} negatives, has {len(row.negatives)}; elva mine "
            "finds some, or ask for fewer"
        )
    text = (query.prompted if told else query.text) or None
    answers = (row.positives[0], *row.negatives[:wanted])
    return {
        "anchor": _value(text, query),
        **{name: _value(one.text, one) for name, one in zip(names, answers, strict=True)},
    }


def _candidate(item: Item) -> dict[str, Any]:
    return {**_item(item), "modality": item.modality}


def _item(item: Item) -> dict[str, Any]:
    return {"id": item.id or None, "text": item.text, "image": _image(item)}


def _image(item: Item) -> str | bytes | None:
    """What a `Picture` is made of."""
    image = item.image
    return str(image.absolute()) if isinstance(image, Path) else image  # type: ignore[return-value]


def _feature(modality: str) -> Any:
    """The type of a column of items of a modality."""
    kinds = {"text": Value("string"), "image": Picture()}
    return kinds.get(modality) or {name: kinds[name] for name in ("image", "text")}


def _value(text: str | None, item: Item) -> Any:
    """An item as that column holds it."""
    image = _image(item)
    if image is None:
        return text
    return image if text is None else {"image": image, "text": text}


# -- the stream ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Generator:
    """What `datasets` calls with the shards of a worker."""

    source: Parts
    columns: Callable[[Any], dict[str, Any] | None]

    def __call__(self, shards: Sequence[Part]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            yield from filter(None, map(self.columns, self.source.rows(shard)))


def _stream(
    source: Parts,
    columns: Callable[[Any], dict[str, Any] | None],
    features: Mapping[str, Any],
    split: str,
    num_shards: int | None,
) -> IterableDataset:
    shards = [*source.parts(num_shards)]
    return IterableDataset.from_generator(
        _Generator(source, columns), Features(features), {"shards": shards}, split=split
    )
