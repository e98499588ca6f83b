"""Where text reaches a terminal: names, captions and errors are data there, and never commands."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what moves, hides or turns other text: controls (ESC, DEL, C1), bidi and
zero-width marks, halves of surrogate pairs, separators of lines."""

JOINERS = "\u200c\u200d"
"""They spell words of some scripts and compose emoji; next to a letter of ASCII they only hide."""


def visible(text: str, keep: str = "") -> str:
    """The text with every hidden character as its escape: \\x1b, \\u202e.

    Args:
        keep: characters that stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = []
    for before, letter in zip(" " + text, text, strict=False):
        joins = letter in JOINERS and not before.isascii()
        plain = unicodedata.category(letter) not in HIDDEN or letter in keep or joins
        shown.append(letter if plain else letter.encode("unicode_escape").decode())
    return "".join(shown)


class Terminal(Console):
    """A console on which strings are shown as they are: no markup, no emoji codes, no controls."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, "\n"), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            shown = visible(renderable.plain, "\n")
            if shown != renderable.plain:
                renderable = renderable.copy()
                renderable.plain = shown
        return super().render(renderable, options)

    def line(self, text: str) -> None:
        """Print one line, whatever the text holds, not wrapped."""
        self.print(visible(text), soft_wrap=True)
