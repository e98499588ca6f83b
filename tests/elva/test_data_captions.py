"""What people say of their pictures, in every file in which they say it."""

import io
import json
import subprocess
import sys
import unicodedata
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from elva.data import load
from elva.data.formats import captions, convert_file, titles
from elva.data.strict import Faults
from elva.errors import DataError, counted

ANY = 10**6


@pytest.fixture
def root(tmp_path):
    """A folder with a.png, b.png and sub/c.png."""
    for name, colour in (("a", "red"), ("b", "blue"), ("sub/c", "green")):
        draw(tmp_path / "s" / f"{name}.png", colour)
    return tmp_path / "s"


def draw(path, colour="red", **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, **settings)
    return path


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        pq.write_table(pa.Table.from_pylist(content), path)
    elif isinstance(content, dict):
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(root, faults=None):
    """What is known of a folder, and [(picture, caption)] by relative names."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    pictures = [p for p in files if p.suffix.lower() in (".png", ".jpg", ".webp", ".tif")]
    others = [p for p in files if p not in pictures]
    found = captions.read(root, pictures, others, faults or Faults())
    said = [(one.picture.relative_to(root).as_posix(), one.text) for one in found.captions]
    return found, said


COCO = {
    "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("abc")],
    "annotations": [
        {"id": 7, "image_id": 1, "caption": "two"},
        {"id": 8, "image_id": 0, "caption": "one"},
        {"id": 9, "image_id": 1, "caption": "more"},
    ],
}
AB = [("a.png", "one"), ("b.png", "two")]
ABB = [("b.png", "two"), ("a.png", "one"), ("b.png", "more")]

SOURCES = {
    "own csv": ({"captions.csv": "file,caption\na.png,one\nb.png,two\n"}, AB, "captions.csv"),
    "own tsv": ({"captions.tsv": "file\tcaption\na.png\tone\nb.png\ttwo\n"}, AB, "captions.tsv"),
    "own parquet": (
        {"captions.parquet": [{"file": name, "caption": said} for name, said in AB]},
        AB, "captions.parquet",
    ),
    "lists": (
        {"captions.jsonl": '{"image": "a.png", "captions": ["one", "two"]}\n'},
        [("a.png", "one"), ("a.png", "two")], "captions.jsonl",
    ),
    "numbered columns": (
        {"captions.csv": "file;Caption 1;Caption 2\na.png;one;two\nb.png;;more\n"},
        [("a.png", "one"), ("a.png", "two"), ("b.png", "more")], "captions.csv",
    ),
    "a language of their own": (
        {"captions.csv": "Jahr;Datei;Caption\n1999;.\\A.png;eins\n"}, [("a.png", "eins")],
        "captions.csv",
    ),
    "two columns of any name": (
        {"captions.csv": "Datei;Beschreibung\na.png;eins\n"}, [("a.png", "eins")], "captions.csv",
    ),
    "imagefolder": (
        {"sub/metadata.csv": "file_name,text\nc.png,three\n",
         "metadata.jsonl": '{"file_name": "sub/c.png", "text": "green"}\n'},
        [("sub/c.png", "green"), ("sub/c.png", "three")], "metadata.jsonl and 1 more",
    ),
    "imagefolder's parquet": (
        {"metadata.parquet": [{"image_file_name": "a.png", "label": "one"}]}, AB[:1],
        "metadata.parquet",
    ),
    "imagefolder's lists": (
        {"metadata.jsonl": '{"file_names": ["a.png", "b.png"], "text": "both"}\n'},
        [("a.png", "both"), ("b.png", "both")], "metadata.jsonl",
    ),
    "flickr8k of kaggle": (
        {"captions.txt": 'image,caption\na.png,one\na.png,"a dog , a cat"\n'},
        [("a.png", "one"), ("a.png", "a dog , a cat")], "captions.txt",
    ),
    "flickr8k's own": (
        {"Flickr8k.token.txt": "a.png#0\tone\nb.png#0\ttwo\nb.png#1\tmore #1\n\n"},
        [*AB, ("b.png", "more #1")], "Flickr8k.token.txt",
    ),
    "flickr8k's own by another name": (
        {"captions.txt": "\ufeffa.png#0\tone\r\nb.png#0\ttwo\r\n"}, AB, "captions.txt",
    ),
    "flickr30k of kaggle": (
        {"results.csv": "image_name| comment_number| comment\na.png| 0| one\nb.png| 0| two\n"},
        [("a.png", " one"), ("b.png", " two")], "results.csv",
    ),
    "results of something else": ({"results.csv": "model,score\nx,1\n", "a.txt": "one"},
                                  AB[:1], "texts beside them (a.txt, ...)"),
    "coco": ({"annotations/captions_val2017.json": COCO}, ABB, "annotations/captions_val2017.json"),
    "coco of another split": (
        {"annotations/captions_val2017.json": COCO,
         "annotations/captions_train2017.json":
            {"images": [{"id": 5, "file_name": "5.jpg"}], "annotations": []}},
        ABB, "annotations/captions_val2017.json",
    ),
    "texts beside": (
        {"a.txt": "one\n", "sub/c.png.txt": "three,\nand more", "readme.txt": "no caption"},
        [("a.png", "one"), ("sub/c.png", "three, and more")], "texts beside them (a.txt, ...)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_each_source_is_read_and_said(name, root):
    files, expected, source = SOURCES[name]
    for file, content in files.items():
        put(root / file, content)
    found, said = read(root)
    assert said == expected and found.source == source
    assert all(path.relative_to(root).as_posix() in files for path in found.files)
    pictures = len({picture for picture, _ in said})
    line = f"{counted(len(said), 'caption')} of {counted(pictures, 'picture')} from {source}"
    assert found.notice(3).startswith(line)


def test_the_first_source_that_is_there_is_read(root):
    order = ["captions.csv", "metadata.csv", "Flickr8k.token.txt", "results.csv",
             "annotations/captions_val2017.json", "a.txt"]  # fmt: skip
    for files, *_ in SOURCES.values():
        for file, content in files.items():
            if file in order and not (root / file).exists():
                put(root / file, content)
    put(root / "metadata.csv", "file_name,text\na.png,x\n")
    for name in order:
        found, _ = read(root)
        assert root / name in found.files, name
        for path in found.files:
            path.unlink()
        if name == "metadata.csv":
            assert not list(root.rglob("metadata.*"))
    assert read(root)[0].source == ""


def test_what_else_a_table_knows_stays_with_the_picture(root):
    put(
        root / "captions.csv",
        "file,caption,year,place\na.png,one,,Rom\na.png,two,1999,\nb.png,,7,\n",
    )
    found, said = read(root)
    assert said == [("a.png", "one"), ("a.png", "two")] and found.without == 1
    extra = {path.name: fields for path, fields in found.columns.items()}
    assert extra == {"a.png": {"year": "", "place": "Rom"}, "b.png": {"year": "7", "place": ""}}
    (root / "captions.csv").unlink()
    row = {"file_name": "a.png", "text": "one", "price": Decimal("1.50"), "score": float("nan")}
    put(root / "metadata.parquet", [{**row, "box": [1, 2], "of": {"k": b"\x01"}}])
    counts = convert_file("folder", root, root.parent / "data")
    assert counts["notices"][0] == (
        "1 caption of 1 picture from metadata.parquet; 2 pictures have none"
    )
    pool = next((root.parent / "data" / "cand_pool" / "local").iterdir())
    known = json.loads(json.loads(pool.read_text().splitlines()[0])["src_content"])
    assert known["price"] == "1.50" and known["score"] is None and known["box"] == [1, 2]
    assert known["of"] == {"k": "01"}


def test_metadata_without_words_is_metadata(root):
    put(root / "metadata.csv", "file_name,label,split\na.png,3,train\n")
    counts = convert_file("folder", root, root.parent / "data")
    assert counts["queries"] == {"i2i": 3}
    assert counts["notices"][0] == "metadata.csv has no captions: each picture asks for itself"
    pool = next((root.parent / "data" / "cand_pool" / "local").iterdir())
    assert json.loads(json.loads(pool.read_text().splitlines()[0])["src_content"])["label"] == "3"


ROWS = "file,caption\na.png,one\n"


@pytest.mark.parametrize(
    "content",
    [
        ROWS.encode("utf-16"),
        ROWS.replace("\n", "\r\n").encode("utf-16-be").join([b"\xfe\xff", b""]),
        ROWS.replace("\n", "\r"),
        ROWS.replace("\n", "\r").encode("utf-16"),
        ROWS.replace(",", "\t").encode("utf-16"),  # Excel's "Unicode text"
        ROWS.replace("a.png", ".\\A.PNG"),
        "file|caption\na.png|one\n",
        'file,caption\na.png,"one"\r\n\r\n',
        "  File , CAPTION,,\na.png ,one,,\n,,,\n",
    ],
)
def test_a_spreadsheets_file_reads_however_it_was_saved(content, root):
    put(root / "captions.csv", content)
    assert read(root)[1] == [("a.png", "one")]


def test_names_are_found_in_every_form_of_unicode(root):
    name = "Blüte é.png"
    draw(root / "x" / unicodedata.normalize("NFD", name))
    for form in ("NFC", "NFD"):
        put(root / "captions.csv", f"file,caption\nx\\{unicodedata.normalize(form, name)},one\n")
        assert [said for _, said in read(root)[1]] == ["one"]


@pytest.mark.parametrize(
    ("file", "content", "rule"),
    [
        ("captions.csv", "file,caption\n\nz.png,x\n", "captions.csv:3: no such picture: 'z.png'"),
        ("captions.csv", "file,caption\n,x\n", "captions.csv:2: file is empty"),
        ("captions.csv", "file,caption\nnote.md,x\n", "csv:2: 'note.md' is no picture that is re"),
        ("captions.csv", "file,caption\n../a.png,x\n", "csv:2: file '../a.png' leaves the root"),
        ("captions.csv", "file,caption\nC:\\x\\a.png,x\n", r"csv:2: file 'C:.* is absolute"),
        ("captions.csv", "one,two\nz.png,x\n",
         "csv:1: no column file; the first line must name them, it has 'one', 'two'"),
        ("captions.csv", "a.png,x\nb.png,y\nc.png,z\n", "csv:1: names a picture; the first line m"),
        ("captions.csv", "x|a.png|sub/c.png\ny|b.png|\n", "csv:1: names a picture; the first line"),
        ("captions.csv", "file,one,two\na.png,x,y\n", "csv:1: no column caption; the first line m"),
        ("captions.csv", ROWS.replace("one", "Blüte").encode("cp1252"),
         "csv:2: not UTF-8 at byte 8; in Windows-1252 it is 'ü': save the file as UTF-8"),
        ("captions.csv", ROWS.encode("utf-16-le"), "csv:1: looks like UTF-16 without its mark"),
        ("captions.csv", "x" * 10**6 + ",caption\nz.png,x\n", "captions.csv:1: no column file"),
        ("sub/metadata.csv", "file_name,text\nz.png,x\n", "metadata.csv:2: no such picture"),
        ("Flickr8k.token.txt", "a.png#0\tone\na.png one\n", "txt:2: not <picture>#<number>, a tab"),
        ("captions_val.json", "[]", "captions_val.json: not a JSON object"),
        ("captions_val.json", b"\xff", "captions_val.json:1: not UTF-8 at byte 0"),
        ("captions_val.json", '{"images": {}}', "images is not a list of objects, as COCO's"),
        ("captions_val.json", {**COCO, "annotations": [{"image_id": 1}]},
         r"captions_val.json: annotations\[0\]: caption is missing"),
        ("captions_val.json", {**COCO, "annotations": [{"image_id": 9, "caption": "x"}]},
         r"captions_val.json: annotations\[0\]: image_id 9 is not among the images"),
        ("captions_val.json",
         {**COCO, "images": [{"id": 1, "file_name": name} for name in ("b.png", "z.png")]},
         r"captions_val.json: images\[1\]: no such picture: 'z.png'"),
        ("a.txt", b"Bl\xfcte", "a.txt:1: not UTF-8 at byte 2; in Windows-1252 it is"),
        ("a.txt", "x" * 2**20 + "y", "a.txt: is larger than 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_at_its_line(file, content, rule, root):
    put(root / "note.md", "no picture")
    put(root / file, content)
    with pytest.raises(DataError, match=rule) as caught:
        read(root)
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


def test_bad_rows_are_left_out_and_listed(root):
    put(root / "captions.csv", b"file,caption\nz.png,x\na.png,one\n\xff,x\nb.png,two\n")
    faults = Faults(2)
    assert read(root, faults)[1] == AB
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in faults.found] == ["2", "4"]
    put(root / "captions.csv", "file,caption\nc.png,x\n")
    draw(root / "other" / "c.png")
    with pytest.raises(DataError, match=r"'c.png' lies in several folders: 'other/c.png' and 'sub"):
        read(root)


def test_pillow_says_nothing_of_its_own(root):
    """What its readers warn of and log, an own process would print."""
    whole = noted(root / "a.tif", "TIFF", exif=exif(described=b"a dog")).read_bytes()
    samples = whole.index(b"\x15\x01\x03\x00\x01\x00\x00\x00")  # SamplesPerPixel
    (root / "a.tif").write_bytes(whole[: samples + 8] + b"\xff" + whole[samples + 9 :])
    words = [sys.executable, "-m", "elva", "data", "convert", "folder", str(root),
             "--skip-bad", "1", "--output", str(root.parent / "data")]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "1 bad row left out" in done.stdout
    assert "samples" not in done.stderr.casefold() and "warn" not in done.stderr.casefold()


# -- in the pictures themselves ------------------------------------------------------------------

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:format="image/jpeg">
<dc:title><rdf:Alt><rdf:li xml:lang="de-DE">Blüte</rdf:li>
<rdf:li xml:lang="x-default">A blossom &amp; bee</rdf:li></rdf:Alt></dc:title>
<dc:subject><rdf:Bag><rdf:li>garden</rdf:li></rdf:Bag></dc:subject>
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">In May,
in the garden</rdf:li></rdf:Alt></dc:description>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>""".encode()

