"""Values and texts that a reader of JSON must bear, and documents that hold them."""

import base64
import copy
import json
import zlib

BITS = base64.b64encode(zlib.compress(b"\x20\x00")).decode()  # the third of ten rows
BOMB = base64.b64encode(zlib.compress(bytes(300 << 20), 9)).decode()  # 400 kB that unpack to 300 MB
VALUES = [
    None, True, False, 0, 1, -1, 9, 10**9, 2**31, 2**63, 2**64, 10**300, 0.5, 1e308, "", "x", "0",
    "../" * 9 + "etc/passwd", "/dev/zero", "a\0b", "\x1b[2J", "\ud800", "f" * 64, "x" * 100_000, [],
    {}, [None], [{}], {"x": 1}, BITS, BOMB, BITS + "\n",
]  # fmt: skip
TEXTS = [
    b"", b"[]", b"null", b"{}", b"1", b'"x"', b"[" * 100_000, b"{" * 100_000, b'{"a":' * 9_000,
    b"NaN", b"9" * 5_000, b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" + b"{}," * 2_500_000 + b"{}]",
    b"[[],[]" * 1_000_000, b'{"version": 1, "version": 1}',
]  # fmt: skip


def fields(data, path=()):
    """The place of every value in a document."""
    if path:
        yield path
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from fields(value, (*path, key))


def changed(data, path, value):
    """A copy of a document with one value replaced."""
    data = copy.deepcopy(data)
    around = data
    for key in path[:-1]:
        around = around[key]
    around[path[-1]] = value
    return data


def forgeries(data):
    """(what, document's bytes): every field by every value, missing, and beside one too many."""
    for path in fields(data):
        for value in VALUES:
            yield f"{path} = {str(value)[:40]!r}", json.dumps(changed(data, path, value)).encode()
        around = copy.deepcopy(data)
        inner = around
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        yield f"no {path}", json.dumps(around).encode()
    yield "a field too many", json.dumps({**data, "codes_of_mine": 1}).encode()
    if data.get("segments"):
        yield "one twice", json.dumps({**data, "segments": data["segments"][:1] * 2}).encode()
        yield "one of two", json.dumps({**data, "segments": data["segments"][:1]}).encode()
    yield from ((f"text {text[:20]!r}", text) for text in TEXTS)
