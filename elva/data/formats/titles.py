"""A picture's own title and description: XMP's, IPTC's, EXIF's, or PNG's text."""

import re
from pathlib import Path
from xml.parsers import expat

from PIL import Image, ImageFile, IptcImagePlugin

from elva.data import pictures
from elva.errors import PictureFault

_MAX_XMP_BYTES = 4 * 2**20
"""Ours: XMP in a JPEG is at most 64 KiB; beyond this a packet is passed over."""

_DC = "http://purl.org/dc/elements/1.1/"
_LANGUAGE = "http://www.w3.org/XML/1998/namespace lang"

_BY_CAMERAS = re.compile(
    r"((OLYMPUS|KONICA|MINOLTA|SAMSUNG|KODAK|SONY|CASIO|VIVITAR) )*(DIGITAL (STILL )?CAMERA|DSC)"
    r"|SAMSUNG|default|cof|hdr|dav|edf|sdr|Screenshot|Created with \w+|untitled"
    r"|DCIM[\\/].*|(PICT?|YDXJ|DJI|IMG|DSC[NF]?|P)[_-]?\d+(\.\w+)?",
    re.IGNORECASE,
)
"""What cameras and programs write into every file, and nobody said of the picture."""


def read(path: Path) -> dict[str, str]:
    """`title` and `description`, those that somebody wrote, each one line.

    Only the file's header is read. A picture that cannot be opened has neither, and notes that
    cannot be read are none: who decodes the picture says what is wrong with it.
    """
    try:
        found = pictures.header(path, lambda i: [_xmp(i), _iptc(i), _exif(i), _png(i)])
    except PictureFault:
        return {}
    own = {}
    for name in ("title", "description"):
        said = (" ".join(one.get(name, "").split()).strip("\0 ") for one in found)
        line = next((line for line in said if line and not _is_made(line, path)), None)
        if line is not None:
            own[name] = line
    return own


def _is_made(line: str, path: Path) -> bool:
    """Whether a program wrote it: a camera's line, or the file's own name."""
    return bool(_BY_CAMERAS.fullmatch(line)) or line in (path.name, path.stem)


def _xmp(image: Image.Image) -> dict[str, str]:
    """dc:title and dc:description, in the default language where there are several."""
    packet = image.info.get("xmp")
    if isinstance(packet, str):
        packet = packet.encode()
    if not isinstance(packet, bytes) or len(packet) > _MAX_XMP_BYTES:
        return {}
    reader = _Packet()
    try:
        reader.read(packet.rstrip(b"\0 \r\n\t"))
    except (expat.ExpatError, UnicodeError, _Unsafe):
        return {}
    return {name: texts[0][1] for name, texts in reader.found.items() if texts}


class _Unsafe(Exception):
    """XML with declarations of its own, by which a small file makes a large one."""


class _Packet:
    """The two texts of a packet of XMP, each [(is it the default, text)], the default first."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[bool, str]]] = {"title": [], "description": []}
        self.inside: str | None = None
        self.language = ""
        self.parts: list[str] = []

    def read(self, packet: bytes) -> None:
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.StartDoctypeDeclHandler = self._refuse
        parser.EntityDeclHandler = self._refuse
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self.parts.append
        parser.Parse(packet, True)
        for texts in self.found.values():
            texts.sort(key=lambda one: not one[0])

    def _refuse(self, *_: object) -> None:
        raise _Unsafe

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        for kind in self.found:
            if name == f"{_DC} {kind}":
                self.inside = kind
            if said := attributes.get(f"{_DC} {kind}"):  # the short form
                self.found[kind].append((True, said))
        self.language = attributes.get(_LANGUAGE, "x-default")
        self.parts.clear()

    def _end(self, name: str) -> None:
        said = "".join(self.parts).strip()
        self.parts.clear()
        if self.inside and said:
            self.found[self.inside].append((self.language == "x-default", said))
        if name == f"{_DC} {self.inside}":
            self.inside = None


def _iptc(image: ImageFile.ImageFile) -> dict[str, str]:
    """Object name or headline, and caption."""
    found = IptcImagePlugin.getiptcinfo(image) or {}

    def said(number: int) -> str:
        value = found.get((2, number), b"")
        value = value[0] if isinstance(value, list) else value
        return _decoded(value)

    return {"title": said(5).strip() or said(105), "description": said(120)}


def _exif(image: Image.Image) -> dict[str, str]:
    """ImageDescription, and Windows' title, subject and comment."""
    tags = image.getexif()
    described = tags.get(0x010E, "")
    if isinstance(described, str):  # Pillow reads as Latin-1 what most programs write as UTF-8
        described = described.encode("latin-1", "ignore")
    described = _decoded(described if isinstance(described, bytes) else b"")
    title, comment, subject = (_windows(tags.get(tag)) for tag in (0x9C9B, 0x9C9C, 0x9C9F))
    return {"title": title or subject, "description": described or comment}


def _windows(value: object) -> str:
    content = bytes(value) if isinstance(value, bytes | tuple) else b""
    return content.decode("utf-16-le", "ignore").strip("\0 ")


def _png(image: Image.Image) -> dict[str, str]:
    if image.format != "PNG":
        return {}
    found = {name: image.info.get(name.capitalize()) for name in ("title", "description")}
    return {name: str(value) for name, value in found.items() if isinstance(value, str)}


def _decoded(value: bytes) -> str:
    """UTF-8, as nearly everything is by now, or Western European as all was before."""
    try:
        return value.decode("utf-8").strip("\0 ")
    except UnicodeDecodeError:
        return value.decode("cp1252", "replace").strip("\0 ")
