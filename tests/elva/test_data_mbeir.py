"""The M-BEIR reader: what it reads, and that every fault is one line naming file and rule."""

import io
import json
import random
import re
import struct
import zlib

import pytest
from PIL import Image

from elva.data import extras, load, mbeir, schema, strict
from elva.data import table as pool_file
from elva.data.instructions import write_instructions
from elva.errors import DataError

PROMPTS = {
    ("text", "image"): ("find it.", "Show it.", "Draw it.", "Which one?"),
    ("image,text", "image"): ("Change it.", "Edit it.", "Alter it.", "Modify it."),
}


def picture(format="PNG", size=(8, 4), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size, 200 if mode == "L" else "red").save(stream, format)
    return stream.getvalue()


def query(**changed):
    row = {
        "qid": "9:1",
        "query_txt": "a cat",
        "query_img_path": None,
        "query_modality": "text",
        "query_src_content": None,
        "pos_cand_list": ["9:1"],
        "neg_cand_list": [],
        "task_id": 0,
    }
    return {**row, **changed}


def candidate(**changed):
    row = {
        "did": "9:1",
        "txt": None,
        "img_path": "mbeir_images/a.png",
        "modality": "image",
        "src_content": None,
    }
    return {**row, **changed}


def toy(root):
    """One dataset, tasks 0 and 7, written by our writer."""
    (root / "mbeir_images").mkdir(parents=True)
    (root / "mbeir_images" / "a.png").write_bytes(picture())
    pool = [candidate(), candidate(did="9:2"), candidate(did="9:3")]
    mbeir.write_pool(root, "toy_task0", pool)
    mbeir.write_pool(root, "toy_task7_test", pool)
    write_instructions(root, "toy", 9, PROMPTS)
    mbeir.write_queries(
        root,
        "toy_task0",
        "test",
        [query(), query(qid="9:2", query_txt='"is it?"\r', neg_cand_list=["9:2", "9:3"])],
    )
    change = query(
        query_modality="text,image", query_img_path="mbeir_images/a.png", task_id=7, qid="9:5"
    )
    mbeir.write_queries(root, "toy_task7", "test", [change])
    return root


@pytest.fixture
def directory(tmp_path):
    return toy(tmp_path)


QUERIES = "query/test/mbeir_toy_task0_test.jsonl"
POOL = "cand_pool/local/mbeir_toy_task0_cand_pool.jsonl"
QRELS = "qrels/test/mbeir_toy_task0_test_qrels.txt"
TSV = "instructions/query_instructions.tsv"


def test_reads_what_was_written(directory):
    dataset = load(directory, split="test")
    first, second, change = dataset.queries
    assert (first.id, first.text, first.task, first.positives) == ("9:1", "A cat.", "t2i", ("9:1",))
    assert first.prompted == "Find it. a cat."
    assert (second.text, second.negatives) == ("Is it?", ("9:2", "9:3"))
    assert (change.modality, change.task) == ("image,text", "it2i")
    assert change.image == directory / "mbeir_images" / "a.png"
    pool = dataset.pool("t2i")
    assert pool.ids == ["9:1", "9:2", "9:3"]
    assert [pool.row(id) for id in pool.ids] == [0, 1, 2]
    assert pool[-1].id == "9:3" and "9:3" in pool and "9:4" not in pool and "nonsense" not in pool
    assert pool[0].load_image().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(KeyError):
        pool.row("8:1")


def test_both_list_forms_are_one(directory):
    path = directory / QUERIES
    path.write_text(json.dumps(query(pos_cand_list=[{"did": "9:1"}, "9:2"])) + "\n")
    (directory / QRELS).unlink()
    assert load(directory, tasks=["t2i"], split="test").queries[0].positives == ("9:1", "9:2")


def test_tasks_may_be_named_by_kind_or_by_set(directory):
    assert {q.task for q in load(directory, tasks=["it2i"], split="test").queries} == {"it2i"}
    assert {q.task for q in load(directory, tasks=["toy_task0"], split="test").queries} == {"t2i"}
    with pytest.raises(DataError, match="no queries for i2t"):
        load(directory, tasks=["i2t"], split="test")
    with pytest.raises(DataError, match="no query file"):
        load(directory, split="val")
    with pytest.raises(DataError, match="split 'dev' is not one of"):
        load(directory, split="dev")


def test_a_pool_of_the_split_is_preferred(directory):
    mbeir.write_pool(directory, "toy_task0_test", [candidate(did="9:1"), candidate(did="9:2")])
    mbeir.write_queries(directory, "toy_task0", "test", [query()])
    assert len(load(directory, tasks=["t2i"], split="test").pool("t2i")) == 2


def test_a_large_pool_is_read_once_and_mapped_from_then_on(directory, tmp_path, monkeypatch):
    path = directory / POOL
    small = mbeir.read_pool(path, directory)
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pool_file, "MAPPED_FROM_BYTES", 0)
    monkeypatch.setattr(pool_file, "BATCH_ROWS", 2)
    copy = tmp_path / "pool.jsonl"
    copy.write_bytes(path.read_bytes())
    first = mbeir.read_pool(copy, directory)
    assert list(first) == list(small) and first[2].where == f"{copy}:3"
    assert [first.row(id) for id in small.ids] == list(range(len(small)))
    monkeypatch.setattr(mbeir, "records", lambda path: pytest.fail("read again"))
    again = mbeir.read_pool(copy, directory)
    assert list(again) == list(small) and again.row(small.ids[2]) == 2
    monkeypatch.undo()
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pool_file, "MAPPED_FROM_BYTES", 0)
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:2]))
    assert len(mbeir.read_pool(copy, directory)) == 2
    copy.write_text(copy.read_text() + copy.read_text().splitlines()[1] + "\n")
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(DataError, match=f"^{copy}:3: did {small.ids[1]} again"):
            mbeir.read_pool(copy, directory)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  a cat \n", "A cat."),
        ('"a\r cat"', "A cat."),
        ("Really?", "Really?"),
        ("stop!", "Stop!"),
        ("", ""),
        ("été", "Été."),
    ],
)
def test_normalise(raw, expected):
    assert schema.normalise(raw) == expected


def as_line(row):
    return json.dumps(row).encode()


