"""A file changed by chance: its bytes, the values of its JSON, what its readers look for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

from benchmarks.reliability.crashes.forged import VALUES, changed, fields

MOST_BYTES = 1 << 20
"""Ours: of a changed file. What takes more is a fault of size, which the readers' bounds see."""

TOKENS = [
    b"\0", b"\x1b[2J", b"\r", b"\n", b"\r\n", b"\t", b" ", b'"', b"'", b",", b";", b":", b"\\",
    b"\\u0000", b"\\ud800", b"\\u202e", b"\xff", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\xed\xa0\x80", b"\xc2\x9b", b"\xe2\x80\xae", b"\xe2\x80\xa8", b"\xf4\x90\x80\x80", b"{",
    b"[", b"}", b"]", b"NaN", b"-Infinity", b"1e999", b"1_000", b"\xd9\xa3", b"0x1", b"-1",
    b"9" * 5_000, b"null", b"true", b"../", b"/dev/zero", b"http://x", b"query-id", b"Q0", b"- ",
    b"? ", b"*a", b"&a", b"<<: *a", b"!!python/name:os.system", b"!!binary x", b"!!set", b"%",
    b"sep=,", b"2001-01-01", b"~", b"PAR1", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", bytes(64),
]  # fmt: skip
"""What readers of some format or other look for, and text that must not reach a terminal."""


def mutated(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Content with a few changes; `others` are files of its kind."""
    for _ in range(1 + min(int(random.expovariate(0.6)), 7)):
        step = random.choice(STEPS)
        content = step(content, others, random)[:MOST_BYTES]
    return content


def _place(content: bytes, random: Random) -> int:
    return random.randrange(len(content) + 1)


def _span(content: bytes, random: Random) -> tuple[int, int]:
    """Most are short, so that a file stays what it is."""
    begin = _place(content, random)
    return begin, min(len(content), begin + int(random.expovariate(0.1)))


def _flip(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    if not content:
        return content
    at = random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def _overwrite(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    begin, end = _span(content, random)
    return content[:begin] + random.randbytes(end - begin) + content[end:]


def _remove(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    begin, end = _span(content, random)
    return content[:begin] + content[end:]


def _repeat(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    begin, end = _span(content, random)
    times = random.choice((1, 1, 2, 9, 1_000))
    return content[:end] + content[begin:end] * times + content[end:]


def _insert(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    at, times = _place(content, random), random.choice((1, 1, 1, 1, 3, 5_000))
    return content[:at] + random.choice(TOKENS) * times + content[at:]


def _cut(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    return content[: _place(content, random)]


def _splice(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    other = random.choice(others)
    return content[: _place(content, random)] + other[_place(other, random) :]


def _swap_lines(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    lines = content.split(b"\n")
    a, b = random.randrange(len(lines)), random.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _other_value(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A line of JSON, or a file that is JSON, with a value of another kind in a place of it."""
    lines = content.split(b"\n")
    for at in random.sample(range(len(lines)), min(len(lines), 4)):
        if (line := json_with_another_value(lines[at], random)) is not None:
            return b"\n".join([*lines[:at], line, *lines[at + 1 :]])
    whole = json_with_another_value(content, random)
    return content if whole is None else whole


def json_with_another_value(text: bytes, random: Random) -> bytes | None:
    """The document with one value replaced by one of `VALUES`; None where it holds none."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not (places := list(fields(data))):
        return None
    data = changed(data, random.choice(places), random.choice(VALUES))
    try:
        written = json.dumps(data, ensure_ascii=random.random() < 0.5)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return None
    return written.encode("utf-8", "surrogatepass")


STEPS = (
    _flip, _overwrite, _remove, _repeat, _insert, _insert, _cut, _splice, _swap_lines,
    _other_value, _other_value,
)  # fmt: skip