SHORT = XMP.replace(b'dc:format="image/jpeg"', b'dc:title="Short" dc:format="image/jpeg"')
BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + XMP.replace(b"bee", b"&b;")


def exif(**tags):
    found = Image.Exif()
    numbers = {"described": 0x010E, "title": 0x9C9B, "comment": 0x9C9C}
    for name, value in tags.items():
        found[numbers[name]] = value
    return found.tobytes()


def iptc(*fields):
    """A Photoshop block of JPEG with IPTC's record 2."""
    rows = b"".join(
        b"\x1c\x02" + bytes([number]) + len(text).to_bytes(2, "big") + text
        for number, text in fields
    )
    block = b"8BIM\x04\x04\x00\x00" + len(rows).to_bytes(4, "big") + rows + b"\0" * (len(rows) % 2)
    content = b"Photoshop 3.0\0" + block
    return b"\xff\xed" + (len(content) + 2).to_bytes(2, "big") + content


def noted(path, kind, segment=b"", **settings):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), tuple(path.stem.encode()[:1] * 3)).save(stream, kind, **settings)
    content = stream.getvalue()
    path.write_bytes(content[:2] + segment + content[2:] if segment else content)
    return path


def chunks(**texts):
    info = PngImagePlugin.PngInfo()
    for name, value in texts.items():
        info.add_itxt(name.replace("_", ":"), value)
    return info


