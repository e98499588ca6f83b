"""Row of hostile texts: none reaches a terminal as a command, none becomes HTML on a page."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.reliability.row import Outcome, Row, Trials
from benchmarks.reliability.shown.pages import PAGES
from benchmarks.reliability.shown.terminals import TERMINALS

PIECES = (
    "\x1b[2J", "\x1b]0;owned\x07", "\x1b]8;;http://evil\x1b\\", "\x1bP1$r\x1b\\", "\x9b31m",
    "\x9d0;x\x9c", "\x00", "\x07", "\x08" * 9, "\r", "\n", "\r\nelva: all is well", "\t", "\x0b",
    "\x0c", "\x7f", "\x85", "\u2028", "\u2029", "\u202e", "\u2066", "\u061c", "\u200b", "\u200f",
    "\ufeff", "\u00ad", "\u2060", "\U000e0041", "\ud800", "\udfff", "\udc9b", "\u200d",
    "e\u0301" * 8, "\u0661", "\u732b", "[bold]", "[/]", "[/a]", "[link=http://evil]x[/link]",
    "[@click=app.bell]", ":cat:", "\\[red]", "{0}", "%s%n", "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "</title><svg/onload=alert(1)>", "\"><b id=x>", "' onload='y",
    "<!--", "-->", "]]>", "</script>", "&lt;i&gt;", "{{ 7 * 7 }}", "{% raw %}", "${1}",
    "javascript:alert(1)", "</p></section>", "<style>*{display:none}</style>", "`", "=cmd()",
    "a dog", "caf\u00e9", "--", "-k",
)  # fmt: skip
"""What moves, hides or turns other text, and what markup of rich, HTML and jinja2 consists of."""

SURFACES = {**TERMINALS, **PAGES}


def hostile(seed: int, number: int) -> str:
    """A text that bears its number, that it can be found again, among pieces and any characters."""
    chance = random.Random(f"{seed} {number}")
    parts = [chance.choice(PIECES) for _ in range(chance.randint(1, 9))]
    parts += [chr(chance.randrange(0x110000)) for _ in range(chance.randint(0, 3))]
    parts.insert(chance.randint(0, len(parts)), f" k{number}k ")
    return "".join(parts).replace("; ", ";")  # by which a review separates grains


def trials(wanted: Trials) -> Outcome:
    """Each text before every surface of its turn: all the cheap ones, one of the others."""
    outcome = Outcome()
    for number in wanted.numbers:
        text, marker = hostile(wanted.seed, number), f"k{number}k"
        outcome.tried += 1
        for name, (turn, show) in SURFACES.items():
            if (number + 1) % turn:
                continue
            try:
                with tempfile.TemporaryDirectory() as place:
                    show(text, marker, Path(place))
            except Exception as error:  # noqa: BLE001  the next text is tried all the same
                outcome.wrong.append(
                    f"number {number} ({name}, {text!a}): {type(error).__name__} {error!a}"[:600]
                )
                break
            outcome.counts[name] += 1
    return outcome


def said(kept: Mapping[str, Any]) -> str:
    return f"{sum(kept['counts'].values()):,} times shown, by {len(kept['counts'])} surfaces"


ROWS = {
    "terminal": Row(
        title="hostile texts before all that prints to a terminal or makes a page",
        goal="4,000; no control character, no markup",
        unit="texts",
        amount=4_000,
        smoke=12,
        chunk=20,
        run=trials,
        said=said,
    ),
}
