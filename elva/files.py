"""Files and directories that appear whole and synced, or leave what was there as it was.

Every file here goes through `os.open`, `os.write`, `os.pwrite`, `os.fsync` and `os.replace`, so a
test that makes the n-th of them fail has covered every place where a disk can.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from elva.errors import MAX_MESSAGE, UserError, printable
from elva.settings import JSON_BYTES, FileSize, Places, Sha256, build, read_json

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
    make_directory(path.parent)
    partial = path.with_name(path.name + PARTIAL)
    descriptor = _own(partial)
    try:
        sink = Sink(path, descriptor)
        yield sink
        with _named(f"{path} at byte {sink.size:,}"):
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """The system does not say of which file an error of a descriptor is."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, where) from error


def _own(partial: Path) -> int:
    """A new file that this call alone writes, locked while it does.

    What lies there is never written to: another writer is waited for, and what a killed one left
    or anybody planted there (a link, a pipe) is removed.
    """
    new, seen = os.O_WRONLY | os.O_CREAT | os.O_EXCL, os.O_RDONLY | os.O_NONBLOCK
    while True:
        try:
            with _can_be_made(partial):
                descriptor, made = os.open(partial, new | os.O_NOFOLLOW, 0o666), True
        except FileExistsError:
            try:
                descriptor, made = os.open(partial, seen | os.O_NOFOLLOW), False
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                partial.unlink(missing_ok=True)
                continue
        locked = False
        try:
            locked = lock(partial, descriptor)
            if locked and not made:
                partial.unlink()
        finally:
            if not (locked and made):
                os.close(descriptor)
        if locked and made:
            return descriptor


def lock(path: Path, descriptor: int, *, wait: bool = True) -> bool:
    """Lock an open file; False where the path names another by then, which was not locked.

    Raises:
        BlockingIOError: another holds it, and `wait` is False.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def open_regular(path: Path) -> tuple[int, int]:
    """A descriptor of a regular file, to read, and its size; OSError for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        return descriptor, found.st_size
    os.close(descriptor)
    code = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
    raise OSError(code, os.strerror(code), str(path))


def read_bounded(path: Path, most: int) -> bytes:
    """A regular file's bytes; OSError where it is none or has more than `most`."""
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as file:
        if size > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return file.read(most)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, where they are not there; UserError where what it would
    lie in takes none (/proc)."""
    with _can_be_made(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _can_be_made(path: Path) -> Iterator[None]:
    """A new name that the system does not find is one that its place does not take."""
    try:
        yield
    except FileNotFoundError as error:
        name = str(path).removesuffix(PARTIAL)
        raise UserError(f"{name}: cannot be made there; choose another place") from error


def check_file(path: Path, what: str) -> None:
    """UserError or OSError, before work starts, for a file that cannot be written; nothing is left
    behind. `what` names it: an option."""
    if path.is_dir():
        raise UserError(f"{what}: must be a file, got the directory {path}; name a file in it")
    partial = path.with_name(path.name + PARTIAL)
    with _tried(path.parent):
        os.close(_own(partial))
        partial.unlink()


def check_directory(final: Path) -> None:
    """As `check_file`, of what `write_directory` makes."""
    if not final.name:
        raise UserError(f"{final}: must be a directory by its name; choose a new one")
    partial = final.with_name(final.name + PARTIAL)
    with _tried(final.parent):
        os.close(_own_directory(partial))
        partial.rmdir()


@contextmanager
def _tried(parent: Path) -> Iterator[None]:
    """A directory for the length of a block, with those above it."""
    new = [place for place in (parent, *parent.parents) if not place.exists()]
    try:
        make_directory(parent)
        yield
    finally:
        for place in new:
            with suppress(OSError):
                place.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by the given bytes, or leave it as it was."""
    with replacing(path) as sink:
        sink.write(content)


def write_text(path: Path, text: str) -> None:
    """Replace a file by the given text in UTF-8, or leave it as it was."""
    write_bytes(path, text.encode("utf-8"))


def append_text(path: Path, text: str) -> None:
    """Append to a file, or leave it as it was; an error names it and how far it came."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        sink = Sink(path, descriptor)
        sink.size = before = os.fstat(descriptor).st_size
        try:
            sink.write(text.encode("utf-8"))
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


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
        with _named(str(path)):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- directories -----------------------------------------------------------------------------------


def write_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary sibling, then make it `final` in one step.

    Raises:
        OSError: the disk is full or not writable; `final` is untouched and the sibling removed.
        UserError: another process writes it.
    """
    partial = final.with_name(final.name + PARTIAL)
    descriptor = _own_directory(partial)
    try:
        fill(partial)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {
            str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _sync_hash(p)}
            for p in files
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():
            raise UserError(f"{final}: must not exist yet; choose another directory")
        os.rename(partial, final)
        sync_directory(final.parent)
    except BaseException as error:
        came = _came(partial)
        shutil.rmtree(partial, ignore_errors=True)
        if (code := _code(error)) is None:
            raise
        raise OSError(code, os.strerror(code), f"{final} at byte {came:,}") from error
    finally:
        os.close(descriptor)


