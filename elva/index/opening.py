"""What a manifest names, opened and compared with what the manifest says of it."""

from pathlib import Path

from elva.errors import IndexFault
from elva.index import manifest
from elva.index.blocks import damaged
from elva.index.codes import SegmentCodes
from elva.index.manifest import SEGMENTS, Entry, Manifest
from elva.index.segment import Segment


def opened(
    directory: Path,
) -> tuple[Manifest, list[Segment], list[SegmentCodes | None]]:
    """An index's manifest, segments and codes, all of one moment.

    Raises:
        IndexFault: no index there, or one of them is not what the manifest names.
    """
    while True:
        found = manifest.read(directory)
        try:
            parts = [part(directory, found, entry) for entry in found.segments]
            both = zip(found.segments, parts, strict=True)
            return found, parts, [_codes_of(directory, entry, one) for entry, one in both]
        except IndexFault:
            if manifest.read(directory) == found:
                raise  # else replaced while it was being opened


def part(directory: Path, found: Manifest, entry: Entry) -> Segment:
    """An entry's segment; what an entry says of its rows is believed after the file has said it."""
    one = Segment(directory / SEGMENTS / entry.file)
    known = (found.dim, found.dtype, entry.rows, entry.header)
    if (one.dim, one.dtype, one.rows, one.header_sum) != known or not one.model.matches(
        found.model
    ):
        raise damaged(one.path, f"the header that {directory} knows")
    try:
        entry.alive()
    except ValueError:
        raise damaged(directory / manifest.FILE, "a bit for each deleted row") from None
    return one


def has_codes(directory: Path, entry: Entry, one: Segment) -> bool:
    """Whether an entry's codes are there, every byte of them."""
    try:
        found = _codes_of(directory, entry, one)
        if found is not None:
            found.verify()
    except IndexFault:
        return False
    return found is not None


def _codes_of(directory: Path, entry: Entry, one: Segment) -> SegmentCodes | None:
    """The codes of an entry's segment, where it has any."""
    if entry.codes is None:
        return None
    found = SegmentCodes(directory / SEGMENTS / entry.codes_file)
    if found.header_sum != entry.codes:
        raise damaged(found.path, f"the header that {directory} knows")
    found.check_of(one)
    return found
