"""The internal schema: what every reader produces and everything else consumes.

A `Query` names its positives and negatives by id; the `Pool` of its task turns ids into
`Item`s. Pools are Arrow tables, because a dict of dicts does not hold M-BEIR's 5.6 M
candidates; a saved pool is memory-mapped.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

# Ours: 64 Mpx holds every M-BEIR picture and stays under Pillow's own warning (89 Mpx).
MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")

# M-BEIR's task numbers; 5 is not used there.
TASKS = {
    "t2i": 0,
    "t2t": 1,
    "t2it": 2,
    "i2t": 3,
    "i2i": 4,
    "it2t": 6,
    "it2i": 7,
    "it2it": 8,
}

_DOCUMENTS_PER_DATASET = 10_000_000


class DataError(ValueError):
    """Bad input, in one line: `file:line: rule`."""


@dataclass(frozen=True)
class Grain:
    """The smallest semantic unit of a text (paper, sec. 3.2).

    Args:
        text: The words themselves.
        type: entity, gender, tone, hair, object, colour, flag, ...
        span: Character offsets [start, end) in the text it belongs to.
    """

    text: str
    type: str
    span: tuple[int, int]


@dataclass(frozen=True)
class Item:
    """Something to embed: a text, a picture, or both.

    Args:
        id: M-BEIR's `<dataset>:<n>`.
        text: Normalised text, or None.
        image: A path, encoded bytes, a picture, or None.
        modality: `text`, `image` or `image,text`.
        where: `file:line` it was read from, for error messages.
    """

    id: str
    text: str | None
    image: Path | bytes | Image.Image | None
    modality: str
    where: str = field(default="", compare=False, kw_only=True)

    def load_image(self) -> Image.Image:
        """The picture as RGB, transparency over white.

        Raises:
            DataError: no picture, not JPEG/PNG/WebP, too large, or damaged. Size is judged
                from the header, before anything is decoded.
        """
        where = self.where or self.id
        if self.image is None:
            raise DataError(f"{where}: has no picture")
        if isinstance(self.image, Image.Image):
            return _flatten(self.image)
        shown = self.image if isinstance(self.image, Path) else "picture"
        try:
            return _decode(self.image)
        except FileNotFoundError as error:
            raise DataError(f"{where}: no such picture: {shown}") from error
        except (
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
            EOFError,
            OSError,
            SyntaxError,
            ValueError,
            struct.error,
        ) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{where}: unreadable picture: {shown}: {reason}") from error


@dataclass(frozen=True)
class Query(Item):
    """An item that asks for others.

    Args:
        instruction: The task in words; see `prompted`.
        task: A key of `TASKS`.
        positives: Ids in the task's pool.
        negatives: Ids of hard negatives, possibly none.
        grains: Grains of `text`, or None where nobody parsed them.
        raw_text: The text before normalisation.
    """

    instruction: str
    task: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    grains: tuple[Grain, ...] | None = None
    raw_text: str | None = None

    @property
    def prompted(self) -> str:
        """Instruction and text as M-BEIR joins them: the raw text, normalised after joining."""
        raw = self.raw_text or ""
        # A query made from another by replacing its text alone speaks by that text.
        text = raw if normalise(raw) == (self.text or "") else self.text
        return normalise(f"{self.instruction} {text}")


class Pool:
    """The candidates of a task: row -> `Item`, id -> row.

    Args:
        table: Columns id, text, image (relative to `root`), modality, source, line.
        root: Where the pictures' paths start.
    """

    SCHEMA = pa.schema(
        [
            ("id", pa.string()),
            ("text", pa.string()),
            ("image", pa.string()),
            ("modality", pa.string()),
            ("source", pa.dictionary(pa.int32(), pa.string())),
            ("line", pa.int32()),
        ]
    )

    def __init__(self, table: pa.Table, root: Path) -> None:
        self.table = table.cast(self.SCHEMA).combine_chunks()
        self.root = root

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Item:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        id, text, image, modality, source, line = (
            column[row].as_py() for column in self.table.columns
        )
        path = None if image is None else self.root / image
        return Item(id, text, path, modality, where=f"{source}:{line}")

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self._find(id) is not None

    @cached_property
    def ids(self) -> list[str]:
        """All ids, in row order."""
        ids: list[str] = self.table["id"].to_pylist()
        return ids

    def row(self, id: str) -> int:
        """The row of an id; KeyError if it is not in the pool."""
        row = self._find(id)
        if row is None:
            raise KeyError(id)
        return row

    def texts(self) -> Iterator[str]:
        """The texts of the candidates that have one."""
        return (text for text in self.table["text"].to_pylist() if text is not None)

    def save(self, path: Path) -> None:
        """Write the table as an Arrow file, which `open` maps instead of reading."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, self.SCHEMA) as writer:
            writer.write_table(self.table)

    @classmethod
    def open(cls, path: Path, root: Path) -> Pool:
        """A saved pool, memory-mapped."""
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), root)

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        # Two sorted int64 arrays instead of a dict: 16 bytes a candidate.
        keys = np.fromiter((hashed_id(id) for id in self.ids), np.int64, len(self))
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def _find(self, id: str) -> int | None:
        keys, order = self._order
        try:
            key = hashed_id(id)
        except ValueError:
            return None
        at = int(np.searchsorted(keys, key))
        return int(order[at]) if at < len(keys) and keys[at] == key else None


