"""Files and directories that appear whole and synced, or leave what was there as it was.

Every file here goes through `os.open`, `os.write`, `os.pwrite`, `os.fsync` and `os.replace`, so a
test that makes the n-th of them fail has covered every place where a disk can.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial"  # after a name: not whole yet, or what a killed process left
MANIFEST = "manifest.json"
"""Written last into a directory: the size and SHA-256 of each of its files."""


class Sink:
    """A file being written."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor, self.size = path, descriptor, 0

    def write(self, content: bytes | memoryview) -> None:
        """Append; an error names the file and how far it came."""
        rest = memoryview(content).cast("B")
        try:
            while rest:
                done = os.write(self.descriptor, rest)
                self.size += done
                rest = rest[done:]
        except OSError as error:
            where = f"{self.path} at byte {self.size:,}"
            raise OSError(error.errno, error.strerror, where) from error

    def write_start(self, content: bytes) -> None:
        """Overwrite the first bytes."""
        try:
            os.pwrite(self.descriptor, content, 0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self.path} at byte 0") from error


@contextmanager
def replacing(path: Path) -> Iterator[Sink]:
    """Write a file beside `path`, sync it, and put it in its place when the block ends well.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was, and nothing lies beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            yield Sink(path, descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by the given bytes, or leave it as it was."""
    with replacing(path) as sink:
        sink.write(content)


def write_text(path: Path, text: str) -> None:
    """Replace a file by the given text in UTF-8, or leave it as it was."""
    write_bytes(path, text.encode("utf-8"))


def cache_directory() -> Path:
    """Where ELVA keeps what it can make again."""
    for variable, folder in (("ELVA_CACHE", "."), ("XDG_CACHE_HOME", "elva")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).absolute() / folder
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "elva"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "elva"
    return Path.home() / ".cache" / "elva"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while content := file.read(1 << 22):
            digest.update(content)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory as lasting as the files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- directories -----------------------------------------------------------------------------------


def write_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary sibling, then make it `final` in one step.

    Raises:
        OSError: the disk is full or not writable; `final` is untouched and the sibling removed.
    """
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {
            str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _sync_hash(p)}
            for p in files
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():
            raise FileExistsError(f"{final}: must not exist yet; choose another directory")
        os.rename(partial, final)
        sync_directory(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors hides the system's error number in its text; callers want the real thing.
        number = (
            re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        )
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(final)) from error


def is_whole(directory: Path) -> bool:
    """Whether every file of the manifest is there with its size and hash."""
    return fault(directory) is None


def fault(directory: Path) -> str | None:
    """What of a directory is not as its manifest says; None: nothing."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    for name, (size, digest) in wanted.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if (there := path.stat().st_size) != size:
            return f"{name} has {there:,} bytes, {size:,} were written"
        if sha256(path) != digest:
            return f"{name} has another SHA-256"
    return None


def swap_directory(final: Path, fill: Callable[[Path], None], scratch: str) -> None:
    """Let `fill` make a directory, then put it in the place of `final`, whatever that held.

    Args:
        scratch: begins the names of what a killed writer leaves beside `final`.

    Raises:
        OSError: the disk is full or not writable; `final` is as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # Beside `final`, so that both are on one file system and a rename is atomic.
    with tempfile.TemporaryDirectory(prefix=scratch, dir=final.parent) as beside:
        building = Path(beside) / "new"
        fill(building)
        if final.exists():
            os.rename(final, Path(beside) / "old")
        os.rename(building, final)


def _sync_hash(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)
