"""An index and embeddings whose files somebody else writes anew, every checksum right."""

import hashlib
import json
import os
import struct

from elva.index import Index, blocks, segment
from elva.index.embeddings import Embeddings
from elva.model.identity import Identity
from tests.elva.forgeries import changed

MODEL = Identity("a model", "revision", "preprocessing")
ABOUT = {"model": "m", "read": "at_ret", "folder": "/s", "max_completion_length": 0,
         "instructions": {"text": "Find it."}}  # fmt: skip


def make(root, rows):
    """An index `i` of two segments, one with a deleted row, and an embedded pool `e` of a shard."""
    names = [f"item {i}" for i in range(10)]
    index = Index.build(root / "i", names, rows, model=MODEL, columns={"year": [*range(10)]},
                        about=ABOUT)  # fmt: skip
    index = index.add(["late"], rows[:1] + 1, model=MODEL, columns={"year": [11]})
    index.delete(["item 2"])
    plan = Embeddings(root / "e", 10, 16, MODEL, {**ABOUT, "side": "queries"})
    plan.save()
    plan.shards[0].parent.mkdir()
    os.link(index.segments[0].path, plan.shards[0])
    return root


def answer(place, rows):
    """What the index says to its own rows, and of how many."""
    index = Index(place / "i")
    return [index.ids(r.tolist()) for r in index.search(rows, 3).rows], len(index)


def manifest(place):
    """The fields of the manifest."""
    return json.loads((place / "i" / "index.json").read_bytes().split(b"\n")[0])


def write_manifest(place, body):
    """Another manifest, with its checksum."""
    digest = hashlib.sha256(body).hexdigest().encode()
    (place / "i" / "index.json").write_bytes(body + b"\n" + digest + b"\n")


class Header:
    """The header of the first segment, or of its codes, and the manifest that names it."""

    def __init__(self, place, part):
        index = Index(place / "i")
        self.place, self.part, self.manifest = place, part, manifest(place)
        self.path = index.segments[0].path if part == "segment" else index.codes[0].path
        self.content = self.path.read_bytes()
        (length,) = struct.unpack("<Q", self.content[8:16])
        self.text = self.content[48 : 48 + length]
        self.fields = json.loads(self.text)

    def write(self, text):
        """Another header's text, so that nothing but its fields is wrong; the file's path."""
        text = text[: blocks.HEADER_BYTES - 48]
        digest = hashlib.sha256(text).digest()
        start = self.content[:8] + struct.pack("<Q", len(text)) + digest + text
        path, key = self.path, "header"
        if self.part == "codes":  # which are named after their header
            name = f"{path.name.split('.')[0]}.{digest.hex()[:16]}.codes"
            path, key = path.with_name(name), "codes"
        path.write_bytes(start.ljust(blocks.HEADER_BYTES, b"\0") + self.content[4096:])
        body = changed(self.manifest, ("segments", 0, key), digest.hex())
        write_manifest(self.place, json.dumps(body).encode())
        return path


def write_table(place, table):
    """The first segment with another table behind its rows; the new file's path."""
    one = segment.Segment(Index(place / "i").segments[0].path)
    body = one.content[4096 : 4096 + one.rows * one.dim * 2].tobytes() + table
    (length,) = struct.unpack("<Q", one.content[8:16])
    header = json.loads(one.content[48 : 48 + length].tobytes())
    sums = hashlib.sha256(body).digest()
    header |= {"table_bytes": len(table), "sums": hashlib.sha256(sums).hexdigest()}
    text = json.dumps(header).encode()
    start = segment.MAGIC + struct.pack("<Q", len(text)) + hashlib.sha256(text).digest() + text
    target = place / "forged.elva"
    target.write_bytes(start.ljust(blocks.HEADER_BYTES, b"\0") + body + sums)
    return target
