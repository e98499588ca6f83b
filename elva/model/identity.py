"""Which embeddings may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elva.files import MANIFEST, sha256


@dataclass(frozen=True)
class Identity:
    """Which model made an embedding, and how; embeddings compare only where all of it is equal.

    Args:
        name: where the model was read from, for people.
        revision: a hash of its weights.
        preprocessing: a hash of all that lies between an item and its embedding beside the
            weights: tokenizer, template, image processor, prompt, length limit.
    """

    name: str
    revision: str
    preprocessing: str

    def matches(self, other: Identity) -> bool:
        """Whether embeddings of both may be compared; a model may have been moved."""
        return (self.revision, self.preprocessing) == (other.revision, other.preprocessing)


def hash_of_files(directory: Path, files: Sequence[Path]) -> str | None:
    """A hash of what some files of a directory hold, by its manifest where it has one; None where
    there are none."""
    if not files:
        return None
    known: dict[str, dict[str, str]] = {}
    if (directory / MANIFEST).is_file():
        known = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    names = [str(p.relative_to(directory)) for p in files]
    sums = [known[n]["sha256"] if n in known else sha256(directory / n) for n in names]
    return hashlib.sha256("".join(sums).encode()).hexdigest()