def _code(error: BaseException) -> int | None:
    """The system's number of an error of a write that does not say of which file: a library's, or
    safetensors' or tokenizers', which hide the number in its text; None of every other error."""
    if isinstance(error, OSError) and error.filename is None:
        return error.errno
    hides = type(error) in (SafetensorError, Exception)  # tokenizers' have no type of their own
    found = re.search(r"\(os error (\d+)\)", str(error)) if hides else None
    return None if found is None else int(found[1])


def _came(directory: Path) -> int:
    """Bytes that a directory's files have."""
    with suppress(OSError):
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return 0


def _own_directory(partial: Path) -> int:
    """A new directory that this call alone fills, locked while it does; what a killed writer left
    there is removed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    make_directory(partial.parent)
    while True:
        made = True
        try:
            with _can_be_made(partial):
                partial.mkdir()
        except FileExistsError:
            made = False
        try:
            descriptor = os.open(partial, flags)
        except FileNotFoundError:
            continue  # another's, which is whole by now
        except NotADirectoryError:  # a link or a file: nobody's here
            partial.unlink(missing_ok=True)
            continue
        except OSError:
            if made:
                partial.rmdir()
            raise
        owned = False
        try:
            locked = lock(partial, descriptor, wait=False)
            if locked and not made:  # else another's by now
                shutil.rmtree(partial)
            owned = locked and made
        except BlockingIOError:
            raise UserError(
                f"{partial.with_name(partial.name.removesuffix(PARTIAL))}: must have one writer at "
                "a time, got a second; wait for the other"
            ) from None
        finally:
            if not owned:
                os.close(descriptor)
        if owned:
            return descriptor


def is_whole(directory: Path) -> bool:
    """Whether every file of the manifest is there with its size and hash."""
    return fault(directory) is None


@dataclass(frozen=True)
class _Listed:
    bytes: FileSize
    sha256: Sha256


LOADED = (".safetensors", ".json", ".bin", ".pt", ".py")
"""Files that change what a directory is loaded as: not there unless the manifest lists them."""


def listed(directory: Path) -> Mapping[str, _Listed]:
    """The manifest's files; UserError where it is none that `write_directory` writes."""
    places = Places(MANIFEST)
    try:
        data = read_json(read_bounded(directory / MANIFEST, JSON_BYTES), places)
    except OSError as error:
        places.refuse("", f"must be readable, got {error.strerror}")
    found: Mapping[str, _Listed] = build(Mapping[str, _Listed], data, places)
    for name in found:
        if not name or "\\" in name or "\0" in name or name != os.path.normpath(name) or (
            name.startswith(("/", ".."))
        ):  # fmt: skip
            places.refuse("", "must list files under it by their plain names", name)
    return found


def fault(directory: Path) -> str | None:
    """What of a directory is not as its manifest says; None: nothing."""
    try:
        wanted = listed(directory)
    except UserError:
        return f"no readable {MANIFEST}"
    for name, entry in wanted.items():
        path, shown = directory / name, printable(name)[:MAX_MESSAGE]
        try:
            there = path.stat().st_size if path.is_file() else None
        except OSError as error:  # a name that no file has
            return f"{shown} is missing, {error.strerror}"
        if there is None:
            return f"{shown} is missing"
        if there != entry.bytes:
            return f"{shown} has {there:,} bytes, {entry.bytes:,} were written"
        if sha256(path) != entry.sha256:
            return f"{shown} has another SHA-256"
    for path in sorted(p for p in directory.rglob("*") if p.suffix in LOADED):
        name = str(path.relative_to(directory))
        if name not in wanted and name != MANIFEST:
            return f"{printable(name)} is not listed in {MANIFEST}"
    return None


def swap_directory(final: Path, fill: Callable[[Path], None], scratch: str) -> None:
    """Let `fill` make a directory, then put it in the place of `final`, whatever that held.

    Args:
        scratch: begins the names of what a killed writer leaves beside `final`.

    Raises:
        OSError: the disk is full or not writable; `final` is as it was.
    """
    make_directory(final.parent)
    # Beside `final`, so that both are on one file system and a rename is atomic.
    with tempfile.TemporaryDirectory(prefix=scratch, dir=final.parent) as beside:
        building = Path(beside) / "new"
        fill(building)
        there = final.exists()
        if there:
            os.rename(final, Path(beside) / "old")
        try:
            os.rename(building, final)
        except OSError:
            if there:
                os.rename(Path(beside) / "old", final)
            raise


def _sync_hash(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)
