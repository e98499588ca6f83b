"""What rows compile: once, and kept in ELVA's cache until a source or a flag is another."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from elva.files import cache_directory

ROOT = Path(__file__).resolve().parents[2]


def kept(name: str, how: str, *mains: Path, make: Callable[[Path], object]) -> Path:
    """The folder that `make` has filled from csrc, but for CUDA's, and `mains`.

    Args:
        name: of the folder, before its digest; earlier folders of that name are removed.
        how: the flags, and whatever else the content depends on.
    """
    digest = hashlib.sha256(how.encode())
    for path in (*sorted((ROOT / "csrc").rglob("*")), *mains):
        if path.is_file() and path.parent.name != "cuda":
            place = path.relative_to(ROOT)  # so that clones of one state share it
            digest.update(f"\n{place} {path.stat().st_size}\n".encode() + path.read_bytes())
    home = cache_directory() / "reliability"
    folder = home / f"{name}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    for old in home.glob(f"{name}-*"):
        if old.name.rpartition("-")[0] == name:
            shutil.rmtree(old, ignore_errors=True)
    building = Path(tempfile.mkdtemp(dir=home, prefix=".building-"))
    try:
        make(building)
        os.rename(building, folder)
    except OSError:  # another process was first
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder
