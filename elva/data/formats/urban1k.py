"""Urban-1k (Zhang et al., Long-CLIP, arXiv:2403.15378): 1,000 pictures, a long caption of each.

A folder of `image/<n>.jpg` and `caption/<n>.txt`. The caption is the file's first line, as in
Long-CLIP's own evaluation.
"""

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.flickr30k import PROMPTS
from elva.data.formats.source import Entry, Example, Reference, Request, Source
from elva.data.schema import Item
from elva.data.strict import Faults, lines
from elva.errors import DataError, counted

_Pair = tuple[Entry, Entry]
"""A picture and its caption."""


def read(request: Request) -> Source:
    """Each picture and its caption, each asking for the other."""
    request.check_split("test")
    images, captions = request.path / "image", request.path / "caption"
    for folder in (images, captions):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; Urban-1k has image and caption")
    notices: list[str] = []
    found = list(_pairs(images, captions, request.faults, notices))
    if not found:
        raise DataError(f"{request.path}: holds no captioned picture")
    return Source(
        "urban1k", 18, "", _examples(found), corpus=[one for pair in found for one in pair],
        prompts=PROMPTS, shares_answers=False, notices=notices,
    )  # fmt: skip


def _examples(found: list[_Pair]) -> Iterator[Example]:
    for asked, right in [*((c, p) for p, c in found), *found]:
        yield Example(asked, [Reference(str(right.id), asked.where)])


def _pairs(images: Path, captions: Path, faults: Faults, notices: list[str]) -> Iterator[_Pair]:
    shown, told = _named(images, ".jpg", faults), _named(captions, ".txt", faults)
    longer = 0
    for name in sorted({*shown, *told}, key=lambda name: (len(name), name)):
        with faults.row():
            if name not in told:
                raise DataError(f"{shown[name]}: no caption {captions / name}.txt")
            if name not in shown:
                raise DataError(f"{told[name]}:1: no picture {images / name}.jpg")
            said = [line for _, line in lines(told[name])]
            if not said or not said[0].strip():
                raise DataError(f"{told[name]}:1: the first line is empty")
            Item(name, None, shown[name], "image", where=str(shown[name])).image_format()
            longer += len(said) > 1
            yield (
                Entry(None, shown[name], str(shown[name]), f"image/{name}"),
                Entry(said[0], None, f"{told[name]}:1", f"caption/{name}"),
            )
    if longer:
        of = counted(longer, "caption has", "captions have")
        notices.append(f"{of} further lines, which are not part of it")


def _named(folder: Path, suffix: str, faults: Faults) -> dict[str, Path]:
    """Name -> file; hidden files are passed over."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        with faults.row():
            if path.suffix != suffix or not path.is_file():
                raise DataError(f"{path}: not a {suffix} file")
            found[path.stem] = path
    return found
