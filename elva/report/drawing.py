"""How charts are drawn: colours for a light and for a dark page, as SVG inside a page or as files.

Drawing goes through matplotlib's object interface, so it needs no display and leaves no state
behind; a file is replaced whole or not at all.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib import font_manager
from matplotlib.figure import Figure

from elva.files import write_bytes

DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Theme:
    """Colours of a page: Okabe and Ito's where hue tells apart, grey for what came before."""

    suffix: str
    paper: str
    ink: str
    muted: str
    rule: str
    earlier: tuple[str, ...]
    before: str
    last: str
    controls: tuple[str, ...]


LIGHT = Theme(
    "", "#ffffff", "#1d2329", "#5b6670", "#dfe3e7",
    ("#d9dde1", "#bcc3ca", "#9aa3ac"), "#59636e", "#0072b2",
    ("#e69f00", "#009e73", "#cc79a7", "#d55e00"),
)  # fmt: skip
DARK = Theme(
    "-dark", "#161a1f", "#e6e9ec", "#9aa5b1", "#313940",
    ("#343b43", "#4a535c", "#66707a"), "#a9b3bd", "#56b4e9",
    ("#e69f00", "#22c39a", "#e39ac3", "#f0803c"),
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A stage or control as the charts show it: the same colour in each of them."""

    title: str
    role: str  # "earlier", "before", "last" or "control"
    place: int = 0  # among those of its role

    @property
    def variable(self) -> str:
        """The CSS of its colour inside a page."""
        name, place = self.role, ""
        if name in ("earlier", "control"):
            name = name.replace("control", "controls")
            place = f"-{self.place % len(getattr(LIGHT, name))}"
        return f"var(--chart-{name}{place})"

    def colour(self, theme: Theme) -> str:
        if self.role == "before":
            return theme.before
        if self.role == "last":
            return theme.last
        shades = theme.controls if self.role == "control" else theme.earlier
        return shades[self.place % len(shades)]


class Drawing(NamedTuple):
    """A chart that is not drawn yet: its size, and what draws it in the colours of a page."""

    inches: tuple[float, float]
    draw: Callable[[Figure, Theme], None]


def draw_themes(
    path: Path,
    inches: tuple[float, float],
    draw: Callable[[Figure, Theme], None],
    themes: Sequence[Theme] = (LIGHT, DARK),
    layout: Literal["constrained"] | None = "constrained",
) -> None:
    """Draw once a theme, from matplotlib's defaults whatever the user's own settings are."""
    for theme in themes:
        with _styled(theme):
            figure = Figure(figsize=inches, layout=layout)
            draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        write_bytes(path.with_stem(path.stem + theme.suffix), buffer.getvalue())


def write_png(path: Path, drawing: Drawing) -> None:
    """A drawing as two files, `NAME.png` and `NAME-dark.png`."""
    draw_themes(path, drawing.inches, drawing.draw)


def svg(drawing: Drawing, alt: str) -> Markup:
    """A drawing as an SVG element inside a page, in the colours of `variables`.

    Words stay words, in the page's font; nothing in it has an id but what it refers to itself.

    Args:
        alt: What it shows, for those who do not see it.
    """
    inside: Any = {"svg.fonttype": "none", "svg.hashsalt": alt, "figure.facecolor": "none"}
    with _styled(_NAMED):
        matplotlib.rcParams.update({**inside, "axes.facecolor": "none"})
        figure = Figure(figsize=drawing.inches, layout="constrained")
        drawing.draw(figure, _NAMED)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern in (
        r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->", r"<defs>\s*</defs>",
        r' id="[a-zA-Z0-9.]+_\d+"', r' xmlns(:xlink)?="[^"]*"', r' version="1.1"',
        r"font-family: [^;\"]*;?",
    ):  # fmt: skip
        text = re.sub(pattern, "", text, flags=re.S)
    text = re.sub(r"(font: [^;\"]*?)(\d+(?:\.\d+)?px) [^;\"]*", r"\1\2 inherit", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _shortened, text)
    text = re.sub(r"\s*\n\s*(?=<)", "", text)
    for name, colour in _colours(_NAMED):
        text = text.replace(colour, f"var(--chart-{name})")
    size = " ".join(f"{72 * side:g}" for side in drawing.inches)
    opening = f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {size}">'
    return Markup(opening + text[text.index(">") + 1 :].strip())


def _shortened(place: re.Match[str]) -> str:
    """An attribute of places with hundredths of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", place[0])


def variables(theme: Theme) -> Markup:
    """The colours that charts inside a page name, as CSS declarations."""
    return Markup(" ").join(f"--chart-{name}: {colour};" for name, colour in _colours(theme))


def _colours(theme: Theme) -> Iterator[tuple[str, str]]:
    """Name -> colour, of every colour of a theme."""
    for name in ("paper", "ink", "muted", "rule", "before", "last"):
        yield name, getattr(theme, name)
    for name in ("earlier", "controls"):
        for place, colour in enumerate(getattr(theme, name)):
            yield f"{name}-{place}", colour


# Stands in for either theme while an SVG is drawn: each colour is a name that no other has.
_NAMED = Theme(
    "", "#fe0101", "#fe0102", "#fe0103", "#fe0104", ("#fe0105", "#fe0106", "#fe0107"),
    "#fe0108", "#fe0109", ("#fe010a", "#fe010b", "#fe010c", "#fe010d"),
)  # fmt: skip


@contextmanager
def _styled(theme: Theme) -> Iterator[None]:
    """matplotlib with its defaults and a theme's colours."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A script that no font has shows as boxes; the words stand in the page beside it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style(theme))
        yield


WIDE = (
    "Noto Sans CJK", "Noto Sans", "Source Han Sans", "WenQuanYi", "IPA", "Hiragino", "PingFang",
    "Malgun Gothic", "Meiryo", "Yu Gothic", "Microsoft YaHei", "Arial Unicode", "Unifont",
)  # fmt: skip
"""How fonts of further scripts are called, on Linux, macOS and Windows."""


@lru_cache(maxsize=1)
def families() -> tuple[str, ...]:
    """matplotlib's own font, and those installed of further scripts: each has what others lack."""
    names = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *sorted(name for name in names if name.startswith(WIDE)))


@lru_cache(maxsize=1)
def _drawn() -> frozenset[int]:
    """Characters that one of `families` has."""
    paths = (font_manager.findfont(name) for name in families())
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def drawable(text: str) -> str:
    r"""The text with the escape of each character that no installed font has: `\u65e5`."""
    return "".join(
        c if ord(c) in _drawn() or c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )


def _style(theme: Theme) -> Any:
    """rcParams; untyped, because matplotlib's stubs ask for every name as a literal."""
    return {
        "font.family": list(families()),
        "font.size": 9,
        "text.parse_math": False,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.rule,
        "axes.facecolor": theme.paper,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": theme.paper,
        "grid.color": theme.rule,
        "grid.linewidth": 0.7,
        "legend.labelcolor": theme.ink,
        "text.color": theme.ink,
        "axes.titlecolor": theme.ink,
        "xtick.color": theme.rule,
        "ytick.color": theme.rule,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
    }
