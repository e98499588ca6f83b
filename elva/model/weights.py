"""What lies in a model's weight files, by their content: a name or a note beside them proves
nothing."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from elva.errors import UserError
from elva.files import cache_directory, read_bounded, sha256, write_text
from elva.settings import JSON_BYTES, Places, Sha256, build, read_json

LARGE = 64 << 20
"""Ours: what is smaller is hashed in less time than the cache is worth."""

SETTLED_NS = 2_000_000_000
"""Ours: a file that changed so lately may change once more within one tick of the clock."""


@dataclass(frozen=True)
class _Known:
    """A file as it was when it was hashed. A writer may set its time of modification, not that of
    its last change."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int
    device: int
    sha256: Sha256


def hash_of_files(directory: Path, files: Sequence[Path]) -> str | None:
    """A hash of what a directory's weight files hold; None where there is no such directory.

    Raises:
        UserError: the directory holds none: other formats run code when they are read.
    """
    if not directory.is_dir():
        return None
    if not files:
        raise UserError(
            f"{directory}: must hold its weights as .safetensors, got none; load and save it "
            "again by save_pretrained()"
        )
    return hashlib.sha256("".join(map(content_hash, files)).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """The SHA-256 of a file; of a large one kept in the cache until anything about it differs."""
    found = os.stat(path)
    if found.st_size < LARGE:
        return sha256(path)
    stamp = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
    place = cache_directory() / "digests" / f"{name}.json"
    with suppress(OSError, UserError):  # not there, or not readable: hashed anew
        data = read_json(read_bounded(place, JSON_BYTES), Places(""))
        known: _Known = build(_Known, data, Places(""))
        if known == _Known(*stamp, known.sha256):
            return known.sha256
    digest = sha256(path)
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_NS:
        with suppress(OSError):  # a cache that cannot be written costs time alone
            write_text(place, json.dumps(asdict(_Known(*stamp, digest))) + "\n")
    return digest
