"""The corpus' rows: split, queries of every task, candidates, minimal pairs.

Held out are names, never entities: a held-out name is a combination not seen in training of
grains that each are. Everything random-looking is a hash of the name, so that the corpus is
the same on every machine and with every library version.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from elva.data.emoji.names import Name, mask_grain
from elva.data.emoji.prompts import EMOJI_DATASET
from elva.data.schema import TASKS, Grain

SPLITS = ("train", "val", "test")
# OpenMoji's pictures, and Noto's.
IMAGE_FOLDERS = ("mbeir_images/emoji_images", "mbeir_images/emoji_noto_images")

# Ours: 20 % of the names with two or more grains (4 % val, 16 % test), as the specification of
# the corpus asks; two training names must still hold each grain, so that one is not a fluke.
_HELD_OUT = 0.20
_VAL_EVERY = 5
_MIN_SEEN = 2
# Ours: enough hard negatives to fill a batch, few enough to keep the files small.
_MAX_NEGATIVES = 8
_SOURCES_PER_CHANGE = 2
# Qids stay below M-BEIR's 500,000 a dataset, name dids apart from picture dids.
_QUERIES_PER_TASK = 60_000
_FIRST_NAME = 100_000

# it->i: the query's words for a changed grain. Types not named are never changed.
_CHANGES = {
    "tone": "with {}",
    "gender": "as a {}",
    "hair": "with {}",
    "object": "{}",
    "direction": "{}",
    "colour": "in {}",
    "size": "but {}",
    "time": "at {}",
    "symbol": "with {}",
}


@dataclass(frozen=True)
class Entry:
    """One picture with its name.

    Args:
        number: Its place in the corpus.
        sequence: The emoji itself.
        name: Its name and grains.
        aliases: Other texts for the same thing.
        has_second_style: Whether there is a Noto picture of it too.
    """

    number: int
    sequence: str
    name: Name
    aliases: tuple[str, ...]
    has_second_style: bool

    @property
    def picture_id(self) -> str:
        return f"{EMOJI_DATASET}:{self.number}"

    @property
    def name_id(self) -> str:
        return f"{EMOJI_DATASET}:{_FIRST_NAME + self.number}"

    @property
    def file_name(self) -> str:
        return f"{self.number:04d}.png"

    def picture_path(self, style: int = 0) -> str:
        """Relative to the root, as M-BEIR has it."""
        return f"{IMAGE_FOLDERS[style]}/{self.file_name}"


@dataclass(frozen=True)
class Row:
    """One query: M-BEIR's row and what M-BEIR has no place for."""

    split: str
    task: str
    query: dict[str, object]
    grains: tuple[Grain, ...]
    minimal_pairs: tuple[str, ...]


@dataclass(frozen=True)
class _Asked:
    """A query before it has ids: `source` is the picture in it, if any."""

    task: str
    target: Entry
    text: str | None
    grains: tuple[Grain, ...]
    source: Entry | None


def name_id(picture_id: str) -> str:
    """The id of a picture's name in the name pools."""
    dataset, number = picture_id.split(":")
    return f"{dataset}:{int(number) + _FIRST_NAME}"


def split_of(names: Sequence[Name]) -> dict[str, str]:
    """Name -> train, val or test."""
    several = [name for name in names if len(name.grains) >= 2]
    remaining = Counter(kind for name in names for kind in name.kinds)
    held_out: list[Name] = []
    for name in sorted(several, key=lambda name: _stable(name.text)):
        if len(held_out) >= _HELD_OUT * len(several):
            break
        if all(remaining[kind] > _MIN_SEEN for kind in name.kinds):
            remaining.subtract(name.kinds)
            held_out.append(name)
    splits = dict.fromkeys((name.text for name in names), "train")
    for i, name in enumerate(held_out):
        splits[name.text] = "val" if i % _VAL_EVERY == 0 else "test"
    return splits


def candidates(entries: Iterable[Entry], modality: str) -> list[dict[str, object]]:
    """M-BEIR's candidate rows: the pictures, or the names."""
    return [
        {
            "did": entry.picture_id if modality == "image" else entry.name_id,
            "txt": entry.name.text if modality == "text" else None,
            "img_path": entry.picture_path() if modality == "image" else None,
            "modality": modality,
            "src_content": None,
        }
        for entry in entries
    ]


