"""The internal schema: what every reader produces and everything else consumes.

A `Query` names its positives and negatives by id; the `Pool` of its task (`elva.data.pool`)
turns ids into `Item`s.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from elva.data import pictures
from elva.errors import DataError, PictureFault, printable

_T = TypeVar("_T")

# UniIR's task numbers; M-BEIR has no set of task 5.
TASKS = {
    "t2i": 0, "t2t": 1, "t2it": 2, "i2t": 3, "i2i": 4, "i2it": 5, "it2t": 6, "it2i": 7, "it2it": 8,
}  # fmt: skip
TASK_NAMES = {number: task for task, number in TASKS.items()}
_MODALITIES = {"t": "text", "i": "image", "it": "image,text"}

COLUMNS = frozenset({"id", "text", "image", "modality", "name", "summary"})
"""An index's own of every item: what else is known by such a name is its column `source_<name>`."""

DOCUMENTS_PER_DATASET = 10_000_000
"""M-BEIR's hashed ids: the dataset's number times this, plus the number of the item."""


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


def mask_grain(words: str, grain: Grain) -> str:
    """A text without one grain, punctuation tidied: a natural query that lacks it."""
    return mask_grains(words, [grain])


def mask_grains(words: str, grains: Sequence[Grain]) -> str:
    """A text without some grains, punctuation tidied; "" where nothing is left.

    Args:
        grains: of `words`, none of which overlaps another.

    Raises:
        ValueError: a grain that is not where it says it is.
    """
    stop = words[-1:] if words[-1:] in (".", "?", "!") else ""
    if any(grain.span[1] == len(words) for grain in grains):
        stop = ""
    text = words[: len(words) - len(stop)]
    for grain in sorted(grains, key=lambda grain: grain.span, reverse=True):
        start, end = grain.span
        if words[start:end].casefold() != grain.text.casefold():
            raise ValueError(f"grain {grain.text!r} is not at {start}:{end} of {words!r}")
        left, right = re.sub(r"\band $", "", text[:start]), text[end:]
        text = f"{left} {right}" if right[:1] not in ",:" else left + right
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r" ?([,:])(?: ?[,:])*", r"\1", text)
    text = re.sub(r":(?=,)|,(?=:)", "", text)
    text = re.sub(r"^(?:[\s,:-]|and )+|[\s,:-]+$", "", text)
    text = re.sub(r"([,:])(?=\S)", r"\1 ", text)
    if text and words[0].isupper():
        text = text[0].upper() + text[1:]
    return text + stop if text else ""


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
        """The picture as RGB, as every viewer shows it (`elva.data.pictures`).

        Raises:
            DataError: no picture, none of the formats that are read, too large, or damaged. Size is
                judged from the header, before anything is decoded.
        """
        return self._of_picture(pictures.load)

    def content_hash(self) -> bytes:
        """A SHA-256 of what the item says and shows, whatever it is called and however it is
        stored: its words without case, spacing and final stop, its picture's RGB pixels.

        Raises:
            DataError: as `load_image`.
        """
        words = normalise(" ".join((self.text or "").split())).casefold().encode()
        digest = hashlib.sha256(b"%d:%b" % (len(words), words))
        if self.image is not None:
            picture = self.load_image()
            digest.update(b"%dx%d:" % picture.size)
            digest.update(picture.tobytes())
        return digest.digest()

    def image_format(self) -> str:
        """One of `elva.data.pictures.FORMATS`, from the header; nothing is decoded.

        Raises:
            DataError: as `load_image`, but for damage beyond the header.
        """
        return self._of_picture(pictures.format_of)

    def image_size(self) -> tuple[int, int]:
        """Width and height of `load_image`'s picture, from the header; nothing is decoded.

        Raises:
            DataError: as `load_image`, but for damage beyond the header.
        """
        return self._of_picture(pictures.size)

    def _of_picture(self, ask: Callable[[Any], _T]) -> _T:
        where = self.where or self.id
        if self.image is None:
            raise DataError(f"{where}: has no picture")
        try:
            return ask(self.image)
        except PictureFault as fault:
            rule = "no such picture" if fault.kind == "missing" else "unreadable picture"
            parts = [where, rule]
            if isinstance(self.image, Path) and not f"/{self.image}".endswith(f"/{where}"):
                parts.append(printable(str(self.image)))
            reason = [] if fault.kind == "missing" else [str(fault)]
            raise DataError(": ".join([*parts, *reason])) from fault


@dataclass(frozen=True)
class Query(Item):
    """An item that asks for others.

    Args:
        instruction: The task in words; see `prompted`.
        task: A key of `TASKS`.
        positives: Ids of right answers in the pool that is searched; possibly none.
        negatives: Ids of hard negatives in it, possibly none.
        outside: Ids of right answers that this pool does not hold: judged, but not to be found
            (OVEN and InfoSeek share theirs).
        grains: Grains of `text`, or None where nobody parsed them.
        raw_text: The text before normalisation.
    """

    instruction: str
    task: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    grains: tuple[Grain, ...] | None = None
    raw_text: str | None = None

    @property
    def prompted(self) -> str:
        """Instruction and text as M-BEIR joins them: the raw text, normalised after joining."""
        raw = self.raw_text or ""
        # A query made from another by replacing its text alone speaks by that text.
        text = raw if normalise(raw) == (self.text or "") else self.text
        return normalise(f"{self.instruction} {text}")


@lru_cache(maxsize=2**16)
def hashed_id(id: str) -> int:
    """M-BEIR's hashed_did of `<dataset>:<n>`; ValueError where the id is not of that form."""
    dataset, separator, number = id.partition(":")
    if not (separator and dataset.isascii() and dataset.isdigit() and len(dataset) < 9):
        raise ValueError(f"id {id!r} is not <dataset>:<number>")
    if not (number.isascii() and number.isdigit() and len(number) < 8):
        raise ValueError(f"id {id!r} is not <dataset>:<number>")
    if str(int(dataset)) != dataset or str(int(number)) != number:
        raise ValueError(f"id {id!r} is not <dataset>:<number>: a number begins with 0")
    return int(dataset) * DOCUMENTS_PER_DATASET + int(number)


def id_of(hashed: int) -> str:
    """The id of a `hashed_id`."""
    return "{}:{}".format(*divmod(hashed, DOCUMENTS_PER_DATASET))


def modalities(task: str) -> tuple[str, str]:
    """Modality of a task's queries and of its candidates."""
    query, candidate = task.split("2")
    return _MODALITIES[query], _MODALITIES[candidate]


def task_between(query: str, candidate: str) -> str:
    """The task whose queries and candidates are of these modalities."""
    return next(task for task in TASKS if modalities(task) == (query, candidate))


def normalise(text: str) -> str:
    r"""M-BEIR's text rule: strip, drop \r and outer quotes, capitalise, end in punctuation."""
    text = text.replace("\r", "").strip().strip('"')
    if text:
        text = text[0].upper() + text[1:]
        if text[-1] not in ".?!":
            text += "."
    return text
