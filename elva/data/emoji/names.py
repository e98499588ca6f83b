"""Emoji names and the grains in them.

PyPI `emoji` drops CLDR's punctuation (`woman_firefighter_medium_skin_tone`); `name_of` puts
it back (`woman firefighter: medium skin tone`), which also marks where attributes begin.
Grains are read off the words. Nothing is added to what the name says: a person without a
gender word has no gender grain.
"""

import re
from dataclasses import dataclass

from elva.data.schema import Grain

_TONE = re.compile("(?:light|medium-light|medium|medium-dark|dark) skin tone")
_TAIL = re.compile(
    rf"^(?P<head>.+?)(?P<tones>(?: {_TONE.pattern})*)"
    "(?P<hair> (?:bald|beard|(?:blond|curly|red|white) hair))?$"
)
_MEMBERS = re.compile(
    "^(?P<head>couple with heart|family|kiss)"
    "(?P<members>(?: (?:adult|boy|child|girl|man|person|woman))+)$"
)

# A lookbehind and lookahead instead of \b: "man\u2019s shoe" and "upside-down" are single words.
_WORD = r"(?<![\w\u2019-])(?:%s)(?![\w\u2019-])"
_ATTRIBUTES = (
    # The object first: its own words are no further grains ("woman with white cane").
    ("object", re.compile(_WORD % "with|without|in|wearing|holding" + " .+?(?= facing right$|$)")),
    ("negation", re.compile("^no(?= (?!one ))")),
    ("gender", re.compile(_WORD % "man|men|people|person|woman|women")),
    (
        "direction",
        re.compile(
            _WORD
            % (
                "(?:(?:curving|facing|pointed|pointing|tilted) )?"
                "(?:down-left|down-right|up-left|up-right|up-down|left-right"
                "|down|left(?! luggage)|right|up)"
                "|leftwards|rightwards|upwards|downwards|left-facing|right-facing"
            )
        ),
    ),
    (
        "colour",
        re.compile(
            _WORD % "light blue|black|blue|brown|green|grey|orange|pink|purple|red|white|yellow"
        ),
    ),
    ("size", re.compile(_WORD % "small|medium-small|medium|large")),
)
_CLOCK = re.compile(
    "^(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)[ -](o\u2019clock|thirty)$"
)
_CONNECTORS = {"and", "of", "the", "at"}


@dataclass(frozen=True)
class Name:
    """A name with its grains.

    Args:
        text: In CLDR's form, `woman firefighter: medium skin tone`.
        grains: In the order of their spans.
        entity: What all its attribute variants share, for minimal pairs.
    """

    text: str
    grains: tuple[Grain, ...]
    entity: str

    @property
    def kinds(self) -> frozenset[tuple[str, str]]:
        """Its grains as (type, text), without positions."""
        return frozenset((grain.type, grain.text) for grain in self.grains)


def name_of(sequence: str, shortcode: str) -> Name:
    """The name of an emoji sequence, from the `emoji` package's `:short_code:`."""
    words = shortcode.strip(":").replace("_", " ")
    if _is_flag(sequence):
        return _compose([("flag", "flag", 0)], "flag", [("entity", words)])
    if words.startswith("keycap "):
        return _compose([("entity", "keycap", 0)], "keycap", [("symbol", words[7:])])
    match = _TAIL.match(words)
    if match is None:
        raise ValueError(f"not an emoji name: {shortcode!r}")
    head = match["head"]
    tail = [("tone", tone) for tone in _TONE.findall(match["tones"])]
    if match["hair"]:
        tail.append(("hair", match["hair"].strip()))
    members = _MEMBERS.match(head)
    if members is not None:
        head = members["head"]
        tail = [("member", member) for member in members["members"].split()] + tail
    return _compose(_head_grains(head), head, tail)


def _is_flag(sequence: str) -> bool:
    first = ord(sequence[0])
    return 0x1F1E6 <= first <= 0x1F1FF or (first == 0x1F3F4 and "\U000e0067" in sequence)


def _head_grains(head: str) -> list[tuple[str, str, int]]:
    """Grains of the part before the colon as (type, text, start), in order."""
    clock = _CLOCK.match(head)
    if clock is not None:
        return [("time", clock[1], 0), ("entity", clock[2], clock.start(2))]
    found: list[tuple[str, str, int]] = []
    rest = head
    for type, pattern in _ATTRIBUTES:
        for match in pattern.finditer(rest):
            found.append((type, match[0], match.start()))
        # Blanked, not cut: offsets stay those of the head.
        rest = pattern.sub(lambda match: "\0" * len(match[0]), rest)
    pieces = [
        (piece[0], piece.start())
        for piece in re.finditer(r"[^\0\s](?:[^\0]*[^\0\s])?", rest)
        if piece[0] not in _CONNECTORS
    ]
    # The last words left over say what it is ("hollow red circle"), earlier ones describe it.
    for text, start in pieces[:-1]:
        found.append(("attribute", text, start))
    for text, start in pieces[-1:]:
        found.append(("entity", text, start))
    return sorted(found, key=lambda grain: grain[2])


def _compose(
    head_grains: list[tuple[str, str, int]], head: str, tail: list[tuple[str, str]]
) -> Name:
    """`head: tail, tail` with every grain's span."""
    grains = [Grain(text, type, (at, at + len(text))) for type, text, at in head_grains]
    name = head
    for type, text in tail:
        name += ", " if name is not head else ": "
        grains.append(Grain(text, type, (len(name), len(name) + len(text))))
        name += text
    if head in ("flag", "keycap"):
        return Name(name, tuple(grains), head)
    words = [grain.text for grain in grains if grain.type in ("attribute", "entity")]
    objects = [grain.text for grain in grains if grain.type == "object"]
    return Name(name, tuple(grains), " ".join(words or objects) or "person")
