"""Where a converted data directory keeps pictures: under their own names, or under numbers."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

from elva.data.schema import Item
from elva.data.strict import Record
from elva.errors import DataError

SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "HEIF": ".heic"}
"""By format, where it is not the format's own name."""


class Places:
    """The pictures of a data directory.

    Args:
        root: Of the directory.
        dataset: Its name, of which the pictures' folder has its own.
    """

    def __init__(self, root: Path, dataset: str) -> None:
        self.root, self.folder = root, Path("mbeir_images") / f"{dataset}_images"
        self._places: dict[bytes | str, str] = {}
        self._numbered = 0
        self._taken: set[int] = set()

    def __len__(self) -> int:
        return len(self._places)

    def key(self, image: Path | bytes, name: str | None, where: str) -> tuple[bytes | str, str]:
        """What tells a picture from others, and the ending of its file: its name and none, or the
        SHA-256 of its bytes and its format's.

        Raises:
            DataError: by its header it is no picture.
        """
        kind = Item("", None, image, "image", where=where).image_format()
        if name is not None:
            return name, ""
        content = image if isinstance(image, bytes) else image.read_bytes()
        return hashlib.sha256(content).digest(), SUFFIXES.get(kind, f".{kind.lower()}")

    def number(self, name: str, most: int) -> int:
        """A number from 1 that a name keeps when others come or go, or the next free one."""
        digest = hashlib.sha256(name.encode()).digest()
        number = int.from_bytes(digest[:8], "big") % most + 1
        while number in self._taken:
            number = number % most + 1
        self._taken.add(number)
        return number

    def put(self, image: Path | bytes, key: bytes | str, suffix: str) -> str:
        """Put a picture into the directory once; its path there.

        Args:
            key, suffix: As `key` gives them.
        """
        if key not in self._places:
            place = self._own(key) if isinstance(key, str) else None
            if place is None or not self._written(image, place):
                place = self._next(suffix or (image.suffix if isinstance(image, Path) else ""))
                self._write(image, self.root / place)
            self._places[key] = place
        return self._places[key]

    def _written(self, image: Path | bytes, place: str) -> bool:
        """Whether the file system has the name."""
        try:
            self._write(image, self.root / place)
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ):
                raise
            return False
        return True

    def _write(self, image: Path | bytes, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            place.write_bytes(image)
        else:
            copy(image, place)

    def _own(self, name: str) -> str | None:
        """The path of a picture's own name; None where no reader takes it or something lies there,
        as where capitals do not count."""
        place = f"{self.folder.as_posix()}/{name}"
        try:
            Record("", {"path": place}).path("path")
        except DataError:
            return None
        return None if os.path.lexists(self.root / place) else place

    def _next(self, suffix: str) -> str:
        """The path of the next number."""
        while True:
            place = self.folder / f"{self._numbered // 1000:04d}" / f"{self._numbered:07d}{suffix}"
            self._numbered += 1
            if not os.path.lexists(self.root / place):
                return place.as_posix()


def copy(path: Path, place: Path) -> None:
    """Link a file to a second place, or copy it to another file system or one without links."""
    try:
        os.link(path.resolve(), place)
    except OSError:
        shutil.copyfile(path, place)
