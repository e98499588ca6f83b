"""A decoded picture as every viewer shows it: upright, in sRGB, over white, 8 bits a colour."""

from __future__ import annotations

import io
import struct
from functools import lru_cache
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

from elva.errors import PictureFault

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what undoes it."""

DAMAGED = (
    EOFError, OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError,
    AttributeError, AssertionError, RuntimeError, struct.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow's readers raise over bytes that nobody vouched for."""


def shown(image: Image.Image) -> Image.Image:
    """[H, W] RGB of an opened picture, with no notes left that it bore.

    Raises:
        PictureFault: pixels of a kind that no two viewers show alike; what Pillow raises.
    """
    said = image.size
    image.load()
    if image.format == "HEIF" and image.size != said:
        raise PictureFault(f"damaged: its header says {said[0]} x {said[1]}, which it is not")
    upright = _UPRIGHT.get(orientation(image))
    if upright is not None:
        image = image.transpose(upright)
    alpha = None
    if image.mode.startswith("I;16"):
        image, alpha = _eight_bits(image)
    elif image.mode in ("I", "F"):
        image = _narrow(image)
    elif image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode.removesuffix("A"))
    elif image.mode in ("P", "1"):
        image = image.convert("RGB" if image.mode == "P" else "L")
    image = _in_srgb(image)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # notes and a profile that no longer hold
    return image


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none, or none that can be read: so viewers take it."""
    try:
        # Pillow decodes a PNG to see whether a note follows its pixels.
        lazy = image.format == "PNG" and isinstance(image, ImageFile.ImageFile) and image.tile
        early = lazy and not _late_chunks(image)
        exif = Image.Image.getexif(image) if early else image.getexif()
        found = exif.get(ExifTags.Base.Orientation, 1)
    except DAMAGED:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _late_chunks(image: Any) -> bool:
    """Whether a PNG has notes behind its pixels."""
    stream: IO[bytes] = image.fp
    before, place, pixels = stream.tell(), 8, False
    try:
        while True:
            stream.seek(place)
            length, name = struct.unpack(">I4s", stream.read(8))
            if name == b"IDAT":
                pixels = True
            elif pixels and name in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            place += length + 12
    except struct.error:  # the end
        return False
    finally:
        stream.seek(before)


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey as 8 bits, and its transparency: that of one value."""
    values = np.asarray(image)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype("u1"))
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    grey.info = {"icc_profile": image.info.get("icc_profile")}
    return grey, alpha


def _narrow(image: Image.Image) -> Image.Image:
    """32-bit pixels that hold 16-bit ones; no viewer agrees with another on the others' range."""
    low, high = image.getextrema()
    if image.mode == "F" or not 0 <= low <= high < 2**16:  # type: ignore[operator]
        raise PictureFault("its pixels have 32 bits, not 8 or 16; save it with fewer")
    return image.point(lambda value: value * (1 / 256)).convert("L")


def _in_srgb(image: Image.Image) -> Image.Image:
    """RGB by the picture's own colour profile; without one, or with one that is damaged or of
    other colours than the picture's, as viewers take it."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        transform = _transform(None, "LAB")
    elif profile and image.mode in ("L", "RGB", "CMYK"):
        transform = _transform(profile, image.mode)
    else:
        transform = None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    shown: Image.Image = transform.apply(image)
    return shown


@lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> Any:
    """From a profile's colours to sRGB; None for one that does not fit the mode."""
    from PIL import ImageCms

    spaces = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK", "LAB": "Lab "}
    try:
        if profile is None:
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != spaces[mode]:
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
