"""Files that somebody else wrote, every checksum right: refused in one line, or they answer as the
real ones; never another error, nor memory or time beyond what the files hold.

Each field of each file that is parsed takes each of a list of hostile values, is missing, or has
one too many beside it; the whole text is each of a list of hostile texts.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.reliability.crashes.places import place
from benchmarks.reliability.row import Outcome, Trials
from elva import checkpoint, files
from elva.errors import UserError
from elva.index import Index, blocks, segment
from elva.index.embeddings import Embeddings
from elva.model.identity import Identity
from elva.training.resumed import restored

MODEL = Identity("a model", "revision", "preprocessing")
ABOUT = {"model": "m", "read": "at_ret", "folder": "/s", "max_completion_length": 0,
         "instructions": {"text": "Find it."}}  # fmt: skip
BITS = base64.b64encode(zlib.compress(b"\x20\x00")).decode()  # the third of ten rows
BOMB = base64.b64encode(zlib.compress(bytes(300 << 20), 9)).decode()  # 400 kB that unpack to 300 MB
VALUES = [
    None, True, False, 0, 1, -1, 9, 10**9, 2**31, 2**63, 2**64, 10**300, 0.5, 1e308, "", "x", "0",
    "../" * 9 + "etc/passwd", "/dev/zero", "a\0b", "\x1b[2J", "\ud800", "f" * 64, "x" * 100_000, [],
    {}, [None], [{}], {"x": 1}, BITS, BOMB, BITS + "\n",
]  # fmt: skip
KEYS = ["", "a\nb", "\x1b[2J", "\u202ex", "../x", "/dev/zero", "a\0b", "x" * 5_000]
"""In place of a field's name, which may be a file's."""

NUMBERS = ["NaN", "Infinity", "-1e999", "9" * 5_000]
"""In place of a value, as JSON has none of them."""

TEXTS = [
    b"", b"[]", b"null", b"{}", b"1", b'"x"', b"[" * 100_000, b"{" * 100_000, b'{"a":' * 9_000,
    b"NaN", b"9" * 5_000, b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" + b"{}," * 2_500_000 + b"{}]",
    b"[[],[]" * 1_000_000, b'{"version": 1, "version": 1}',
]  # fmt: skip
MOST_BYTES, MOST_SECONDS = 120 << 20, 2.0
"""Ours: of Python's memory, and of this process's time."""


class Forgery(NamedTuple):
    """What is forged, and the document that says it."""

    what: str
    text: bytes


def fields(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a document."""
    if path:
        yield path
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from fields(value, (*path, key))


def changed(data: Any, path: Sequence[Any], value: Any) -> Any:
    """A copy of a document with one value replaced."""
    data = copy.deepcopy(data)
    _at(data, path[:-1])[path[-1]] = value
    return data


def _at(data: Any, path: Sequence[Any]) -> Any:
    for key in path:
        data = data[key]
    return data


def without(data: Any, path: Sequence[Any]) -> Any:
    """A copy of a document with one value taken out."""
    data = copy.deepcopy(data)
    del _at(data, path[:-1])[path[-1]]
    return data


def forgeries(data: Any) -> Iterator[Forgery]:
    """Every field by every value, missing, and beside one too many; every text."""
    mark = "in its place"
    for path in fields(data):
        for value in VALUES:
            text = json.dumps(changed(data, path, value)).encode()
            yield Forgery(f"{path} = {str(value)[:40]!r}", text)
        for number in NUMBERS:
            text = json.dumps(changed(data, path, mark)).replace(f'"{mark}"', number).encode()
            yield Forgery(f"{path} = {number[:9]}", text)
        rest = without(data, path)
        yield Forgery(f"no {path}", json.dumps(rest).encode())
        if isinstance(path[-1], str):
            for key in KEYS:
                named = changed(rest, (*path[:-1], key), _at(data, path))
                yield Forgery(f"{path} as {key[:9]!r}", json.dumps(named).encode())
    yield Forgery("a field too many", json.dumps({**data, "codes_of_mine": 1}).encode())
    if data.get("segments"):
        twice, one = data["segments"][:1] * 2, data["segments"][:1]
        yield Forgery("one twice", json.dumps({**data, "segments": twice}).encode())
        yield Forgery("one of two", json.dumps({**data, "segments": one}).encode())
    yield from (Forgery(f"text {text[:20]!r}", text) for text in TEXTS)


# -- what is forged --------------------------------------------------------------------------------


@dataclass
class Target:
    """A document in a file, how it is written with right checksums, and what reads it.

    allowed: answers, beside the real one, that its writer might have written.
    """

    data: Any
    write: Callable[[bytes], object]
    answer: Callable[[], Any]
    allowed: Sequence[bytes] = field(default_factory=list)

    @cached_property
    def wanted(self) -> list[Any]:
        found = []
        for body in (self.real, *self.allowed):
            self.write(body)
            found.append(self.answer())
        self.write(self.real)
        return found

    @property
    def real(self) -> bytes:
        return json.dumps(self.data).encode()

    @cached_property
    def forged(self) -> list[Forgery]:
        return [*forgeries(self.data)]


