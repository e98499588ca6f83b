"""What the makers of embeddings and indexes note with them, and others read back: plain JSON, of
which some names have a meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elva.index.index import Index

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


def facts(index: Index) -> dict[str, Any]:
    """What there is to know of an index, as plain data."""
    size = sum(one.size for one in index.files)
    rows = sum(one.rows_bytes for one in index.segments)
    fields = sum(one.size for one in index.segments) - rows
    deleted = int((~index.alive).sum())
    return {
        "directory": str(index.directory),
        "items": len(index),
        "deleted": deleted,
        "dim": index.dim,
        "dtype": index.manifest.dtype,
        "metric": "cosine",
        "model": asdict(index.model),
        "trained_on": index.about.get("trained_on"),
        "folder": index.about.get("folder"),
        "generation": index.manifest.generation,
        "segments": len(index.segments),
        "bytes": size,
        "rows_bytes": rows,
        "fields_bytes": fields,
        "codes_bytes": size - rows - fields,
        "deleted_bytes": deleted * size // max(1, len(index.alive)),
        "fields": {f.name: str(f.type) for f in index.table.schema},
        "conflicts": index.conflicts,
    }
