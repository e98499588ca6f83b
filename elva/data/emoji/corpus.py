"""Which emoji are in the corpus: one entry a distinct picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from elva.data.emoji.names import Name, name_of
from elva.data.emoji.pictures import missing_extra, noto, noto_font, openmoji
from elva.data.emoji.tasks import Entry

# Two languages close to each other: words recur often enough for a small vocabulary.
LANGUAGES = ("es", "fr")
# English keywords, where Debian's unicode-cldr-core is installed.
CLDR = Path("/usr/share/unicode/cldr/common")
_KEYWORD_FILES = ("annotations/en.xml", "annotationsDerived/en.xml")
_MIN_ALIAS = 4  # Shorter aliases are codes ("fr", "v"), not words.


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

    emoji.config.load_language(list(LANGUAGES))
    qualified = emoji.STATUS["fully_qualified"]
    data = {key: value for key, value in emoji.EMOJI_DATA.items() if value["status"] == qualified}
    names = {sequence: name_of(sequence, value["en"]) for sequence, value in data.items()}

    pictures: dict[str, Image.Image] = {}
    alike: dict[bytes, list[str]] = {}
    for sequence, picture in openmoji(sorted(data), size):
        pictures[sequence] = picture
        alike.setdefault(picture.tobytes(), []).append(sequence)
    chosen = (_representative(group, names) for group in alike.values())
    kept = [sequence for sequence in chosen if sequence is not None]

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
        *(data[language] for language in LANGUAGES if language in data),
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
