"""Pictures as every viewer shows them: four corners of known colours, whatever holds them."""

import io
import random
import struct
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.Image import Transpose

from elva.data import Item, pictures
from elva.errors import DataError, PictureFault, UserError

CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
SIZE = (48, 32)
LAID = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}  # fmt: skip
"""EXIF's note -> how a camera lays an upright picture down that bears it."""

LOSSY = {"JPEG", "AVIF", "HEIF"}
NOTED = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF")


def upright(mode: str = "RGB") -> Image.Image:
    width, height = SIZE
    image = Image.new("RGB", SIZE)
    for place, colour in zip(((0, 0), (24, 0), (0, 16), (24, 16)), CORNERS, strict=True):
        image.paste(colour, (*place, width, height))
    return image.convert(mode)


def encoded(image: Image.Image, format: str, **how: object) -> bytes:
    if format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if format in LOSSY:
        how = {"quality": 100, "subsampling": "4:4:4", **how}
    if format == "WEBP":
        how = {"lossless": True, **how}
    stream = io.BytesIO()
    image.save(stream, format, **how)
    return stream.getvalue()


def shown(data: bytes) -> Image.Image:
    """The picture, of which the header tells the same size."""
    item = Item("9:1", None, data, "image")
    image = item.load_image()
    assert image.mode == "RGB" and image.size == item.image_size() and not image.info
    assert item.image_format() in pictures.FORMATS
    return image


def is_upright(data: bytes, tolerance: int = 3) -> bool:
    image = shown(data)
    width, height = image.size
    at = ((2, 2), (width - 3, 2), (2, height - 3), (width - 3, height - 3))
    found = np.array([image.getpixel(place) for place in at])
    return image.size == SIZE and bool(np.abs(found - np.array(CORNERS)).max() <= tolerance)


@pytest.mark.parametrize("note", range(1, 9))
@pytest.mark.parametrize("format", NOTED)
def test_a_picture_stands_upright_whatever_its_note_says(format: str, note: int) -> None:
    image = upright().transpose(LAID[note]) if note in LAID else upright()
    exif = Image.Exif()
    exif[0x112] = note
    how = {"tiffinfo": {0x112: note}} if format == "TIFF" else {"exif": exif.tobytes()}
    data = encoded(image, format, **how)
    assert is_upright(data)
    if note == 6 and format != "HEIF":  # which pillow_heif lays down as it writes
        assert not is_upright(encoded(image, format))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_note_behind_a_pngs_pixels_is_read_and_a_damaged_one_is_none() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    laid = upright().transpose(LAID[6])
    data = encoded(laid, "PNG", exif=exif.tobytes())
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + struct.unpack(">I", data[at : at + 4])[0]]
    end = data.index(b"IEND") - 4
    assert is_upright(data[:at] + data[at + len(chunk) : end] + chunk + data[end:])
    for note in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense"):
        assert is_upright(encoded(upright(), "JPEG", exif=note))