@cache
def rows() -> torch.Tensor:
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


def make(root: Path) -> Path:
    """An index of two segments, one with a deleted row, and an embedded pool of one shard."""
    names = [f"item {i}" for i in range(10)]
    index = Index.build(root / "i", names, rows(), model=MODEL, columns={"year": [*range(10)]},
                        about=ABOUT)  # fmt: skip
    index = index.add(["late"], rows()[:1] + 1, model=MODEL, columns={"year": [11]})
    index.delete(["item 2"])
    plan = Embeddings(root / "e", 10, 16, MODEL, {**ABOUT, "side": "queries"})
    plan.save()
    plan.shards[0].parent.mkdir()
    os.link(index.segments[0].path, plan.shards[0])
    return root


def found(root: Path) -> Any:
    """What the index says to its own rows, and of how many."""
    index = Index(root / "i")
    asked = index.about.get("instructions", {}).items()
    assert all(len(text.split()) < 99 for pair in asked for text in pair)
    _ = Path(index.about.get("model") or "") / (index.about.get("folder") or "")
    return [index.ids(r.tolist()) for r in index.search(rows(), 3).rows], len(index)


def _listing(root: Path) -> Target:
    path = root / "i" / "index.json"
    data = json.loads(path.read_bytes().split(b"\n")[0])
    first, last = data["segments"]
    # What its writer might have written: fewer segments, or none of their rows deleted.
    others = ([{**first, "deleted": ""}, last], [first], [last], [])
    bodies = [json.dumps({**data, "segments": segments}).encode() for segments in others]
    return Target(data, lambda body: write_listing(path, body), lambda: found(root), bodies)


def write_listing(path: Path, body: bytes) -> None:
    """An index's manifest, with its checksum."""
    path.write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")


class Header:
    """The header of the first segment, or of its codes, and the manifest that names it."""

    def __init__(self, root: Path, part: str) -> None:
        self.part, self.listing = part, root / "i" / "index.json"
        self.listed = json.loads(self.listing.read_bytes().split(b"\n")[0])
        index = Index(root / "i")
        coded = index.codes[0]
        assert coded is not None
        self.path = index.segments[0].path if part == "segment" else coded.path
        self.content = self.path.read_bytes()
        (length,) = struct.unpack("<Q", self.content[8:16])
        self.text = self.content[48 : 48 + length]
        self.fields = json.loads(self.text)

    def write(self, text: bytes) -> None:
        """Another header's text, which the manifest names, so that nothing but its fields is
        wrong."""
        text = text[: blocks.HEADER_BYTES - 48]
        digest = hashlib.sha256(text).digest()
        start = self.content[:8] + struct.pack("<Q", len(text)) + digest + text
        path, key = self.path, "header"
        if self.part == "codes":  # which are named after their header
            name = f"{path.name.split('.')[0]}.{digest.hex()[:16]}.codes"
            path, key = path.with_name(name), "codes"
        path.write_bytes(start.ljust(blocks.HEADER_BYTES, b"\0") + self.content[4096:])
        body = changed(self.listed, ("segments", 0, key), digest.hex())
        write_listing(self.listing, json.dumps(body).encode())


def write_table(root: Path, table: bytes) -> Path:
    """The first segment with another table behind its rows, as a new file."""
    header = Header(root, "segment")
    end = blocks.HEADER_BYTES + header.fields["rows"] * header.fields["dim"] * 2
    body = header.content[blocks.HEADER_BYTES : end] + table
    sums = hashlib.sha256(body).digest()
    digest = hashlib.sha256(sums).hexdigest()
    text = json.dumps({**header.fields, "table_bytes": len(table), "sums": digest}).encode()
    start = segment.MAGIC + struct.pack("<Q", len(text)) + hashlib.sha256(text).digest() + text
    path = root / "forged.elva"
    path.write_bytes(start.ljust(blocks.HEADER_BYTES, b"\0") + body + sums)
    return path


def _header(root: Path, part: str) -> Target:
    header = Header(root, part)
    return Target(header.fields, header.write, lambda: found(root))


def _plan(root: Path) -> Target:
    path = root / "e" / "embeddings.json"

    def answer() -> Any:
        ids, query = Embeddings.open(root / "e").queries()
        return ids, query.tolist()

    return Target(json.loads(path.read_bytes()), path.write_bytes, answer)


# -- a checkpoint ----------------------------------------------------------------------------------

FACTS = {
    "elapsed": 1.5, "step": 3, "best": {"value": 0.25, "step": 2, "worse": 1},
    "guards": {"since": {"kl": 2}, "said": {"kl": "it is over 10"}},
}  # fmt: skip


