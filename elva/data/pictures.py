"""Pictures as every viewer shows them: upright, in sRGB, over white, the first of several.

The one place that opens a picture. What a file is, its first bytes say, not its name; its size is
judged from the header, before anything is decoded.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeVar

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
    features,
)

from elva.data import viewing
from elva.errors import DataError, PictureFault, UserError

_T = TypeVar("_T")

LIMIT = "ELVA_MAX_PIXELS"
"""The environment variable that raises `_MAX_PIXELS`."""

_MAX_PIXELS = 64_000_000
"""Ours: holds every M-BEIR picture. A larger JPEG is decoded at a half, a quarter or an eighth of
its sides, whatever the limit is, so that an embedding does not depend on it."""

_MOST_JPEG, _MOST_PROGRESSIVE = 8, 2
"""Ours: of the limit. A JPEG that is decoded smaller needs memory for the smaller picture alone;
a progressive one for all its coefficients, 6 bytes a pixel at most."""

_MAX_ASPECT_RATIO = 200
"""Qwen2-VL's, beyond which its processor refuses."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""What is read: HEIF with the extra `heif` alone."""

_NEEDS = {
    "HEIF": "a HEIC picture; pip install 'elva[heif]' to read it",
    "AVIF": "an AVIF picture, which this Pillow cannot read; pip install 'pillow>=11.3'",
}