MODES: dict[str, Callable[[], bytes]] = {
    "palette.png": lambda: encoded(upright().quantize(8), "PNG"),
    "palette.gif": lambda: encoded(upright().quantize(8), "GIF"),
    "palette.bmp": lambda: encoded(upright().quantize(8), "BMP"),
    "palette.tif": lambda: encoded(upright().quantize(8), "TIFF"),
    "alpha.png": lambda: encoded(upright("RGBA"), "PNG"),
    "alpha.webp": lambda: encoded(upright("RGBA"), "WEBP"),
    "alpha.avif": lambda: encoded(upright("RGBA"), "AVIF"),
    "cmyk.jpg": lambda: encoded(upright("CMYK"), "JPEG"),
    "cmyk.tif": lambda: encoded(upright("CMYK"), "TIFF"),
    # Without compression Pillow 12 does not read what it writes.
    "ycbcr.tif": lambda: encoded(upright("YCbCr"), "TIFF", compression="tiff_lzw"),
    "lzw.tif": lambda: encoded(upright(), "TIFF", compression="tiff_lzw"),
    "colour.bmp": lambda: encoded(upright(), "BMP"),
    **{
        f"first of several.{format}": partial(
            encoded, upright(), format, save_all=True,
            append_images=[Image.new("RGB", (16, 16)), Image.new("RGB", SIZE)],
        )
        for format in ("MPO", "TIFF", "HEIF")
    },
    **{
        f"animated.{format}": partial(
            encoded, upright(), format, save_all=True, append_images=[Image.new("RGB", SIZE)]
        )
        for format in ("GIF", "WEBP", "PNG", "AVIF")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_a_picture_has_its_colours_however_they_are_stored(name: str) -> None:
    assert is_upright(MODES[name](), 6 if name.endswith("MPO") else 3)


def flat(mode: str, value: object, format: str = "PNG", **how: object) -> tuple[int, ...]:
    """What a picture of one value shows."""
    data = encoded(Image.new(mode, (8, 8), value), format, **how)  # type: ignore[arg-type]
    return shown(data).getpixel((4, 4))


@pytest.mark.parametrize(
    ("mode", "value", "grey"),
    [("1", 1, 255), ("1", 0, 0), ("L", 77, 77), ("I;16", 0x80FF, 0x80), ("I;16", 0xFFFF, 255)],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_is_grey_in_1_8_and_16_bits(mode: str, value: int, grey: int, format: str) -> None:
    assert flat(mode, value, format) == (grey,) * 3


def test_transparency_lies_over_white() -> None:
    white, half = (255,) * 3, (127,) * 3
    assert flat("RGBA", (255, 0, 0, 0)) == flat("LA", (0, 0)) == flat("LA", (0, 0), "TIFF") == white
    assert flat("LA", (0, 128)) == half and flat("RGBA", (255, 0, 0, 128)) == (255, 127, 127)
    keyed = {"RGB": (1, 2, 3), "L": 7, "P": 0, "I;16": 0x1234}
    for mode, key in keyed.items():
        assert flat(mode, key, transparency=key) == white, mode
    assert flat("P", 0, "GIF", transparency=0) == white
    assert flat("I;16", 0x1235, transparency=0x1234) == (0x12,) * 3
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert pictures.load(clear).getpixel((0, 0)) == white


def test_pixels_of_32_bits_are_read_where_they_hold_16_and_refused_where_not() -> None:
    assert flat("I", 0x8000, "TIFF") == (0x80,) * 3
    for mode, value in (("I", 70_000), ("I", -1), ("F", 0.5)):
        with pytest.raises(DataError, match="its pixels have 32 bits"):
            flat(mode, value, "TIFF")


# -- profiles --------------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """sRGB's with red and green in each other's place."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", data, 128)[0]
    at = {bytes(data[p : p + 4]): p + 4 for p in range(132, 132 + 12 * count, 12)}
    red, green = (slice(at[name], at[name] + 8) for name in (b"rXYZ", b"gXYZ"))
    data[red], data[green] = data[green], data[red]
    return bytes(data)


def inks_profile() -> bytes:
    """Four inks on two points each: cyan alone prints red, everything else black, none white."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    lab = [(255, 128, 128), *[(0, 128, 128)] * 7, (138, 209, 198), *[(0, 128, 128)] * 7]
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += ramp * 4 + b"".join(map(bytes, lab)) + ramp * 3
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"inks\0" + bytes(79)
    white = b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)
    parts, index, body = {b"desc": name, b"wtpt": white, b"A2B0": table}, b"", b""
    for tag, part in parts.items():
        index += tag + struct.pack(">II", 132 + 12 * len(parts) + len(body), len(part))
        body += part + bytes(-len(part) % 4)
    head = bytearray(128)
    size = 132 + len(index) + len(body)
    struct.pack_into(">I4sI4s4s4s", head, 0, size, b"lcms", 0x2400000, b"prtr", b"CMYK", b"Lab ")
    head[36:40], head[68:80] = b"acsp", fixed(0.9642, 1, 0.8249)
    return bytes(head) + struct.pack(">I", len(parts)) + index + body


@pytest.mark.parametrize("format", NOTED)
def test_a_profile_says_what_colours_are_meant(format: str) -> None:
    found = flat("RGB", (255, 0, 0), format, icc_profile=swapped_profile())
    assert np.abs(np.array(found) - (0, 255, 0)).max() <= 2


def test_a_profile_holds_beside_palettes_transparency_and_inks() -> None:
    swapped = swapped_profile()
    assert flat("RGBA", (255, 0, 0, 128), icc_profile=swapped) == (127, 255, 127)
    palette = Image.new("RGB", (8, 8), (255, 0, 0)).quantize(2)
    assert shown(encoded(palette, "PNG", icc_profile=swapped)).getpixel((0, 0)) == (0, 255, 0)
    inked = partial(flat, "CMYK", (255, 0, 0, 0), "JPEG")
    assert inked() == (0, 255, 255) and inked(icc_profile=inks_profile()) == (255, 0, 0)
    red = flat("LAB", (138, 208, 195), "TIFF")  # of LAB no profile need say it
    assert red[0] > 240 and max(red[1:]) < 16


def test_a_profile_that_does_not_fit_or_is_damaged_is_none() -> None:
    swapped = swapped_profile()
    assert flat("L", 77, icc_profile=swapped) == (77,) * 3
    assert flat("CMYK", (0, 255, 255, 0), "JPEG", icc_profile=swapped) == (255, 0, 0)
    assert flat("RGB", (255, 0, 0), icc_profile=swapped[:200]) == (255, 0, 0)


# -- size ------------------------------------------------------------------------------------------


def test_a_large_jpeg_is_decoded_smaller_and_its_header_says_so() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(Image.new("L", (12_000, 9_000), 128), "JPEG", exif=exif.tobytes(), quality=75)
    assert shown(data).size == (4_500, 6_000) and shown(data).getpixel((9, 9)) == (128,) * 3


@pytest.mark.parametrize(
    ("size", "format", "how", "reduced"),
    [
        ((8001, 8001), "PNG", {}, None),
        ((8000, 8000), "PNG", {}, (8000, 8000)),
        ((16_001, 16_000), "JPEG", {}, (4001, 4000)),
        ((22_630, 22_630), "JPEG", {}, None),
        ((12_000, 9_000), "JPEG", {"progressive": True}, (6000, 4500)),
        ((12_000, 12_000), "JPEG", {"progressive": True}, None),
        ((20_000, 60), "PNG", {}, None),
        ((60, 12_001), "GIF", {}, None),
    ],
)
def test_what_is_too_large_is_said_from_the_header(
    size: tuple[int, int], format: str, how: dict[str, bool], reduced: tuple[int, int] | None
) -> None:
    data = bytearray(encoded(Image.new("L", (16, 16)), format, **how))
    wide, high = (struct.pack("<H" if format == "GIF" else ">H", side) for side in size)
    if format == "JPEG":
        at = data.index(b"\xff\xc2" if how else b"\xff\xc0") + 5
        data[at : at + 4] = high + wide
    elif format == "GIF":
        data[6:10] = wide + high
    else:
        data = bytearray(encoded(Image.new("1", size), "PNG"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own of large pictures
        if reduced is not None:
            assert pictures.size(bytes(data)) == reduced
            return
        with pytest.raises(PictureFault, match=f"{size[0]} x {size[1]} is ") as caught:
            pictures.size(bytes(data))
    assert caught.value.kind == "large"


def test_a_setting_raises_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    data = encoded(Image.new("1", (14_000, 13_000)), "PNG")
    with pytest.raises(PictureFault, match="ELVA_MAX_PIXELS raises the limit"):
        pictures.size(data)
    monkeypatch.setenv("ELVA_MAX_PIXELS", "182000000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.size(data) == (14_000, 13_000)
    for said in ("0", "1e9", "9" * 5000, "-3", "abc"):
        monkeypatch.setenv("ELVA_MAX_PIXELS", said)
        rule = r"^ELVA_MAX_PIXELS: must be a whole number of pixels above 0"
        with pytest.raises(UserError, match=rule) as refused:
            pictures.size(data)
        assert not isinstance(refused.value, DataError)  # else it could be passed over


# -- faults ----------------------------------------------------------------------------------------

NO_PICTURES = {
    "the file is empty": b"",
    "it is a text": b"hello there",
    "it is a drawing or page in text": b'<?xml version="1.0"?><svg/>',
    "it is a PDF document": b"%PDF-1.7",
    "it is an archive": b"PK\x03\x04" + bytes(60),
    "it is a film": b"\0\0\0\x18ftypisom" + bytes(20),
    "it is a JPEG XL picture": b"\xff\x0a" + bytes(20),
    "it is a raw picture of a camera": b"\0\0\0\x18ftypcrx " + bytes(20),
    "it is a file of macOS beside another": b"\0\x05\x16\x07" + bytes(20),
    "it is no picture that is read .JPEG, PNG, ": bytes(50),
    "damaged: it ends early": encoded(Image.effect_noise((99, 99), 9), "JPEG")[:-400],
}


@pytest.mark.parametrize("rule", NO_PICTURES)
def test_what_is_no_picture_is_named_once_in_own_words(rule: str, tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(NO_PICTURES[rule])
    with pytest.raises(DataError, match=f"^9:1: unreadable picture: {path}: {rule}") as caught:
        Item("9:1", None, path, "image").load_image()
    assert str(caught.value).count("a.png") == 1 and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=rf"^a.png: unreadable picture: {rule}"):
        Item("a.png", None, path, "image").load_image()


def test_a_file_is_what_its_bytes_say_and_what_cannot_be_opened_is_said(tmp_path) -> None:
    path = tmp_path / "really a gif.jpg"
    path.write_bytes(encoded(upright().quantize(8), "GIF"))
    item = Item("9:1", None, path, "image")
    assert item.image_format() == "GIF" and item.load_image().size == SIZE
    for place, rule in ((tmp_path, "cannot be read: Is a directory"), (tmp_path / "b", "no such")):
        with pytest.raises(PictureFault, match=rule):
            pictures.load(place)


def test_what_is_not_installed_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {name: encoded(upright(), name) for name in ("HEIF", "AVIF")}
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    monkeypatch.setattr(pictures.features, "check", lambda name: False)
    for name, cure in (("HEIF", "pip install 'elva.heif.'"), ("AVIF", "pip install 'pillow")):
        with pytest.raises(PictureFault, match=cure) as caught:
            pictures.size(data[name])
        assert caught.value.kind == name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", pictures.FORMATS)
def test_damaged_pictures_open_or_are_refused_in_one_line(
    format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """300 random edits a format: never another exception, never two lines, never another size than
    the header's."""
    how = {} if format in ("GIF", "BMP") else {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}
    draw, whole, refused = random.Random(format), encoded(upright(), format, **how), 0
    for _ in range(300):
        data, at = bytearray(whole), draw.randrange(min(len(whole), 600))
        data[at : at + draw.randrange(4)] = draw.randbytes(draw.randrange(4))
        item = Item("9:1", None, bytes(data), "image")
        try:
            assert item.load_image().size == item.image_size()
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded by Linux")
def test_a_piece_that_says_it_has_gigabytes_takes_no_memory_for_them(tmp_path):
    """Found by atheris: a PNG of 148 bytes made a MemoryError where memory is bounded."""
    from benchmarks.reliability.fuzz.bounds import bounded  # which has its pictures from here

    whole = encoded(upright(), "PNG")
    start = whole.index(b"IDAT") - 4
    said = struct.pack(">I", 0x9400_0000)
    (tmp_path / "a.png").write_bytes(whole[:start] + said + whole[start + 4 :])
    with bounded():
        found = pictures.load(tmp_path / "a.png")
    assert found.tobytes() == upright().tobytes()
