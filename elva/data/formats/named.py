"""The pictures of a folder by the names under which people's tables know them."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from elva.data.strict import Record


class Named:
    """Pictures by the names that tables have for them.

    Args:
        root: The folder that all lie in.
        pictures: Paths under it.
    """

    def __init__(self, root: Path, pictures: Sequence[Path]) -> None:
        self.root, self.pictures = root, pictures

    def called(self, name: str, base: Path) -> list[Path]:
        """The pictures that a name may mean: its path from the table's folder or from the root, or
        those below the table that are called so; then without regard to letters' case and form."""
        name = _slashed(name)
        places = [f"{self._under(base)}{name}", name]
        loose = [_loose(place) for place in places]
        return (
            next((f for place in places if (f := self._paths.get(place))), None)
            or [p for p in self._names.get(name, []) if p.is_relative_to(base)]
            or next((f for place in loose if (f := self._loose_paths.get(place))), None)
            or [p for p in self._loose_names.get(loose[-1], []) if p.is_relative_to(base)]
        )

    def find(self, record: Record, name: str, base: Path) -> Path:
        """The picture of a name.

        Raises:
            DataError: none, or several.
        """
        found = self.called(name, base)
        if len(found) > 1:
            which = " and ".join(repr(p.relative_to(self.root).as_posix()) for p in found[:2])
            record.fail(f"{name!r} lies in several folders: {which}")
        if found:
            return found[0]
        if any((place / _slashed(name)).is_file() for place in (base, self.root)):
            record.fail(f"{name!r} is no picture that is read")
        return record.fail(f"no such picture: {name!r}")

    def _under(self, path: Path) -> str:
        """A folder below the root as the beginning of a path."""
        below = path.relative_to(self.root).as_posix()
        return "" if below == "." else f"{below}/"

    @cached_property
    def _paths(self) -> dict[str, list[Path]]:
        return self._by(lambda path: path.relative_to(self.root).as_posix())

    @cached_property
    def _names(self) -> dict[str, list[Path]]:
        return self._by(lambda path: path.name)

    @cached_property
    def _loose_paths(self) -> dict[str, list[Path]]:
        return self._by(lambda path: _loose(path.relative_to(self.root).as_posix()))

    @cached_property
    def _loose_names(self) -> dict[str, list[Path]]:
        return self._by(lambda path: _loose(path.name))

    def _by(self, key: Callable[[Path], str]) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = defaultdict(list)
        for path in self.pictures:
            found[key(path)].append(path)
        return found


def _slashed(name: str) -> str:
    return re.sub(r"^(\./)+", "", name.replace("\\", "/").strip())


def _loose(name: str) -> str:
    """A name without case, in one Unicode form: macOS writes `ü` as two characters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
