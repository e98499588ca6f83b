"""Which embeddings may be compared."""

from __future__ import annotations

from dataclasses import dataclass


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