MALFORMED = {
    # name: (file, bytes of its second line, rule)
    "not json": (QUERIES, b"{", "not JSON"),
    "array": (QUERIES, b"[1]", "not a JSON object"),
    "blank line": (QUERIES, b"\n{}", "not JSON"),
    "bom": (QUERIES, b"\xef\xbb\xbf{}", "not JSON"),
    "not utf-8": (QUERIES, b'{"qid": "\xff"}', "not UTF-8 at byte 9"),
    "surrogate": (QUERIES, b'{"qid": "\\ud800"}', "lone surrogate"),
    "NaN": (QUERIES, b'{"qid": NaN}', "NaN is not JSON"),
    "Infinity": (POOL, b'{"did": -Infinity}', "-Infinity is not JSON"),
    "duplicate key": (QUERIES, b'{"qid": "9:7", "qid": "9:8"}', "key 'qid' twice"),
    "nested duplicate key": (POOL, b'{"a": {"b": 1, "b": 1}}', "key 'b' twice"),
    "deep nesting": (QUERIES, b"[" * 100_000, "nested too deeply"),
    "huge number": (QUERIES, b'{"qid": ' + b"9" * 5000 + b"}", "not JSON"),
    "missing field": (QUERIES, b'{"qid": "9:7"}', "pos_cand_list is missing"),
    "id form": (QUERIES, as_line(query(qid="nine")), "is not <dataset>:<number>"),
    "id sign": (QUERIES, as_line(query(qid="9:-1")), "is not <dataset>:<number>"),
    "id digits": (QUERIES, as_line(query(qid="9:\u0663")), "is not <dataset>:<number>"),
    "id size": (QUERIES, as_line(query(qid="9:10000000")), "is not <dataset>:<number>"),
    "id dataset": (QUERIES, as_line(query(qid="x:1")), "is not <dataset>:<number>"),
    "id dataset's size": (QUERIES, as_line(query(qid="123456789:1")), "is not <dataset>:<number>"),
    "id zero": (QUERIES, as_line(query(qid="09:1")), "a number begins with 0"),
    "id type": (POOL, as_line(candidate(did=7)), "holds 7, not an id"),
    "duplicate qid": (QUERIES, as_line(query()), "qid 9:1 again, first in .*:1"),
    "duplicate did": (POOL, as_line(candidate()), "did 9:1 again"),
    "no positives": (
        QUERIES,
        as_line(query(qid="9:7", pos_cand_list=[])),
        "pos_cand_list is empty",
    ),
    "list type": (QUERIES, as_line(query(qid="9:7", pos_cand_list="9:1")), "is not a list"),
    "list member": (
        QUERIES,
        as_line(query(qid="9:7", pos_cand_list=[{}])),
        "holds None, not an id",
    ),
    "unknown positive": (
        QUERIES,
        as_line(query(qid="9:7", pos_cand_list=["9:77"])),
        "candidate 9:77 is not in the pool",
    ),
    "unknown negative": (
        QUERIES,
        as_line(query(qid="9:7", neg_cand_list=["9:77"])),
        "candidate 9:77 is not in the pool",
    ),
    "task": (QUERIES, as_line(query(qid="9:7", task_id=3)), "task_id 3 is not the file's 0"),
    "modality": (QUERIES, as_line(query(qid="9:7", query_modality="audio")), "'audio' is not text"),
    "other modality": (
        QUERIES,
        as_line(query(qid="9:7", query_modality="image")),
        "query_modality is image, not text",
    ),
    "text type": (QUERIES, as_line(query(qid="9:7", query_txt=3)), "query_txt is not a string"),
    "no text": (QUERIES, as_line(query(qid="9:7", query_txt=' "" ')), "query_txt is empty"),
    "no instruction": (QUERIES, as_line(query(qid="3:7")), "no instruction for dataset 3"),
    "no picture": (POOL, as_line(candidate(did="9:7", img_path=None)), "img_path is empty"),
    "extra text": (POOL, as_line(candidate(did="9:7", txt="a")), "txt is there, but modality"),
    "parent": (POOL, as_line(candidate(img_path="a/../../b.png")), "leaves the root"),
    "backslash parent": (POOL, as_line(candidate(img_path="a\\..\\b.png")), "leaves the root"),
    "absolute": (POOL, as_line(candidate(img_path="/etc/passwd")), "is absolute"),
    "drive": (POOL, as_line(candidate(img_path="C:\\b.png")), "is absolute"),
    "url": (POOL, as_line(candidate(img_path="https://a.b/c.png")), "is a URL"),
    "file url": (POOL, as_line(candidate(img_path="file:///c.png")), "is a URL"),
    "data url": (POOL, as_line(candidate(img_path="data:image/png;base64,")), "is a URL"),
    "null character": (POOL, as_line(candidate(img_path="a\0.png")), "null character"),
    "qrels columns": (QRELS, b"9:1 0 9:1", "3 columns"),
    "qrels relevance": (QRELS, b"9:1 0 9:1 yes 0", "relevance 'yes' is no whole number"),
    "qrels id": (QRELS, b"nine 0 9:1 1 0", "is not <dataset>:<number>"),
    "qrels query": (QRELS, b"9:99 0 9:1 1 0", "query 9:99 is not in the query file"),
    "qrels candidate": (QRELS, b"9:1 0 9:99 1 0", "candidate 9:99 is not in the pool"),
    "qrels positive": (QRELS, b"9:1 0 9:3 1 0", "9:3 is not a positive of query 9:1"),
    "instructions columns": (TSV, b"text\timage\ttoy", "not query_modality"),
    "instructions number": (TSV, b"text\timage\ttoy\tnine\tFind.", "not query_modality"),
    "instructions prompts": (TSV, b"text\timage\ttoy\t9\t", "not query_modality"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_line_is_one_line_with_file_line_and_rule(directory, name):
    file, line, rule = MALFORMED[name]
    path = directory / file
    first = path.read_bytes().split(b"\n")[0]
    path.write_bytes(first + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        load(directory, tasks=["t2i"], split="test")
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert re.search(rule, message)
    assert "\n" not in message and len(message) < 500


def test_a_path_is_as_long_as_a_file_system_takes():
    longest = "/".join(["a" * 199] * 15) + "a"
    assert len(longest) == 3000
    for path in ("é" * 127 + "a", longest):
        assert strict.Record("a:1", {"path": path}).path("path") == path
        with pytest.raises(DataError, match="is longer than a file's name may be"):
            strict.Record("a:1", {"path": f"{path}a"}).path("path")


def test_a_line_over_the_cap_is_refused_without_reading_on(directory, monkeypatch):
    monkeypatch.setattr(strict, "MAX_LINE_BYTES", 1000)
    path = directory / QUERIES
    path.write_bytes(as_line(query(query_txt="a" * 2000)) + b"\n")
    with pytest.raises(DataError, match=r":1: line is longer than 1000 bytes"):
        load(directory, tasks=["t2i"], split="test")


def test_a_rule_that_quotes_a_long_field_stays_short(directory):
    (directory / QUERIES).write_bytes(as_line(query(qid="x" * 1_000_000)) + b"\n")
    with pytest.raises(DataError, match=r"x{100}") as caught:
        load(directory, tasks=["t2i"], split="test")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "file",
    [
        QUERIES,
        TSV,
        *(pytest.param(x, marks=pytest.mark.thorough) for x in (POOL, QRELS, "grains.jsonl")),
    ],
)
def test_damaged_bytes_load_or_raise_data_error(directory, file):
    """400 random edits of each file: never another exception, never two lines."""
    grain = schema.Grain("a cat", "entity", (0, 5))
    extras.write_extras(directory, {"9:1": [grain]}, {}, {})
    path, draw = directory / file, random.Random(file)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        data, at = bytearray(whole), draw.randrange(len(whole))
        data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        path.write_bytes(data)
        try:
            load(directory, tasks=["t2i"], split="test")
        except DataError as error:
            refused += 1
            assert str(directory) in str(error) and "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize("missing", [POOL, TSV])
def test_a_missing_file_is_named(directory, missing):
    (directory / missing).unlink()
    with pytest.raises(DataError, match=r"No such file|no candidate pool"):
        load(directory, tasks=["t2i"], split="test")


def test_a_file_of_another_name_is_named(directory):
    folder = directory / "query" / "test"
    (folder / "._mbeir_toy_task0_test.jsonl").write_bytes(b"\0\5\x16\7")
    (folder / "mbeir_toy_task0_test.jsonl.gz").write_bytes(b"\x1f\x8b")
    (line,) = load(directory, split="test").notices
    assert line.startswith(f"{folder}: passed over ._mbeir_toy_task0_test.jsonl, mbeir_toy_task0_")
    (folder / "mbeir_toy_task9_test.jsonl").write_text("")
    with pytest.raises(DataError, match="not named mbeir_<dataset>_task<number>_test"):
        load(directory, split="test")


@pytest.mark.parametrize(
    ("grains", "rule"),
    [
        ("cat", "grains is not a list"),
        ([7], "a grain is not"),
        ([{"text": "cat", "type": "entity"}], "a grain is not"),
        ([{"text": "cat", "type": "entity", "span": [2]}], "a grain is not"),
        ([{"text": "cat", "type": "entity", "span": [2, True]}], "a grain is not"),
        ([{"text": "cat", "type": "entity", "span": [1, 4]}], "'cat' is not at 1:4"),
        ([{"text": "", "type": "entity", "span": [2, 2]}], "'' is not at 2:2"),
        ([{"text": ".", "type": "entity", "span": [-1, 6]}], "'.' is not at -1:6"),
    ],
)
def test_grains_must_be_where_they_say(directory, grains, rule):
    path = directory / "grains.jsonl"
    path.write_text(json.dumps({"qid": "9:1", "grains": grains}) + "\n")
    with pytest.raises(DataError, match=rule) as caught:
        load(directory, tasks=["t2i"], split="test")
    assert str(caught.value).startswith(f"{path}:1: ")


def test_grains_and_minimal_pairs_are_read(directory):
    grain = schema.Grain("a cat", "entity", (0, 5))
    extras.write_extras(directory, {"9:1": [grain], "9:999": [grain]}, {}, {"9:1": ["9:1", "9:2"]})
    dataset = load(directory, split="test")
    assert dataset.queries[0].grains == (grain,)
    assert dataset.queries[1].grains is None
    assert dataset.minimal_pairs == {"9:1": ["9:1", "9:2"]}
    extras.write_extras(directory, {}, {}, {"9:1": ["9:77"]})
    with pytest.raises(DataError, match="candidate 9:77 is not in the pool"):
        load(directory, split="test")


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


BAD_PICTURES = {
    "empty": (b"", "unreadable picture"),
    "text": (b"hello", "unreadable picture"),
    "truncated": (picture(size=(64, 64), mode="L")[:-30], "unreadable picture"),
    "cut in the header": (picture()[:20], "unreadable picture"),
    "icon": (picture("ICO"), "unreadable picture: .*a.png: it is an icon"),
    "document": (picture("PDF"), "unreadable picture: .*a.png: it is a PDF document"),
    "too many pixels": (png_header(8001, 8001), "8001 x 8001 is more than 64000000 pixels"),
    "bomb warning": (png_header(10_000, 10_000), "10000|pixels"),
    "bomb": (png_header(2**31 - 1, 2**31 - 1), "unreadable picture"),
    "too long": (png_header(201, 1), "201 x 1 is longer than 200:1"),
    "no height": (png_header(8, 0), "unreadable picture"),
    "body missing": (png_header(300, 300), "unreadable picture"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused_in_one_line(directory, name):
    data, rule = BAD_PICTURES[name]
    (directory / "mbeir_images" / "a.png").write_bytes(data)
    pool = load(directory, tasks=["t2i"], split="test").pool("t2i")
    with pytest.raises(DataError) as caught:
        pool[1].load_image()
    message = str(caught.value)
    assert message.startswith(f"{directory / POOL}:2: ")
    assert re.search(rule, message) and "\n" not in message


def test_a_missing_picture_is_named(directory):
    (directory / "mbeir_images" / "a.png").unlink()
    pool = load(directory, tasks=["t2i"], split="test").pool("t2i")
    with pytest.raises(DataError, match=r":1: no such picture: .*a\.png"):
        pool[0].load_image()
