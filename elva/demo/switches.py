"""A query's grains as switches: which it has, and the query without those that are off."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from elva.data import Grain, load
from elva.data.schema import TASKS, mask_grains, normalise
from elva.mrbench.judges import RuleJudge

MOST = 24
"""Ours: switches that a page shows; a longer query has none."""

SPLITS = ("test", "val", "train")

Known = Mapping[str, tuple[Grain, ...]]
"""Normalised text, without case -> the grains that the data names in it."""


@dataclass(frozen=True)
class Switches:
    """The grains of a text.

    Args:
        text: The query as a model reads it.
        grains: In the order of their places; none where the text has fewer than two.
        source: Who names them: `data`, the data's grains.jsonl; `rules`, `elva mrbench`'s rules of
            English; `words`, nobody: they are its words.
    """

    text: str
    grains: tuple[Grain, ...]
    source: str

    @property
    def names(self) -> list[str]:
        """Each grain's words, numbered where it comes twice."""
        words = [grain.text for grain in self.grains]
        return [
            word if words.count(word) == 1 else f"{word} ({words[: at + 1].count(word)})"
            for at, word in enumerate(words)
        ]

    def without(self, off: Collection[int]) -> str:
        """The text without the grains at these places; "" where nothing is left."""
        return mask_grains(self.text, [self.grains[at] for at in sorted(off)])


def switches(words: str, known: Known) -> Switches:
    """The grains of a query: as the data names them, else by rules, else its words.

    Args:
        known: of `known_grains`.

    Example::

        switches("a sleeping cat on a red sofa", {}).names  # sleeping, cat, on, red, sofa
    """
    text = normalise(" ".join(words.split()))
    named = known.get(text.casefold(), ())
    ruled = RuleJudge().grains(text)
    spelled = [Grain(m[0], "word", m.span()) for m in re.finditer(r"[^\W_][\w'\u2019-]*", text)]
    for source, grains in (("data", named), ("rules", ruled), ("words", spelled)):
        if 1 < len(grains) <= MOST:
            ordered = sorted(grains, key=lambda grain: grain.span)
            return Switches(text, tuple(ordered), source)
    return Switches(text, (), "words")


def known_grains(root: Path) -> dict[str, tuple[Grain, ...]]:
    """The grains of every text that asks for a picture, over all splits of some data.

    Raises:
        DataError: a line of `grains.jsonl` that is not as it must be.
    """
    found: dict[str, tuple[Grain, ...]] = {}
    if not (root / "grains.jsonl").is_file():
        return found
    for split in SPLITS:
        if any((root / "query" / split).glob(f"mbeir_*_task{TASKS['t2i']}_{split}.jsonl")):
            for query in load(root, split=split, tasks=["t2i"]).queries:
                if query.text and query.grains:
                    found.setdefault(query.text.casefold(), query.grains)
    return found
