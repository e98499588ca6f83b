"""Which emoji are in the corpus: one entry a distinct picture."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from elva.data.emoji.names import Name, name_of
from elva.data.emoji.pictures import missing_extra, noto, noto_font, openmoji
from elva.data.emoji.tasks import Entry

# Two languages close to each other: words recur often enough for a small vocabulary.
_LANGUAGES = ("es", "fr")
# English keywords, where Debian's unicode-cldr-core is installed.
CLDR = Path("/usr/share/unicode/cldr/common")
_KEYWORD_FILES = ("annotations/en.xml", "annotationsDerived/en.xml")
_MIN_ALIAS = 4  # Shorter aliases are codes ("fr", "v"), not words.


# OpenMoji 17's font fills the frames of "P button" and "NEW button": red squares, no letters.
_MISDRAWN = {"\U0001f17f\ufe0f", "\U0001f195"}
# Ours, measured on OpenMoji 17 at 64 px: drawings that look the same to the eye differ by up to
# 40 of 255 in any pixel ("man: bald", "woman: bald"), the nearest that do not by 44 or more (a
# skin tone in the few pixels of "person in bed").
_JUDGED_SIZE = 64
_SAME_DRAWING = 41


@dataclass(frozen=True)
class Corpus:
    """Entries with their pictures.

    Args:
        entries: One a distinct picture.
        pictures: By emoji sequence, in OpenMoji's style.
        second_style: The same in Noto's style, where there is one.
        notices: What is left out because it is not installed, a line each.
    """

    entries: list[Entry]
    pictures: Mapping[str, Image.Image]
    second_style: Mapping[str, Image.Image]
    notices: tuple[str, ...]


def collect(size: int) -> Corpus:
    """Everything the installed packages and fonts hold."""
    try:
        import emoji
    except ModuleNotFoundError as error:
        raise missing_extra("emoji") from error

    emoji.config.load_language(list(_LANGUAGES))
    qualified = emoji.STATUS["fully_qualified"]
    data = {key: value for key, value in emoji.EMOJI_DATA.items() if value["status"] == qualified}
    names = {sequence: name_of(sequence, value["en"]) for sequence, value in data.items()}

    # Judged at one size, so that the corpus is the same at every size.
    judged = dict(openmoji(sorted(data.keys() - _MISDRAWN), _JUDGED_SIZE))
    chosen = (_representative(group, names) for group in _drawn_alike(judged, names))
    kept = sorted(sequence for sequence in chosen if sequence is not None)
    pictures = judged if size == _JUDGED_SIZE else dict(openmoji(kept, size))

    font, keywords = noto_font(), _keywords()
    second = {} if font is None else dict(noto(font, kept, size))
    notices = []
    if font is None:
        notices.append("no i2i task: Noto Color Emoji is not installed")
    if not keywords:
        notices.append("no keywords in t2t: unicode-cldr-core is not installed")
    entries = [
        Entry(
            number,
            sequence,
            names[sequence],
            _aliases(names[sequence], data[sequence], keywords.get(sequence.replace("\ufe0f", ""))),
            sequence in second,
        )
        for number, sequence in enumerate(kept)
    ]
    return Corpus(entries, pictures, second, tuple(notices))


def _drawn_alike(
    pictures: Mapping[str, Image.Image], names: Mapping[str, Name]
) -> Iterable[list[str]]:
    """Sequences grouped by what their pictures look like.

    Equal pictures are one group whatever their names. Pictures that only a measurement tells
    apart ("firefighter", "man firefighter") are looked for among names of the same entity,
    where they would be false negatives of each other.
    """
    equal: dict[bytes, list[str]] = {}
    for sequence, picture in pictures.items():
        equal.setdefault(picture.tobytes(), []).append(sequence)
    families: dict[str, list[tuple[np.ndarray, list[str]]]] = defaultdict(list)
    for group in equal.values():
        pixels = np.asarray(pictures[group[0]], np.int16)
        family = families[names[group[0]].entity]
        for other, found in family:
            if np.abs(pixels - other).max() <= _SAME_DRAWING:
                found += group
                break
        else:
            family.append((pixels, group))
    return (group for family in families.values() for _, group in family)


def _representative(sequences: list[str], names: Mapping[str, Name]) -> str | None:
    """The name that fits a picture drawn for several, or None if none does.

    OpenMoji draws some sequences alike ("man kneeling", "person kneeling"): the shortest
    sequence says least that the picture may not show. Where even the shortest disagree on
    skin tones, the picture shows none of them.
    """
    shortest = min(map(len, sequences))
    tied = [sequence for sequence in sequences if len(sequence) == shortest]
    tones = {
        tuple(grain.text for grain in names[sequence].grains if grain.type == "tone")
        for sequence in tied
    }
    if len(tones) > 1:
        return None
    return min(tied, key=lambda sequence: (len(names[sequence].text), names[sequence].text))


def _keywords() -> dict[str, str]:
    """Emoji sequence (without variation selectors) -> CLDR's English keywords."""
    found: dict[str, str] = {}
    for file in _KEYWORD_FILES:
        if (CLDR / file).is_file():
            for annotation in ElementTree.parse(CLDR / file).iter("annotation"):
                if annotation.get("type") is None and annotation.text:
                    found[annotation.get("cp", "")] = annotation.text.replace(" | ", ", ")
    return found


def _aliases(name: Name, data: Mapping[str, Any], keywords: str | None) -> tuple[str, ...]:
    """Short codes, other languages' names and keywords, where they differ from the name."""
    codes = [
        *data.get("alias", ()),
        *(data[language] for language in _LANGUAGES if language in data),
    ]
    texts = [str(code).strip(":").replace("_", " ") for code in codes]
    if keywords is not None:
        texts.append(keywords)
    plain = name.text.replace(":", "").replace(",", "").casefold()
    return tuple(
        dict.fromkeys(
            text for text in texts if len(text) >= _MIN_ALIAS and text.casefold() != plain
        )
    )
