"""What of items a model reads: texts, pictures, both in one, and instructions."""

from collections.abc import Collection, Mapping
from typing import Literal

from elva.errors import UserError

Instructions = Literal["required", "optional", "unread"]
"""Whether a query must, may or cannot say in words what to look for."""

MODALITIES = {
    "text": ("text", "texts"),
    "image": ("pictures", "pictures"),
    "image,text": ("pictures with text", "pictures with text"),
}
"""An item's modality -> how it is called, as it is read and as several of it are counted."""


def must_read(name: str, reads: Collection[str], counts: Mapping[str, int], of: str) -> None:
    """UserError where a model does not read some of the items that it is to embed.

    Args:
        name: of the model, for people.
        reads: keys of `MODALITIES`.
        counts: items by modality.
        of: where the items come from, for people.
    """
    for modality, count in counts.items():
        if count and modality not in reads:
            called = " and ".join(one for key, (one, _) in MODALITIES.items() if key in reads)
            raise UserError(
                f"embed: the model must read what it embeds, got {name}, which reads {called} "
                f"alone: {count:,} of {sum(counts.values()):,} items of {of} are "
                f"{MODALITIES[modality][1]}; choose another model, or other items"
            )
