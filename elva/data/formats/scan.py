"""What lies under a folder: its pictures by their own names, and all else with why it is left out.

Nothing is opened: a picture is what its name's ending says until somebody reads it.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from elva.data.schema import Item
from elva.errors import DataError, counted, printable
from elva.files import sha256, write_text

_ENDINGS = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif",
}  # fmt: skip
"""Of a picture's file."""

_CONVERTED = "mbeir_images"
_THUMBNAILS = {".thumbnails", ".thumbs", "@eadir"}
_SYSTEM = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
"""What systems, servers and archives leave beside pictures, in small letters."""

_WHY = {
    "formats": "of formats that are not read",
    "HEIF": "HEIC pictures; pip install 'elva[heif]' to read them",
    "AVIF": "AVIF pictures, which this Pillow cannot read; pip install 'pillow>=11.3'",
    "large": "too large or too long a picture",
    "damaged": "damaged",
    "duplicates": "that show what another picture shows",
    "hidden": "hidden files of systems and tools",
    "thumbnails": "thumbnails that a tool keeps",
    "converted": "pictures in data directories of elva's own",
    "links_out": "links that lead out of the folder",
    "links_to_folders": "links to its own folders, whose files are read where they lie",
    "links_broken": "links that lead nowhere",
    "names": "names that are not UTF-8; rename them, e.g. with convmv",
    "no_files": "pipes, sockets and devices",
    "closed": "folders that cannot be opened",
}
"""Why something is left out, by the key under which it is listed."""

ONE = {
    "formats": "of a format that is not read",
    "HEIF": "HEIC picture; pip install 'elva[heif]' to read it",
    "AVIF": "AVIF picture, which this Pillow cannot read; pip install 'pillow>=11.3'",
    "duplicates": "that shows what another picture shows",
    "hidden": "hidden file of systems and tools",
    "thumbnails": "thumbnail that a tool keeps",
    "converted": "picture in a data directory of elva's own",
    "links_out": "link that leads out of the folder",
    "links_to_folders": "link to its own folders, whose files are read where they lie",
    "links_broken": "link that leads nowhere",
    "names": "name that is not UTF-8; rename it, e.g. with convmv",
    "no_files": "pipe, socket or device",
    "closed": "folder that cannot be opened",
}
"""The same of a single file, where it reads otherwise."""

_MOST_ENDINGS = 12
"""Ours: endings that one line names."""


@dataclass(frozen=True)
class PictureFile:
    """A picture's file, unopened.

    Args:
        name: Its path under the folder, with `/`: UTF-8, otherwise any characters.
        path: Where it lies.
        size: Bytes.
        modified_ns: When it was last changed, in nanoseconds since 1970.
    """

    name: str
    path: Path
    size: int
    modified_ns: int

    def digest(self) -> str:
        """The SHA-256 of its bytes, in hexadecimal; DataError where it cannot be read."""
        try:
            return sha256(self.path)
        except OSError as error:
            raise DataError(f"{printable(self.name)}: {error.strerror}") from error

    def is_still_there(self) -> bool:
        """Whether a file of its size and time of change lies there."""
        try:
            now = self.path.stat()
        except OSError:
            return False
        return (now.st_size, now.st_mtime_ns) == (self.size, self.modified_ns)

    def item(self) -> Item:
        """The picture under its own name, to embed."""
        return Item(self.name, None, self.path, "image", where=printable(self.name))


@dataclass
class Scan:
    """What lies under a folder.

    Args:
        root: The folder as it was named.
        pictures: In the order of their names.
        others: Names of files that are no pictures, captions among them.
        left_out: Key of `_WHY` -> names.
    """

    root: Path
    pictures: list[PictureFile] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, why: str, *names: str) -> None:
        """Note that something is not among the pictures."""
        if names:
            self.left_out.setdefault(why, []).extend(names)


