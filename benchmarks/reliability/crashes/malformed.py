"""Malformed corpora: pictures, JSONL, csv, parquet, matrices of rows. One line of ELVA's own error
family, with the file and, of what has lines, the line; never another exception.

Half break a known rule at a known place; half are random edits, drawn again where what comes out is
well-formed.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.reliability.crashes.places import place, scratch
from benchmarks.reliability.row import Outcome, Trials
from elva.commands import build_index
from elva.data import Item, load
from elva.data.formats import convert_file
from elva.errors import UserError
from tests.elva import test_data_mbeir as mbeir
from tests.elva.test_data_pictures import NO_PICTURES

MOST_SECONDS = 20.0
"""Ours, of a trial on a busy machine; one takes milliseconds."""

Case = tuple[Callable[[], object], str]
"""What reads a malformed corpus, and how its line begins."""


class Kind(NamedTuple):
    """broken: writes a corpus that breaks a rule; edited: one that was edited at random."""

    broken: Callable[[Path, random.Random], Case]
    edited: Callable[[Path, random.Random], Case]


def edit(data: bytes, draw: random.Random) -> bytes:
    """A few bytes taken out, put in, changed, cut off or doubled."""
    found, at = bytearray(data), draw.randrange(len(data))
    way = draw.randrange(5)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + data[draw.randrange(len(data)) :]
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(found) + 1)
        found[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(1, 4))
    return bytes(found)


# -- a data directory ------------------------------------------------------------------------------


def _toy(root: Path) -> Callable[[], object]:
    mbeir.toy(root)
    return lambda: load(root, tasks=["t2i"], split="test")


def _broken_line(root: Path, draw: random.Random) -> Case:
    read = _toy(root)
    file, line, _ = mbeir.MALFORMED[draw.choice([*mbeir.MALFORMED])]
    path = root / file
    first = path.read_bytes().split(b"\n")[0]
    path.write_bytes(first + b"\n" + line + b"\n")
    return read, f"{path}:2: "


def _edited_line(root: Path, draw: random.Random) -> Case:
    read = _toy(root)
    path = root / draw.choice((mbeir.QUERIES, mbeir.POOL, mbeir.QRELS, mbeir.TSV))
    path.write_bytes(edit(path.read_bytes(), draw))
    return read, str(root)


# -- tables of captions ----------------------------------------------------------------------------

CAPTIONS = [{"file": f"{i}.png", "caption": f"picture {i}", "year": 1990 + i} for i in range(4)]


def _csv(rows: list[dict[str, Any]]) -> bytes:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    return "".join(f"{line}\n" for line in lines).encode()


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


TABLES = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}


def _folder(root: Path, suffix: str, content: bytes) -> Case:
    folder = root / "pictures"
    folder.mkdir(parents=True)
    for i in range(len(CAPTIONS)):
        (folder / f"{i}.png").write_bytes(_picture("PNG"))
    (folder / f"captions.{suffix}").write_bytes(content)
    return lambda: convert_file("folder", folder, root / "data"), str(folder / f"captions.{suffix}")


def _broken_table(suffix: str) -> Callable[[Path, random.Random], Case]:
    def write(root: Path, draw: random.Random) -> Case:
        rows = [dict(row) for row in CAPTIONS]
        row = draw.randrange(len(rows))
        values = ["absent.png", "../0.png", "/etc/passwd", "a\0.png", "https://a.b/0.png", ""]
        rows[row]["file"] = draw.choice(values)
        read, path = _folder(root, suffix, TABLES[suffix](rows))
        place_of = f"row {row + 1}" if suffix == "parquet" else row + 1 + (suffix == "csv")
        return read, f"{path}:{place_of}: "

    return write


def _edited_table(suffix: str) -> Callable[[Path, random.Random], Case]:
    def write(root: Path, draw: random.Random) -> Case:
        return _folder(root, suffix, edit(TABLES[suffix](CAPTIONS), draw))

    return write


# -- pictures --------------------------------------------------------------------------------------

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")


@cache
def _picture(format: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def _bomb(draw: random.Random) -> bytes:
    """A PNG of few bytes that says, rightly, that it has millions of pixels."""
    side = draw.randint(8_100, 60_000)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20), 9)
    chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _item(root: Path, content: bytes) -> Case:
    root.mkdir(parents=True)
    path = root / "a.png"
    path.write_bytes(content)
    return Item("9:1", None, path, "image").load_image, f"9:1: unreadable picture: {path}: "


def _no_picture(root: Path, draw: random.Random) -> Case:
    whole = _picture(draw.choice(FORMATS))
    ways = (
        lambda: _bomb(draw), lambda: draw.choice([*NO_PICTURES.values()]),
        lambda: whole[: draw.randrange(len(whole) // 2)], lambda: draw.randbytes(200),
    )  # fmt: skip
    return _item(root, draw.choice(ways)())


def _edited_picture(root: Path, draw: random.Random) -> Case:
    return _item(root, edit(_picture(draw.choice(FORMATS)), draw))


# -- rows of an index ------------------------------------------------------------------------------


def _matrix(root: Path, rows: bytes, ids: bytes) -> Case:
    root.mkdir(parents=True)
    npy, names = root / "rows.npy", root / "ids.txt"
    npy.write_bytes(rows)
    names.write_bytes(ids)
    return lambda: build_index.build(root / "index", [], npy=npy, ids=names, model="m"), ""


def _npy(rows: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, rows, allow_pickle=True)
    return stream.getvalue()


IDS = b"a\nb\nc\nd\n"
GOOD = np.arange(12, dtype=np.float32).reshape(4, 3) + 1


def _broken_matrix(root: Path, draw: random.Random) -> Case:
    spoilt = GOOD.copy()
    spoilt[draw.randrange(4), draw.randrange(3)] = draw.choice((np.nan, np.inf, -np.inf))
    matrices = (
        GOOD[0], GOOD[None], GOOD.astype(np.int64), GOOD.astype(str), GOOD.astype(object),
        GOOD[:, :0], GOOD + 1j, spoilt, GOOD[:2], np.rec.array([(1.0, 2)] * 4),
    )  # fmt: skip
    ids = (b"", b"a\nb\n", b"a\na\nb\nc\n", b"a\n\nb\nc\n", b"a\nb\nc\n\xff\n", b"a\nb\nc\nd\ne\n")
    if draw.random() < 0.7:
        return _matrix(root, _npy(draw.choice(matrices)), IDS)
    return _matrix(root, _npy(GOOD), draw.choice(ids))


def _edited_matrix(root: Path, draw: random.Random) -> Case:
    return _matrix(root, edit(_npy(GOOD), draw), IDS)


KINDS: Mapping[str, Kind] = {
    "data directory": Kind(_broken_line, _edited_line),
    **{f"captions.{s}": Kind(_broken_table(s), _edited_table(s)) for s in TABLES},
    "picture": Kind(_no_picture, _edited_picture),
    "rows of an index": Kind(_broken_matrix, _edited_matrix),
}


# -- the row ---------------------------------------------------------------------------------------


def trials(wanted: Trials) -> Outcome:
    """Malformed corpora, kinds in turn, broken ones and edited ones."""
    outcome = Outcome()
    place()
    for number in wanted.numbers:
        name = [*KINDS][number % len(KINDS)]
        edited = number // len(KINDS) % 2 == 1
        draw = random.Random(f"{wanted.seed} {number}")
        outcome.tried += 1
        if why := _fault(KINDS[name], edited, draw, outcome):
            how = "edited" if edited else "broken"
            outcome.wrong.append(f"seed {wanted.seed} number {number} ({how} {name}): {why}")
        else:
            outcome.counts[f"{name} refused"] += 1
    return outcome


def _fault(kind: Kind, edited: bool, draw: random.Random, outcome: Outcome) -> str:
    """What went wrong; "" where it was refused as it should be."""
    while True:
        with scratch() as there:
            read, start = (kind.edited if edited else kind.broken)(there / "corpus", draw)
            began = time.monotonic()
            try:
                read()
            except UserError as error:
                said = str(error)
                outcome.measured("seconds of a trial", time.monotonic() - began)
                if time.monotonic() - began > MOST_SECONDS:
                    return f"took {time.monotonic() - began:.1f} s: {said}"
                return _line_fault(said, start, str(there))
            except Exception as error:  # noqa: BLE001  whatever it is, it is no line
                return f"{type(error).__name__}: {error}"
        if not edited:
            return f"accepted, and should be refused at {start}"
        outcome.counts["edits that left it well-formed, drawn again"] += 1


def _line_fault(said: str, start: str, there: str) -> str:
    if "\n" in said or not said.startswith(start):
        return f"another line than {start}...: {said}"
    if re.search(r"\b(Traceback|Error\()", said) or not (there in said or said.startswith("index")):
        return f"no place: {said}"
    return ""