class Small(nn.Module):
    """A model of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 2, generator=draw))
        self.b = nn.Parameter(torch.randn(2, generator=draw))


def save(root: Path) -> Path:
    """A checkpoint of it after three steps."""
    weights = {name: value.detach() for name, value in Small().named_parameters()}
    moments = {f"{n}|exp_avg": v * 0.5 for n, v in weights.items()}
    moments |= {f"{n}|step": torch.tensor(3.0) for n in weights}
    return checkpoint.save(root / "stage-2", 3, {"weights": weights, "optimizer": moments}, FACTS)


def _resumed(path: Path) -> Any:
    """Whether a training goes on from it; UserError where it says why not."""
    lines: list[str] = []
    if checkpoint.newest(path.parent, lines.append) is None:
        raise UserError(lines[0] if lines else "nothing is there")
    restored(path, Small())
    return "goes on"


def _relisted(path: Path, name: str, content: bytes) -> None:
    """A file of a checkpoint, listed as it is."""
    (path / name).write_bytes(content)
    listed = json.loads((path / files.MANIFEST).read_bytes())
    listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / files.MANIFEST).write_text(json.dumps(listed))


def _state(root: Path) -> Target:
    path = save(root)
    data = json.loads((path / checkpoint.STATE).read_bytes())
    return Target(data, lambda b: _relisted(path, checkpoint.STATE, b), lambda: _resumed(path))


def _manifest(root: Path) -> Target:
    path = save(root)
    there = path / files.MANIFEST
    return Target(json.loads(there.read_bytes()), there.write_bytes, lambda: _resumed(path))


def _tensors(root: Path, name: str) -> Target:
    """The header of a safetensors file."""
    path = save(root)
    content = (path / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])

    def write(text: bytes) -> None:
        _relisted(path, name, struct.pack("<Q", len(text)) + text + content[8 + length :])

    return Target(json.loads(content[8 : 8 + length]), write, lambda: _resumed(path))


MAKERS: Mapping[str, Callable[[Path], Target]] = {
    "index.json": lambda root: _listing(make(root)),
    "segment": lambda root: _header(make(root), "segment"),
    "codes": lambda root: _header(make(root), "codes"),
    "embeddings.json": lambda root: _plan(make(root)),
    "state.json": _state,
    "manifest.json": _manifest,
    "weights.safetensors": lambda root: _tensors(root, "weights.safetensors"),
    "optimizer.safetensors": lambda root: _tensors(root, "optimizer.safetensors"),
}


@cache
def target(name: str) -> Target:
    root = place() / "forged" / name
    root.mkdir(parents=True)
    return MAKERS[name](root)


# -- the row ---------------------------------------------------------------------------------------

ALL = 5_632
"""How many `cases` there are."""

STRIDE = 1_009
"""A prime, so that a few trials are of several files and as many as there are cases are all."""


@cache
def cases() -> list[tuple[str, int]]:
    """Every forgery of every file."""
    return [(name, i) for name in MAKERS for i in range(len(target(name).forged))]


def trials(wanted: Trials) -> Outcome:
    """All forgeries in turn."""
    outcome, every = Outcome(), cases()
    if len(every) != ALL:
        outcome.wrong.append(f"there are {len(every):,} forgeries, and the row tries {ALL:,}")
    for number in wanted.numbers:
        tried(*every[(number + 97 * wanted.seed) * STRIDE % len(every)], outcome)
    return outcome


def tried(name: str, number: int, outcome: Outcome) -> None:
    """One forgery of a file."""
    one = target(name)
    forgery, wanted = one.forged[number], one.wanted
    outcome.tried += 1
    one.write(forgery.text)
    tracemalloc.start()
    began = time.process_time()
    try:
        why = _fault(one, wanted, outcome, name)
    finally:
        took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        one.write(one.real)
    outcome.measured("seconds of processor time", took)
    outcome.measured("MB of Python's memory", peak / 2**20)
    if not why and (took > MOST_SECONDS or peak > MOST_BYTES):
        why = f"took {took:.1f} s and {peak >> 20} MB"
    if why:
        outcome.wrong.append(f"{name}, {forgery.what}: {why}")


def _fault(one: Target, wanted: list[Any], outcome: Outcome, name: str) -> str:
    try:
        found = one.answer()
    except UserError as error:
        outcome.counts[f"{name} refused"] += 1
        said = str(error)
        return "" if "\n" not in said and len(said) < 1_000 else f"not one line: {said[:300]!r}"
    except Exception as error:  # noqa: BLE001  whatever it is, it is no line
        return f"{type(error).__name__}: {str(error)[:300]}"
    outcome.counts[f"{name} answers as the real one"] += 1
    return "" if found in wanted else "another answer"