@dataclass(frozen=True)
class Dataset:
    """Queries of one split with the pools of their tasks.

    Args:
        root: Folder it was read from.
        split: train, val or test.
        queries: In file order.
        pools: Task -> pool.
        grains: Candidate id -> grains of its text, where the corpus has them.
        minimal_pairs: Query id -> ids of all candidates of the same entity.
    """

    root: Path
    split: str
    queries: list[Query]
    pools: Mapping[str, Pool]
    grains: Mapping[str, tuple[Grain, ...]] = field(default_factory=dict)
    minimal_pairs: Mapping[str, list[str]] = field(default_factory=dict)

    def pool(self, task: str) -> Pool:
        """The task's candidates. In the train split it holds no held-out row."""
        return self.pools[task]

    def texts(self) -> Iterator[str]:
        """Every text of the split, queries with their instruction; what a tokenizer learns."""
        for query in self.queries:
            yield query.prompted
        for pool in self.pools.values():
            yield from pool.texts()


@lru_cache(maxsize=2**16)
def hashed_id(id: str) -> int:
    """M-BEIR's hashed_did of `<dataset>:<n>`; ValueError where the id is not of that form."""
    dataset, separator, number = id.partition(":")
    if not (separator and dataset.isascii() and dataset.isdigit() and len(dataset) < 9):
        raise ValueError(f"id {id!r} is not <dataset>:<number>")
    if not (number.isascii() and number.isdigit() and len(number) < 8):
        raise ValueError(f"id {id!r} is not <dataset>:<number>")
    return int(dataset) * _DOCUMENTS_PER_DATASET + int(number)


def normalise(text: str) -> str:
    r"""M-BEIR's text rule: strip, drop \r and outer quotes, capitalise, end in punctuation."""
    text = text.replace("\r", "").strip().strip('"')
    if text:
        text = text[0].upper() + text[1:]
        if text[-1] not in ".?!":
            text += "."
    return text


def concatenate(pools: Sequence[Pool]) -> Pool:
    """One pool out of several that share a root."""
    if len(pools) == 1:
        return pools[0]
    table = pa.concat_tables([pool.table for pool in pools]).unify_dictionaries()
    return Pool(table, pools[0].root)


def distinct(pool: Pool) -> Pool:
    """The pool with the first row of each id."""
    keys = np.fromiter((hashed_id(id) for id in pool.ids), np.int64, len(pool))
    first = np.sort(np.unique(keys, return_index=True)[1])
    return pool if len(first) == len(pool) else Pool(pool.table.take(first), pool.root)


def _decode(source: Path | bytes) -> Image.Image:
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    # Whatever Pillow would warn of as a decompression bomb is refused here, still undecoded.
    with Image.open(opened, formats=IMAGE_FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS} pixels")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ValueError(f"{width} x {height} is longer than {MAX_ASPECT_RATIO}:1")
        return _flatten(image)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits a pixel; Pillow would clip them to 8 instead of scaling.
        image = image.point(lambda value: value * (1 / 256))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