def scan(root: Path) -> Scan:
    """Every picture under a folder, its subfolders included, by its path under it.

    Not followed are links to folders and links out of the folder; passed over are what begins with
    a dot and what tools keep. All of it is in `left_out`.

    Returns:
        Scan: `pictures` with name, size and time of change, unopened; `PictureFile.digest` tells
        one content from another, `PictureFile.item` is what an encoder takes.

    Raises:
        DataError: `root` is no folder, or cannot be opened.
    """
    if not root.is_dir():
        raise DataError(f"{printable(str(root))}: not a folder")
    found, inside = Scan(root), root.resolve()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except OSError as error:
            if folder == root:
                raise DataError(f"{printable(str(root))}: {error.strerror}") from error
            found.leave_out("closed", _name(found.root, folder))
            continue
        for entry in entries:
            if _sorted_in(found, entry, inside):
                folders.append(Path(entry.path))
    found.pictures.sort(key=lambda picture: picture.name)
    found.others.sort()
    for names in found.left_out.values():
        names.sort()
    return found


def _sorted_in(found: Scan, entry: os.DirEntry[str], inside: Path) -> bool:
    """Put an entry where it belongs; whether it is a folder to look into.

    Args:
        inside: The folder, links to it resolved.
    """
    name, small = _name(found.root, Path(entry.path)), entry.name.casefold()
    is_folder = entry.is_dir(follow_symlinks=False)
    if why := _kept_by_a_tool(small):
        found.leave_out(why, *(_below(found.root, entry.path) if is_folder else [name]))
        return False
    if is_folder:
        return True
    if entry.is_symlink() and (why := _link(inside, Path(entry.path))):
        found.leave_out(why, name)
        return False
    try:
        about = entry.stat()
    except OSError:  # gone since it was listed
        found.leave_out("links_broken", name)
        return False
    if not stat.S_ISREG(about.st_mode):
        found.leave_out("no_files", name)
    elif not _is_text(name):
        found.leave_out("names", name)
    elif PurePosixPath(name).suffix.lower() in _ENDINGS:
        found.pictures.append(PictureFile(name, Path(entry.path), about.st_size, about.st_mtime_ns))
    else:
        found.others.append(name)
    return False


def _kept_by_a_tool(small: str) -> str | None:
    """Why something of this name, in small letters, is no picture of a person's."""
    if small == _CONVERTED:
        return "converted"
    if small in _THUMBNAILS:
        return "thumbnails"
    return "hidden" if small in _SYSTEM or small.startswith(".") else None


def _link(root: Path, path: Path) -> str | None:
    """Why a link is not followed; None for one to a file in the folder."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        return "links_broken"
    if not target.is_relative_to(root):
        return "links_out"
    return "links_to_folders" if target.is_dir() else None


def _below(root: Path, folder: str) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        yield from (_name(root, Path(place, name)) for name in names)


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _is_text(name: str) -> bool:
    """Whether a file's name is UTF-8: others cannot be written into a line of JSON."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def lines(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """One line a kind of what is left out: its count, its reason and, of formats, the endings."""
    kinds = [(why, names) for why in _WHY if (names := left_out.get(why))]
    return [
        f"left out: {counted(len(names), ONE.get(why, _WHY[why]), _WHY[why])}"
        + (f": {_endings(names)}" * (why == "formats"))
        for why, names in kinds
    ]


def write_list(path: Path, left_out: Mapping[str, Sequence[str]]) -> None:
    """Write what is left out, a line a file: why, a tab, and the name as one line."""
    write_text(
        path,
        "".join(f"{_WHY[why]}\t{printable(n)}\n" for why in _WHY for n in left_out.get(why, ())),
    )


def _endings(names: Sequence[str]) -> str:
    counts = Counter(PurePosixPath(name).suffix.lower() or "without an ending" for name in names)
    parts = [f"{count:,} {printable(ending)}" for ending, count in counts.most_common()]
    more = len(parts) - _MOST_ENDINGS
    return ", ".join(parts[:_MOST_ENDINGS]) + (f" and {more:,} more endings" if more > 0 else "")