def rows(entries: Sequence[Entry]) -> list[Row]:
    """All queries of all tasks and splits."""
    splits = split_of([entry.name for entry in entries])
    families: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        families[entry.name.entity].append(entry)
    asked: list[_Asked] = []
    for entry in entries:
        asked.append(_Asked("t2i", entry, entry.name.text, entry.name.grains, None))
        asked.append(_Asked("i2t", entry, None, (), entry))
        if entry.has_second_style:
            asked.append(_Asked("i2i", entry, None, (), entry))
        asked += [_Asked("t2t", entry, alias, (), None) for alias in entry.aliases]
    for target, grain, source in changes(entries, splits):
        phrase = _CHANGES[grain.type].format(grain.text)
        start = phrase.index(grain.text)
        moved = Grain(grain.text, grain.type, (start, start + len(grain.text)))
        asked.append(_Asked("it2i", target, phrase, (moved,), source))

    hard = {entry.number: _hard_negatives(entry, families, splits) for entry in entries}
    counters: Counter[str] = Counter()
    made: list[Row] = []
    for ask in asked:
        split = splits[ask.target.name.text]
        family = families[ask.target.name.entity] if split != "train" else []
        number = TASKS[ask.task] * _QUERIES_PER_TASK + counters[ask.task]
        counters[ask.task] += 1
        made.append(_row(ask, number, split, hard[ask.target.number], family))
    return made


def _hard_negatives(
    target: Entry, families: Mapping[str, Sequence[Entry]], splits: Mapping[str, str]
) -> list[Entry]:
    """Others of the same entity, in a fixed shuffled order; training rows see training rows."""
    in_training = splits[target.name.text] == "train"
    known = [
        entry
        for entry in families[target.name.entity]
        if entry is not target and not (in_training and splits[entry.name.text] != "train")
    ]
    known.sort(key=lambda entry: _stable(target.name.text, entry.name.text))
    return known[:_MAX_NEGATIVES]


def _row(
    ask: _Asked, number: int, split: str, hard: Sequence[Entry], family: Sequence[Entry]
) -> Row:
    to_picture = ask.task in ("t2i", "i2i", "it2i")
    style = 1 if ask.task == "i2i" else 0
    negatives = list(hard)
    if ask.task == "it2i" and ask.source is not None:
        # The picture one starts from is the hardest negative there is.
        negatives = [ask.source, *(entry for entry in hard if entry is not ask.source)]

    def ids(entries: Iterable[Entry]) -> list[str]:
        return [entry.picture_id if to_picture else entry.name_id for entry in entries]

    present = (("image", ask.source), ("text", ask.text))
    query: dict[str, object] = {
        "qid": f"{EMOJI_DATASET}:{number}",
        "query_txt": ask.text,
        "query_img_path": ask.source.picture_path(style) if ask.source else None,
        "query_modality": ",".join(name for name, value in present if value is not None),
        "query_src_content": None,
        "pos_cand_list": ids([ask.target]),
        "neg_cand_list": ids(negatives[:_MAX_NEGATIVES]),
        "task_id": TASKS[ask.task],
    }
    pairs = tuple(ids(family)) if len(family) >= 2 else ()
    return Row(split, ask.task, query, ask.grains, pairs)


def changes(
    entries: Iterable[Entry], splits: Mapping[str, str]
) -> Iterable[tuple[Entry, Grain, Entry]]:
    """Pairs that differ in one grain, as (target, its grain, source).

    The source is always a training picture, so that a held-out query asks for an unseen
    target, not from an unseen start.
    """
    alike: dict[tuple[str, str], list[tuple[Entry, Grain | None]]] = defaultdict(list)
    for entry in entries:
        counts = Counter(grain.type for grain in entry.name.grains)
        for type in _CHANGES:
            # Without its one grain of this type, the name is what its twins share.
            if counts[type] == 1:
                only = next(grain for grain in entry.name.grains if grain.type == type)
                alike[type, mask_grain(entry.name.text, only)].append((entry, only))
            elif counts[type] == 0:
                alike[type, entry.name.text].append((entry, None))
    for twins in alike.values():
        for target, grain in twins:
            if grain is None:
                continue
            ranked = sorted(
                (_stable(target.name.text, grain.type, source.name.text), source.number, source)
                for source, _ in twins
                if source is not target and splits[source.name.text] == "train"
            )
            for _, _, source in ranked[:_SOURCES_PER_CHANGE]:
                yield target, grain, source


def _stable(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()
