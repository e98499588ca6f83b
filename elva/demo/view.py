"""What the desk found as HTML: values in, escaped by the template, pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from elva.data import Item
from elva.demo.desk import DEPTH, Asked, Moved
from elva.errors import DataError, printable
from elva.report.pictures import attribution, small
from elva.report.render import render
from elva.search import Hit

_QUALITY = 85  # of WebP: a thumbnail of 256 pixels has about 10 KB


def found(asked: Asked, k: int) -> str:
    """The answers to a query with all its grains on."""
    return _page(asked, asked.switches.text, asked.answer.summary, asked.answer.hits[:k])


def moved(asked: Asked, now: Moved, off: Collection[int], k: int) -> str:
    """The answers without some grains, and how the first ones with all of them have moved."""
    before = {hit.id: hit.rank for hit in asked.answer.hits}
    hits = now.answer.hits[:k]
    names = [hit.name for hit in asked.answer.hits[:k]]
    rows = [
        {
            "name": _name(move.hit, names),
            "before": move.hit.rank,
            "now": _rank(move.now),
            "score_before": f"{move.hit.score:.3f}",
            "score_now": "" if move.now is None else f"{move.now.score:.3f}",
            **_way(move.hit.rank, None if move.now is None else move.now.rank),
        }
        for move in now.moves
    ]
    return _page(
        asked, now.text, now.answer.summary, hits, moves=rows, distance=now.distance,
        off=", ".join(asked.switches.names[at] for at in sorted(off)),
        ways={hit.id: _way(before.get(hit.id), hit.rank) for hit in hits},
    )  # fmt: skip


HINT = Markup(
    '<section class="elva"><p class="note">Ask in words, by a picture, or both. Then switch a '
    "grain of the query off: the ranks that move show what it was worth.</p></section>"
)
"""What stands where nothing was asked yet."""


def own(count: int, lines: Sequence[str]) -> str:
    """How many pictures of a visitor's own are searched, and which were left out."""
    left = Markup("").join(Markup("<br>left out: {}").format(line) for line in lines)
    return Markup('<p class="elva note">{} of your own{}</p>').format(count, left)


def title(line: str) -> str:
    """The head of the page."""
    return Markup("<h1>Search by grains</h1><p>{}</p>").format(printable(line))


def _page(
    asked: Asked,
    text: str,
    summary: str,
    hits: Sequence[Hit],
    *,
    off: str = "",
    moves: Sequence[dict[str, Any]] = (),
    distance: float = 0.0,
    ways: dict[str, dict[str, str]] | None = None,
) -> str:
    names = [hit.name for hit in hits]
    tiles = [
        {
            "id": hit.id,
            "rank": hit.rank,
            "picture": None if hit.image is None else _uri(hit.image),
            "text": printable(hit.name),
            "name": _name(hit, names),
            "score": f"{hit.score:.3f}",
            "bar": round(100 * min(1.0, max(0.0, hit.score))),
            "summary": printable(hit.summary),
            **(ways or {}).get(hit.id, {"arrow": "", "way": ""}),
        }
        for hit in hits
    ]
    return render(
        "demo-found.html.j2",
        asked={
            "text": printable(text),
            "summary": printable(summary),
            "off": printable(off),
            "picture": None if asked.image is None else _uri(asked.image),
        },
        tiles=tiles,
        moves=moves,
        distance=distance,
        credit=attribution(hit.id for hit in hits),
    )


def _name(hit: Hit, names: Sequence[str]) -> str:
    """Its name; behind it its id, where another of these has the same name."""
    again = names.count(hit.name) > 1 and hit.id != hit.name
    return printable(f"{hit.name} ({hit.id})" if again else hit.name)


def _rank(hit: Hit | None) -> str:
    return f"> {DEPTH:,}" if hit is None else f"{hit.rank:,}"


def _way(before: int | None, now: int | None) -> dict[str, str]:
    """Which way a rank went, and by how much; None stands below `DEPTH`."""
    if before == now:
        return {"way": "same", "arrow": "="}
    if before is None:
        return {"way": "up", "arrow": "▲ new"}
    if now is None:
        return {"way": "down", "arrow": f"▼ > {DEPTH - before:,}"}
    rose = now < before
    return {"way": "up" if rose else "down", "arrow": f"{'▲▼'[not rose]} {abs(now - before):,}"}


def _uri(file: Path) -> str | None:
    """A small picture inside the page, so that no file is served; None for one that is not read."""
    try:
        return _thumbnail(file, file.stat().st_mtime_ns)
    except (DataError, OSError):
        return None


@lru_cache(maxsize=4096)
def _thumbnail(file: Path, changed: int) -> str:
    buffer = io.BytesIO()
    small(Item("", None, file, "image")).save(buffer, format="WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
