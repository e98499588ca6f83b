"""What the makers of embeddings and indexes note with them, and others read back: plain JSON, of
which some names have a meaning."""

from collections.abc import Iterator, Mapping
from typing import Any

KINDS: dict[str, type] = {
    "model": str, "read": str, "folder": str, "side": str, "max_completion_length": int,
}  # fmt: skip
"""Names that a search, a sync or an evaluation asks for; absent or null where nobody knows."""


def faults(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, rule) of each rule that is broken, as `settings.build` asks for them."""
    for name, kind in KINDS.items():
        if about.get(name) is not None and type(about[name]) is not kind:
            yield "about", f"hold {name} as a {kind.__name__}"
    asked = about.get("instructions", {})
    if not isinstance(asked, Mapping) or not all(
        isinstance(text, str) for pair in asked.items() for text in pair
    ):
        yield "about", "hold instructions as texts, each by the modality of a query"
