"""Where text reaches a terminal: names, captions and errors are data there, and never commands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from elva.errors import printable


class Terminal(Console):
    """A console on which strings are shown as they are: no markup, no emoji codes, no controls."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, "\n"), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            shown = printable(renderable.plain, "\n")
            if shown != renderable.plain:
                renderable = renderable.copy()
                renderable.plain = shown
        return super().render(renderable, options)

    def print_line(self, text: str) -> None:
        """Print one line, whatever the text holds, not wrapped."""
        self.print(printable(text), soft_wrap=True)