_OTHERS = (
    (0, b"%PDF", "a PDF document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\x00\x00\x01\x00", "an icon"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (4, b"JXL ", "a JPEG XL picture"),
    (4, b"jP  ", "a JPEG 2000 picture"),
    (8, b"crx ", "a raw picture of a camera"),
    (0, b"FUJIFILMCCD-RAW", "a raw picture of a camera"),
    (4, b"ftyp", "a film"),
    (8, b"AVI ", "a film"),
    (0, b"\x1aE\xdf\xa3", "a film"),
    (0, b"PK\x03\x04", "an archive"),
    (0, b"\x1f\x8b", "an archive"),
    (0, b"\x00\x05\x16\x07", "a file of macOS beside another"),
)
"""(place, bytes there, what such a file is) of files that are none of `FORMATS`."""


def load(source: Path | bytes | Image.Image) -> Image.Image:
    """[H, W] RGB: the picture as a viewer shows it.

    Raises:
        PictureFault: no such file, none of `FORMATS`, too large, or damaged.
    """
    return header(source, viewing.shown)


def size(source: Path | bytes | Image.Image) -> tuple[int, int]:
    """Width and height of `load`'s picture, from the header.

    Raises:
        PictureFault: as `load`, but for damage beyond the header.
    """

    def upright(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # some Pillows have turned it already
            width, height = image.tag_v2[256], image.tag_v2[257]
        return (height, width) if viewing.orientation(image) >= 5 else (width, height)

    return header(source, upright)


def format_of(source: Path | bytes) -> str:
    """One of `FORMATS`, from the header.

    Raises:
        PictureFault: as `load`, but for damage beyond the header.
    """
    return header(source, lambda image: str(image.format))


def missing(format: str) -> str | None:
    """What a picture of this format needs that is not installed; None: nothing."""
    there = {"HEIF": lambda: find_spec("pillow_heif"), "AVIF": lambda: features.check("avif")}
    return None if format not in there or there[format]() else _NEEDS[format]


def most_pixels() -> int:
    """The pixels that a picture may have: `_MAX_PIXELS`, or what ELVA_MAX_PIXELS says.

    Raises:
        UserError: it says no whole number above 0; no fault of a picture, and never passed over.
    """
    said = os.environ.get(LIMIT)
    if not said:
        return _MAX_PIXELS
    if not re.fullmatch("[1-9][0-9]{0,17}", said):
        raise UserError(
            f"{LIMIT}: must be a whole number of pixels above 0, got {said!r}; e.g. {_MAX_PIXELS}"
        )
    return int(said)


# -- opening ---------------------------------------------------------------------------------------


class _File(io.BufferedReader):
    """A file that reads no more than there is: it makes room for all that is asked for first, and a
    piece of a damaged PNG may say that it has gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def header(source: Path | bytes | Image.Image, use: Callable[[Any], _T]) -> _T:
    """What `use` says of an opened picture, of which nothing is decoded yet.

    Raises:
        PictureFault: as `load`, and for whatever `use` stumbles over.
    """
    if isinstance(source, Image.Image):
        with _own_words():
            return use(source)
    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else _File(io.FileIO(source))
        with opened as stream:
            return _read(stream, use)
    except FileNotFoundError:
        raise PictureFault("no such picture", "missing") from None
    except OSError as error:  # of the file itself: what Pillow says is in own words already
        raise PictureFault(f"cannot be read: {error.strerror or type(error).__name__}") from None


def _read(stream: IO[bytes], use: Callable[[Image.Image], _T]) -> _T:
    limit = most_pixels()
    name = _identified(stream.read(64))
    if need := missing(name):
        raise PictureFault(f"it is {need}", name)
    stream.seek(0)
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # by which some of its readers judge too
    with _own_words(), _reader(name)(stream) as image:
        image.format = name  # the plugin's own may be of several pictures, MPO
        _check(image, limit)
        return use(image)


@contextmanager
def _own_words() -> Iterator[None]:
    """Whatever Pillow stumbles over is one fault; its words name files, and differ by version."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError:
        raise PictureFault("damaged in its header") from None
    except viewing.DAMAGED as error:
        said = " ".join(str(error).split())
        if "truncated" in said.lower() or isinstance(error, EOFError):
            raise PictureFault("damaged: it ends early") from None
        raise PictureFault(f"damaged: {said[:120] or type(error).__name__}") from None


def _identified(begin: bytes) -> str:
    """One of `FORMATS`; PictureFault for anything else, with what it is."""
    if begin.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if begin.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return "WEBP"
    if begin.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if begin.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if begin[4:8] == b"ftyp":
        brands = {begin[8:12], *(begin[i : i + 4] for i in range(16, _box(begin), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
            return "HEIF"
    if begin.startswith(b"BM") and len(begin) > 18 and begin[6:10] == bytes(4):
        return "BMP"
    raise PictureFault(_what(begin))


def _box(begin: bytes) -> int:
    """The length of a file's first box, as far as it was read."""
    return min(len(begin), int.from_bytes(begin[:4], "big"))


def _what(begin: bytes) -> str:
    if not begin:
        return "the file is empty"
    for place, mark, name in _OTHERS:
        if begin[place : place + len(mark)] == mark:
            return f"it is {name}"
    if begin.lstrip(b"\xef\xbb\xbf \t\r\n")[:5].lower() in (b"<?xml", b"<svg ", b"<!doc", b"<html"):
        return "it is a drawing or page in text (SVG, HTML)"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in begin):
        return "it is a text"
    return f"it is no picture that is read ({', '.join(FORMATS)})"


def _reader(name: str) -> Callable[[IO[bytes]], ImageFile.ImageFile]:
    """The reader of a format, past `Image.open`, which would warn of large ones."""
    if name == "HEIF":
        from pillow_heif import HeifImageFile

        return HeifImageFile  # type: ignore[no-any-return]
    return {
        "AVIF": AvifImagePlugin.AvifImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,  # of an MPO the first picture
        "PNG": PngImagePlugin.PngImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
    }[name]


def _check(image: ImageFile.ImageFile, limit: int) -> None:
    """Refuse what is too large, and have a large JPEG decoded smaller."""
    width, height = image.size
    if not width or not height:
        raise PictureFault("damaged: it has no height or no width")
    if max(width, height) > _MAX_ASPECT_RATIO * min(width, height):
        raise PictureFault(f"{width} x {height} is longer than {_MAX_ASPECT_RATIO}:1", "large")
    most = limit
    if image.format == "JPEG":
        progressive = "progressive" in image.info or "progression" in image.info
        most *= _MOST_PROGRESSIVE if progressive else _MOST_JPEG
    if width * height > most:
        raise PictureFault(
            f"{width} x {height} is more than {most} pixels; {LIMIT} raises the limit", "large"
        )
    if image.format == "JPEG":
        scale = next(s for s in (1, 2, 4, 8) if s == 8 or _scaled(width, height, s) <= _MAX_PIXELS)
        if scale > 1:
            image.draft(None, (width // scale, height // scale))


def _scaled(width: int, height: int, scale: int) -> int:
    """Pixels of a JPEG that is decoded at one part of its sides."""
    return -(-width // scale) * -(-height // scale)
