"""Which emoji are in the corpus: one entry a distinct picture."""

from __future__ import annotations

from typing import Any

from PIL import Image

from elva.data.emoji.names import Name, name_of
from elva.data.emoji.pictures import missing_extra, render
from elva.data.emoji.tasks import Entry

# Two languages close to each other: words recur often enough for a small vocabulary.
LANGUAGES = ("es", "fr")
_MIN_ALIAS = 4  # Shorter aliases are codes ("fr", "v"), not words.


def collect(size: int) -> tuple[list[Entry], dict[str, Image.Image]]:
    """The entries, and their pictures by emoji sequence."""
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
    for sequence, picture in render(sorted(data), size):
        pictures[sequence] = picture
        alike.setdefault(picture.tobytes(), []).append(sequence)
    chosen = (_representative(group, names) for group in alike.values())
    kept = [sequence for sequence in chosen if sequence is not None]
    entries = [
        Entry(number, sequence, names[sequence], _aliases(names[sequence], data[sequence]))
        for number, sequence in enumerate(kept)
    ]
    return entries, pictures


def _representative(sequences: list[str], names: dict[str, Name]) -> str | None:
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


def _aliases(name: Name, data: dict[str, Any]) -> tuple[str, ...]:
    """Short codes and other languages' names, where they differ from the name."""
    codes = [
        *data.get("alias", ()),
        *(data[language] for language in LANGUAGES if language in data),
    ]
    texts = (str(code).strip(":").replace("_", " ") for code in codes)
    plain = name.text.replace(":", "").replace(",", "").casefold()
    return tuple(
        dict.fromkeys(
            text for text in texts if len(text) >= _MIN_ALIAS and text.casefold() != plain
        )
    )