BLOSSOM = {"title": "A blossom & bee", "description": "In May, in the garden"}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("JPEG", {"xmp": XMP}, BLOSSOM),
        ("WEBP", {"xmp": XMP}, BLOSSOM),
        ("PNG", {"pnginfo": chunks(**{"XML_com.adobe.xmp": XMP.decode()})}, BLOSSOM),
        ("JPEG", {"xmp": SHORT}, {**BLOSSOM, "title": "Short"}),
        ("JPEG", {"xmp": BOMB}, {}),
        ("JPEG", {"xmp": XMP[:400]}, {}),
        ("JPEG", {"xmp": BOMB, "exif": exif(described=b"a dog\0")}, {"description": "a dog"}),
        ("JPEG", {"exif": exif(described="Blüte".encode())}, {"description": "Blüte"}),
        ("JPEG", {"exif": exif(described="Blüte".encode("cp1252"))}, {"description": "Blüte"}),
        ("WEBP", {"exif": exif(title="Blüte\0".encode("utf-16-le"))}, {"title": "Blüte"}),
        ("PNG", {"exif": exif(comment="a dog\0".encode("utf-16-le"))}, {"description": "a dog"}),
        ("JPEG", {"exif": exif(described=b"OLYMPUS DIGITAL CAMERA         ")}, {}),
        ("JPEG", {"exif": exif(described=b"  a\r\n dog ", title=b"a\0")},
         {"description": "a dog", "title": "a"}),
        ("JPEG", {"exif": exif(described=b"IMG_1.jpg")}, {}),
        ("JPEG", {"exif": exif(described=b"DCIM\\100MEDIA\\DJI_0007.JPG")}, {}),
        ("JPEG", {"exif": exif(described=b"Picnic, 2019")}, {"description": "Picnic, 2019"}),
        ("JPEG", {"exif": exif(title="My digital camera\0".encode("utf-16-le"))},
         {"title": "My digital camera"}),
        ("PNG", {"pnginfo": chunks(Title="dog", Comment="Created with GIMP")}, {"title": "dog"}),
        ("JPEG", {"segment": iptc((5, b"Blossom"), (120, "Blüte".encode()))},
         {"title": "Blossom", "description": "Blüte"}),
        ("JPEG", {"segment": iptc((105, b"Bl\xfcte"), (25, b"key"), (25, b"word"))},
         {"title": "Blüte"}),
        ("JPEG", {}, {}),
    ],
)  # fmt: skip
def test_a_pictures_own_title_and_description(kind, settings, expected, tmp_path):
    path = noted(tmp_path / "IMG_1.jpg", kind, **settings)
    assert titles.read(path) == expected


