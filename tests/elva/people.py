"""A folder as a person has it: names, formats and faults of every kind that was met."""

import io
import os
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from typer.testing import CliRunner

from elva.cli import app
from tests.elva.test_data_pictures import LAID, upright

LONG = "b" * 196 + ".png"
LINES = "zwei\nZeilen.png"


def encoded(image: Image.Image, format: str, **how: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **how)
    return stream.getvalue()


def plain(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of its own."""
    image = Image.new("RGB", size, (10 * number % 256, 40 + number, 250 - 5 * number))
    ImageDraw.Draw(image).rectangle((3, 3, 4 + number, 20), "white")
    return image


@cache
def pictures() -> dict[str, bytes]:
    """Name -> the bytes of what is read: 28 of them, two of which show what another shows."""
    found: dict[str, bytes] = {}
    for note in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = note
        laid = upright().transpose(LAID[note]) if note in LAID else upright()
        laid.putpixel((9, 9), (note, note, note))  # no two show the same
        found[f"gedreht/{note}.jpg"] = encoded(
            laid, "JPEG", exif=exif.tobytes(), quality=100, subsampling=0
        )
    names = (
        "Urlaub 2023/Müller/Blüte.png", "Urlaub 2023/a b c.png", LINES, LONG, "日本/桜.png",
        "-rf.png", "12:30.png", "back\\slash.png", "<b>&.png", "100%.png", "IMG.PNG",
    )  # fmt: skip
    for number, name in enumerate(names):
        found[name] = encoded(plain(number), "PNG")
    found["a.jfif"] = found["kopie/a.jpe"] = encoded(plain(20), "JPEG")
    found["gif in fact.jpg"] = encoded(plain(21).quantize(8), "GIF")
    found["ink.jpg"] = encoded(plain(22).convert("CMYK"), "JPEG")
    found["deep.tif"] = encoded(Image.new("I;16", (30, 30), 0x7000), "TIFF")
    found["film.webp"] = encoded(plain(23), "WEBP", save_all=True, append_images=[plain(24)])
    found["neu.avif"] = encoded(plain(25), "AVIF")
    found["mpo.jpg"] = encoded(plain(26), "MPO", save_all=True, append_images=[plain(27)])
    found["gross.jpg"] = encoded(Image.new("L", (11_600, 8_700), 128), "JPEG")  # 100 megapixels
    return found


DAMAGED = {"leer.png": b"", "text.jpg": b"hello"}
"""And `abgebrochen.jpg`, of which the end is missing."""

LEFT_OUT = {
    "formats": ["Makefile", "a.svg", "b.svg", "film.mov"],
    "large": ["panorama.png"],
    "hidden": [".DS_Store", "._apple.jpg", ".git/HEAD", "Thumbs.db", "desktop.ini"],
    "thumbnails": [".thumbnails/x.png", "Urlaub 2023/@eaDir/y.jpg"],
    "links_out": ["draussen", "fremd.jpg"],
    "links_to_folders": ["nochmal"],
    "links_broken": ["kaputt.jpg"],
    "names": ["Bl\udcfcte.png"],
    "no_files": ["rohr.png"],
}


def make(root: Path, *, damaged: bool = True) -> Path:
    """Write the folder; beside it lies what its links lead to."""
    outside = root.parent / "elsewhere"
    outside.mkdir()
    (outside / "fremd.jpg").write_bytes(encoded(plain(30), "JPEG"))
    whole = pictures()
    files = {**whole, "panorama.png": encoded(Image.new("1", (20_000, 60)), "PNG")}
    for why in ("formats", "hidden", "thumbnails"):
        files |= dict.fromkeys(LEFT_OUT[why], b"no picture")
    if damaged:
        files |= {**DAMAGED, "abgebrochen.jpg": whole["ink.jpg"][:-300]}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    with open(os.fsencode(root) + b"/Bl\xfcte.png", "wb") as file:
        file.write(whole["IMG.PNG"])
    (root / "draussen").symlink_to(outside)
    (root / "fremd.jpg").symlink_to(outside / "fremd.jpg")
    (root / "nochmal").symlink_to(root / "Urlaub 2023")
    (root / "kaputt.jpg").symlink_to("nirgends.jpg")
    (root / "verweis.jpg").symlink_to("ink.jpg")
    os.mkfifo(root / "rohr.png")
    return root


GOOD = sorted([*pictures(), "verweis.jpg"])
FAULTS = [
    "abgebrochen.jpg: unreadable picture: damaged: it ends early",
    "leer.png: unreadable picture: the file is empty",
    "text.jpg: unreadable picture: it is a text",
]


def call(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    return result.stderr if code else result.stdout


def draw(path: Path, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path
