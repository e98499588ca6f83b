"""Pictures of the data as a person sees them: small ones for a page, and contact sheets."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from elva.data import Item
from elva.data.emoji import ATTRIBUTION
from elva.data.emoji.prompts import EMOJI_DATASET
from elva.data.schema import TASKS
from elva.data.strict import records
from elva.errors import printable
from elva.report.drawing import LIGHT, Theme, draw_themes, drawable

_THUMBNAIL = 256  # pixels a side at most, of a sheet's
_ON_PAGE = 192  # of a page's: twice what it shows, for dense screens
SHEET_COLUMNS, SHEET_TILES = 5, 50


def names(root: Path) -> dict[str, str]:
    """Picture id -> the text that the data asks for it by, over all splits."""
    found: dict[str, str] = {}
    for path in sorted(root.glob(f"query/*/mbeir_*_task{TASKS['t2i']}_*.jsonl")):
        for record in records(path):
            text = record.text("query_txt")
            if text and record.get("pos_cand_list") is not None:
                found.update(dict.fromkeys(record.ids("pos_cand_list"), text))
    return found


def attribution(ids: Iterable[str]) -> str | None:
    """The line that must stand beside these pictures, if any of them asks for one."""
    ours = any(id.startswith(f"{EMOJI_DATASET}:") for id in ids)
    return ATTRIBUTION if ours else None


def small(item: Item, side: int = _THUMBNAIL) -> Image.Image:
    """An item's picture, at most so many pixels a side."""
    image = item.load_image()
    image.thumbnail((side, side))
    return image


def data_uri(item: Item) -> str:
    """A picture small enough to stand inside a page, as WebP, which every browser shows."""
    buffer = io.BytesIO()
    small(item, _ON_PAGE).save(buffer, format="WEBP", quality=80, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sheet(
    path: Path, title: str, tiles: Sequence[tuple[Image.Image, str, str]], footer: str | None
) -> None:
    """A grid of pictures, the first `SHEET_TILES` of them.

    Args:
        tiles: (picture, heading, words under it).
        footer: a line at the bottom, such as an attribution.
    """
    columns = max(2, min(SHEET_COLUMNS, len(tiles)))
    rows = max(1, ceil(min(len(tiles), SHEET_TILES) / columns))
    height = 2.6 * rows + 1.0  # inches
    headline = textwrap.wrap(drawable(title), 22 * columns, max_lines=2, placeholder=" …")

    def draw(figure: Figure, theme: Theme) -> None:
        figure.suptitle(
            "\n".join(headline),
            x=0.02,
            y=1 - 0.12 / height,
            ha="left",
            weight="bold",
            parse_math=False,
        )
        cells = figure.subplots(rows, columns, squeeze=False).flatten()
        figure.subplots_adjust(
            left=0.02,
            right=0.98,
            wspace=0.12,
            hspace=0.45,
            top=1 - 0.85 / height,
            bottom=1 / height,
        )
        for axes in cells:
            axes.set_axis_off()
        for axes, (picture, heading, words) in zip(cells, tiles, strict=False):
            axes.imshow(picture, interpolation="lanczos")
            axes.set_title(heading, fontsize=9, color=theme.muted, parse_math=False)
            lines = textwrap.wrap(drawable(_short(words, 56)), 22, max_lines=3, placeholder=" …")
            axes.text(
                0.5, -0.03, "\n".join(lines + [""] * (3 - len(lines))), transform=axes.transAxes,
                ha="center", va="top", fontsize=9, parse_math=False,
            )  # fmt: skip
        if footer is not None:
            wrapped = textwrap.fill(footer, 26 * columns)
            figure.supxlabel(
                wrapped, y=0.1 / height, fontsize=7, color=theme.muted, parse_math=False
            )

    draw_themes(path, (2.0 * columns, height), draw, themes=(LIGHT,), layout=None)


def _short(words: str, most: int) -> str:
    """Words in one line, their middle left out where they are long: a file's name tells pictures
    apart at its end."""
    line = printable(words)
    return line if len(line) <= most else f"{line[: most // 3]}…{line[len(line) - most * 2 // 3 :]}"