def test_own_titles_are_captions_and_metadata(root):
    noted(root / "a.jpg", "JPEG", xmp=XMP)
    noted(root / "b.jpg", "JPEG", exif=exif(described=b"a dog"))
    found, said = read(root)
    assert said == [("a.jpg", "A blossom & bee"), ("a.jpg", "In May, in the garden"),
                    ("b.jpg", "a dog")]  # fmt: skip
    assert found.columns == {root / "a.jpg": BLOSSOM, root / "b.jpg": {"description": "a dog"}}
    counts = convert_file("folder", root, root.parent / "data", split="test")
    assert counts["queries"] == {"t2i": 3} and counts["candidates"] == 5
    assert counts["notices"][0] == (
        "3 captions of 2 pictures from titles and descriptions in their files; 3 pictures have none"
    )
    pool = load(root.parent / "data", split="test").pool("t2i")
    assert pool.extra(0)["title"] == "A blossom & bee"


def test_damaged_notes_are_none_and_never_an_error(tmp_path):
    whole = noted(tmp_path / "a.jpg", "JPEG", xmp=XMP, exif=exif(described=b"a dog"),
                  segment=iptc((5, b"Blossom"))).read_bytes()  # fmt: skip
    read_ = 0
    for place in range(0, min(len(whole), 1600), 7):
        for byte in (0, 255):
            (tmp_path / "a.jpg").write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            found = titles.read(tmp_path / "a.jpg")
            read_ += bool(found)
            assert set(found) <= {"title", "description"}
            assert all("\n" not in one and one == one.strip() for one in found.values())
        (tmp_path / "a.jpg").write_bytes(whole[:place])
        titles.read(tmp_path / "a.jpg")
    assert read_ > 300
