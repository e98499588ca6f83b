"""Files as people have them: spreadsheets' csv, published layouts, folders of pictures."""

import json
import shutil
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from elva.cli import app
from elva.data import load, strict
from elva.data.formats import convert_file, writer
from elva.data.formats.rows import rows, table_files
from elva.data.mbeir import read_sets
from elva.data.strict import Faults
from elva.errors import DataError


def draw(path, colour="red", kind="PNG", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, kind)
    return path


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def converted(format, source, output, split="train", **settings):
    """Counts, and [(query text, texts of its answers, texts of its negatives)]."""
    counts = convert_file(format, source, output, split=split, **settings)
    data = load(output, split=split)
    found = []
    for query in data.queries:
        pool = data.pool(query.task)
        right, wrong = ([pool[pool.row(d)].text for d in dids]
                        for dids in (query.positives, query.negatives))  # fmt: skip
        found.append((query.text, right, wrong))
    return counts, found


# -- csv and jsonl -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "file,caption\na.png,x\n",
        '\ufeff"file","caption"\n"a.png","x"\n',
        "file,caption,,\na.png,x,,\n",
        "file,caption\na.png,x\n,\n,\n",
        "file,caption\na.png,x,,\n\n",
        "file;caption\na.png;x\n",
        "file\tcaption\na.png\tx\n",
        "sep=;\r\nfile;caption\r\na.png;x\r\n",
        "File,Caption\na.png,x\n",
        "FILE;CAPTION;year\na.png;x;2001\n",
        ",file,caption\n0,a.png,x\n",
        "\nfile,caption\na.png,x\n",
    ],
)
def test_a_table_of_captions_reads_however_a_spreadsheet_wrote_it(text, tmp_path):
    draw(tmp_path / "s" / "a.png")
    (tmp_path / "s" / "captions.csv").write_bytes(text.encode())
    counts = convert_file("folder", tmp_path / "s", tmp_path / "data")
    assert counts["queries"] == {"t2i": 1} and counts["candidates"] == 1
    assert [query.text for query in load(tmp_path / "data").queries] == ["X."]


def test_cells_are_as_long_as_a_line_may_be(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"sent0,sent1\n{'x' * 140_000},y\n")
    _, ((text, _, _),) = converted("nli", path, tmp_path / "data")
    assert len(text) == 140_001


def test_a_cell_without_a_column_is_not_dropped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sent0,sent1,,\na,b,,\nc,d, e,\n")
    with pytest.raises(DataError, match=r"a.csv:3: 4 cells, not 2: ' e' is too many"):
        list(rows(path, ("sent0",), Faults()))


def test_lines_that_are_no_text_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(strict, "MAX_LINE_BYTES", 1000)
    path, bad = tmp_path / "a.csv", b"\xff,b\n" + b"x" * 2500 + b"\n" + b'a,"b"c\n'
    path.write_bytes(b"sent0,sent1\na,b\n" + bad + b"c,d\n")
    faults = Faults(3)
    assert [record.fields["sent0"] for record in rows(path, ("sent0",), faults)] == ["a", "c"]
    assert [line.split(": ")[0][-1] for line in faults.found] == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("sent0,sent1".encode("utf-32"), "a.csv:1: is UTF-32; save the file as UTF-8"),
        ("sent0,sent1".encode("utf-16-le"), "a.csv:1: looks like UTF-16 without its mark; save"),
        (
            b"sent0,sent1\nBl\xfcte,b\n",
            "a.csv:2: not UTF-8 at byte 2; in Windows-1252 it is 'ü': save the file as UTF-8",
        ),
        ("sent0,sent1\na,b\n".encode("utf-16")[:-1], "a.csv:2: not UTF-16 at byte"),
        (b"file;title\na;b\n", "a.csv:1: no columns sent0,sent1 nor .*; there are file, title"),
    ],
)
def test_what_a_table_is_not_is_named(content, rule, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=rule):
        convert_file("nli", tmp_path / "a.csv", tmp_path / "data")


def test_a_separator_that_was_seen_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("one;two\n1;2\n")
    with pytest.raises(DataError, match="no column 'x'; there are one, two, separated by ';'"):
        list(rows(tmp_path / "a.csv", ("x",), Faults()))


def test_jsonl_with_a_mark_and_empty_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    row = json.dumps({"anchor": "a", "positive": "b", "negative": None})
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\n\n \r\n")
    assert converted("nli", path, tmp_path / "data")[1] == [("A.", ["B."], [])]
    path.write_bytes(row.encode() + b"\n\n" + row.encode())
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON: an empty line"):
        convert_file("nli", path, tmp_path / "torn")


def test_pairs_are_data_and_equal_questions_share_their_answers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sent0,sent1\na,b\nA.,c\nd,b\n")
    counts, found = converted("nli", path, tmp_path / "data")
    assert found == [("A.", ["B.", "C."], []), ("A.", ["C.", "B."], []), ("D.", ["B."], [])]
    assert counts["candidates"] == 2
    path.write_text("sent0,sent1,hard_neg\na,b,c\na,c,e\n")
    _, found = converted("nli", path, tmp_path / "again")
    assert found == [("A.", ["B.", "C."], []), ("A.", ["C.", "B."], ["E."])]


# -- published layouts ---------------------------------------------------------------------------


def test_mmeb_as_it_lies(tmp_path):
    root, images = tmp_path / "mmeb", tmp_path / "unpacked"
    picture = draw(images / "VisDial" / "1.png")
    row = {"qry": "<|image_1|>\nq", "qry_image_path": "VisDial/1.png", "pos_text": "p",
           "pos_image_path": "", "neg_text": ["a", "", "b"], "neg_image_path": None}  # fmt: skip
    many = [{**row, "pos_text": f"p{i}"} for i in range(2)]
    for i, one in enumerate(many):
        parquet(root / "VisDial" / f"original-{i:05d}-of-00002.parquet", [one])
    parquet(root / "HatefulMemes" / "original-00000-of-00001.parquet", [{**row, "qry": "r"}])
    with pytest.raises(DataError, match=r"no such picture: VisDial/1.png in .*; images names"):
        convert_file("mmeb", root, tmp_path / "data")
    counts, found = converted("mmeb", root, tmp_path / "data", images=images)
    assert counts["queries"] == {"it2t": 3}
    assert counts["sets"] == {"mmeb_HatefulMemes_task6": 1, "mmeb_VisDial_task6": 2}
    words = ["data", "convert", "mmeb", str(root), "--images", str(images), "--output"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "called")])
    assert "  mmeb_HatefulMemes_task6: 1\n  mmeb_VisDial_task6: 2\n" in done.stdout
    sets = read_sets(tmp_path / "data", split="train")
    assert [(one.stem, len(one.queries), len(one.pool)) for one in sets] == [
        ("mmeb_HatefulMemes_task6", 1, 3), ("mmeb_VisDial_task6", 2, 4)]  # fmt: skip
    assert found == [
        ("R.", ["P."], ["A.", "B."]),
        ("Q.", ["P0.", "P1."], ["A.", "B."]),
        ("Q.", ["P1.", "P0."], ["A.", "B."]),
    ]
    (root / "VisDial" / "VisDial").mkdir()
    picture.rename(root / "VisDial" / "VisDial" / "1.png")
    counts = convert_file("mmeb", root / "VisDial", tmp_path / "subset", name="own")
    assert counts["sets"] == {"own_VisDial_task6": 2} and counts["pictures"] == 1
    shutil.copytree(root / "VisDial", root / "ImageNet-1K")
    counts = convert_file("mmeb", root / "ImageNet-1K", tmp_path / "dash")
    assert counts["sets"] == {"mmeb_ImageNet_1K_task6": 2}
    (root / "VisDial" / "original-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"VisDial: 1 of 2 shards original-\*"):
        convert_file("mmeb", root / "VisDial", tmp_path / "torn")
    with pytest.raises(DataError, match=r"images is for .*mmeb, .*tevatron, got it for nli"):
        convert_file("nli", root, tmp_path / "torn", images=images)


def test_words_in_marks_are_words(tmp_path):
    said = "<|vision_start|><|image_pad|><|vision_end|> find it"
    draw(tmp_path / "red.png")
    row = {"qry": said + "<|image_1|>", "qry_image_path": "red.png", "pos_text": "dog",
           "pos_image_path": ""}  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", row)
    assert converted("mmeb", path, tmp_path / "data")[1] == [(said + ".", ["Dog."], [])]


def test_mmebs_own_candidates_are_of_one_kind(tmp_path):
    draw(tmp_path / "r.png")
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a", "<|image_1|>"],
           "tgt_img_path": ["", "r.png"]}  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError, match=r"a.jsonl:1: candidates of several kinds, text and image"):
        convert_file("mmeb-test", path, tmp_path / "data", split="test")
    path = jsonl(path, row, {**row, "tgt_text": ["a", "b"], "tgt_img_path": [None, None]})
    counts, found = converted("mmeb-test", path, tmp_path / "data", split="test", skip_bad=1)
    assert found == [("Q.", ["A."], [])] and len(counts["bad"]) == 1 and counts["candidates"] == 2
    assert not list((tmp_path / "data").rglob("*.png"))  # nothing of the row that was left out


def test_negatives_of_another_kind_are_refused(tmp_path):
    draw(tmp_path / "r.png")
    row = {"qry": "q", "qry_image_path": "", "pos_text": "a", "pos_image_path": "",
           "neg_text": "", "neg_image_path": "r.png"}  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError, match=r"a.jsonl:1: candidates of several kinds, text and image"):
        convert_file("mmeb", path, tmp_path / "data")


def test_tevatron_as_its_code_reads_it(tmp_path):
    root = tmp_path / "s"
    red = draw(tmp_path / "red.png").read_bytes()
    documents = [{"docid": i, "text": f"t{i}", "image": {"bytes": red, "path": None}}
                 for i in range(3)]  # fmt: skip
    for i, row in enumerate(documents):
        parquet(root / "corpus" / f"train-{i:05d}-of-00003.parquet", [row])
    asked = [{"query_id": 1, "query_text": "q", "query_image": None,
              "positive_document_ids": [1], "negative_document_ids": [0, 1]}]  # fmt: skip
    for i in range(2):
        parquet(root / f"train-{i:05d}-of-00002.parquet", [{**asked[0], "query_id": i}])
    counts, found = converted("tevatron", root, tmp_path / "data")
    assert found == [("Q.", ["T1."], ["T0."])] * 2
    assert counts["queries"] == {"t2it": 2} and counts["pictures"] == 1
    (root / "corpus" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"corpus: 2 of 3 shards train-\*.parquet"):
        convert_file("tevatron", root, tmp_path / "torn")


def test_tevatrons_passages_in_the_rows(tmp_path):
    row = {
        "query_id": "1", "query": "q",
        "positive_passages": [{"docid": "7", "title": "T", "text": "t"}, {"docid": 8, "text": "u"}],
        "negative_passages": [{"docid": "9", "text": "U."}, {"docid": "10", "text": "v"}],
    }  # fmt: skip
    path = jsonl(tmp_path / "train.jsonl", row, {**row, "query_id": "2", "query": "r"})
    counts, found = converted("tevatron", path, tmp_path / "data")
    assert found == [(q, ["T t.", "U."], ["V."]) for q in ("Q.", "R.")]
    assert counts["candidates"] == 3


def test_tevatrons_pictures_are_files_of_its_folder_or_of_another(tmp_path):
    root = tmp_path / "s"
    draw(root / "p" / "red.png")
    draw(root / "p" / "blue.png", "blue")
    jsonl(root / "corpus.jsonl", {"docid": "7", "document_image": "p/blue.png"})
    row = {"query_id": "1", "query_text": "q", "query_image": "p/red.png",
           "positive_document_ids": ["7"]}  # fmt: skip
    path = jsonl(root / "queries.jsonl", row)
    for i, settings in enumerate(({}, {}, {"images": root})):
        convert_file("tevatron", path if i else root, tmp_path / str(i), **settings)
        data = load(tmp_path / str(i))
        (query,), pool = data.queries, data.pool("it2i")
        assert query.load_image().getpixel((0, 0)) == (255, 0, 0)
        assert pool[0].load_image().getpixel((0, 0)) == (0, 0, 255)
    path = jsonl(root / "queries.jsonl", {**row, "query_image": 7})
    with pytest.raises(DataError, match=r"queries.jsonl:1: query_image is not a path or a pict"):
        convert_file("tevatron", root, tmp_path / "bad")
    jsonl(root / "queries.jsonl", {**row, "positive_document_ids": "7"})
    with pytest.raises(DataError, match=r":1: positive_document_ids is not a list of ids"):
        convert_file("tevatron", root, tmp_path / "bad")


SMALLEST = {
    "nli": (11, {"anchor": "a", "positive": "b"}),
    "mmeb": (12, {"qry": "a", "qry_image_path": "", "pos_text": "b", "pos_image_path": ""}),
    "mmeb-test": (12, {"qry_text": "a", "qry_img_path": "", "tgt_text": "b", "tgt_img_path": [""]}),
    "tevatron": (13, {"query_id": "x", "query": "a", "positive_passages": [{"text": "b"}]}),
}


@pytest.mark.parametrize("format", SMALLEST)
def test_the_ids_of_a_format_begin_with_its_number(format, tmp_path):
    """As they stand in every index that was made of them."""
    number, row = SMALLEST[format]
    convert_file(format, jsonl(tmp_path / "a.jsonl", row), tmp_path / "data")
    (query,) = load(tmp_path / "data").queries
    assert (query.id, query.positives) == (f"{number}:1", (f"{number}:1",))


def test_what_shows_another_picture_is_another_candidate(tmp_path):
    """And what shows the same in another file is the same."""
    row = {"qry": "q", "qry_image_path": "", "pos_text": "p"}
    for name, colour, kind in (("a.png", "red", "PNG"), ("b.png", "blue", "PNG"),
                               ("c.bmp", "red", "BMP")):  # fmt: skip
        draw(tmp_path / name, colour, kind)
    names = ("a.png", "b.png", "c.bmp")
    path = jsonl(tmp_path / "a.jsonl", *({**row, "pos_image_path": name} for name in names))
    assert convert_file("mmeb", path, tmp_path / "data")["candidates"] == 2
    asked = [{**row, "qry_image_path": n, "pos_text": n, "pos_image_path": ""} for n in names]
    _, found = converted("mmeb", jsonl(path, *asked), tmp_path / "asked")
    assert [right for _, right, _ in found] == [
        ["A.png.", "C.bmp."], ["B.png."], ["C.bmp.", "A.png."],
    ]  # fmt: skip


def test_answers_that_rows_share_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("sent0,sent1\na,b\na,c\n")
    monkeypatch.setattr(writer, "MAX_ANSWERS", 4)
    assert convert_file("nli", path, tmp_path / "data")["queries"] == {"t2t": 2}
    monkeypatch.setattr(writer, "MAX_ANSWERS", 3)
    with pytest.raises(DataError, match=r"that ask the same have 4 answers .*, more than 3;"):
        convert_file("nli", path, tmp_path / "more")


def test_beir_by_split_with_its_titles_and_grades(tmp_path):
    root = tmp_path / "s"
    jsonl(root / "corpus.jsonl", {"_id": 1, "title": "T", "text": "t"}, {"_id": "b", "text": "u"})
    jsonl(root / "queries.jsonl", *({"_id": i, "text": i, "metadata": {}} for i in "xyz"))
    (root / "qrels").mkdir()
    header = "query-id\tcorpus-id\tscore\n"
    (root / "qrels" / "dev.tsv").write_text(header + "x\t1\t2\nx\tb\t1\ny\tb\t0\ny\t1\t-1\n\n")
    (root / "qrels" / "test.tsv").write_text(header + "z\tb\t1\n")
    counts, found = converted("beir", root, tmp_path / "val", "val")
    assert found == [("X.", ["T t.", "U."], [])]
    assert counts["notices"] == ["1 queries without a right answer are left out"]
    assert [query.id for query in load(tmp_path / "val", split="val").queries] == ["16:1"]
    assert converted("beir", root, tmp_path / "test", "test")[1] == [("Z.", ["U."], [])]
    with pytest.raises(DataError, match=r"no train as .jsonl"):
        convert_file("beir", root, tmp_path / "train")
    (root / "qrels" / "test.tsv").write_text(header + "z\tb\t1\nw\tb\t1\nz\tc\t1\n")
    with pytest.raises(DataError, match=r"test.tsv:4: 'c' is not in the corpus"):
        convert_file("beir", root, tmp_path / "bad", split="test")
    with pytest.raises(DataError, match=r"test.tsv:3: query 'w' is not among the .*; 1 bad"):
        convert_file("beir", root, tmp_path / "bad", split="test", skip_bad=1)


def mirror(root, name, corpus, asked, qrels):
    folder = root / name

    def row(id, text):
        return {"id": id, "modality": "text", "text": text, "image": None}

    for config, items in (("corpus", corpus), ("query", asked)):
        rows = [row(*item) for item in items.items()]
        schema = pa.schema([(n, pa.string()) for n in ("id", "modality", "text", "image")])
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{config}-0-of-1.parquet")
    judged = [dict(zip(("query-id", "corpus-id", "score"), line, strict=True)) for line in qrels]
    parquet(folder / "qrels-00000-of-00001.parquet", judged)
    return folder


def test_a_mirror_keeps_ids_grades_and_instructions(tmp_path):
    qrels = [("2:5", "2:900", 2), ("2:5", "2:7", 0), ("2:5", "2:8", -1), ("2:6", "2:8", 0)]
    folder = mirror(tmp_path, "mbeir_webqa_task1", {f"2:{i}": f"t{i}" for i in (900, 7, 8)},
                    {"2:5": "q", "2:6": "r", "2:7": "s"}, qrels)  # fmt: skip
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n"
    prompts = tmp_path / "instructions" / "query_instructions.tsv"
    prompts.parent.mkdir()
    prompts.write_text(f"{header}text\ttext\tWebQA\t2\tfind the fact\n")
    counts = convert_file("mteb", folder, tmp_path / "data", split="test")
    assert counts["notices"] == ["2 queries without a right answer are left out"]
    data = load(tmp_path / "data", split="test")
    (query,) = data.queries
    assert (query.id, query.positives, query.instruction) == ("2:5", ("2:900",), "Find the fact.")
    assert list(data.pool("t2t").ids) == ["2:900", "2:7", "2:8"]
    convert_file("mteb", folder, tmp_path / "other", split="test", number=20, instruction="say")
    (query,) = load(tmp_path / "other", split="test").queries
    assert (query.id, query.positives, query.instruction) == ("20:1", ("20:1",), "Say.")


@pytest.mark.parametrize("id", ["3:7", "2:07", "2:", "7"])
def test_a_mirrors_ids_are_those_of_one_dataset(id, tmp_path):
    qrels = [("2:5", "2:900", 1)]
    folder = mirror(tmp_path, "mbeir_webqa_task1", {"2:900": "a", id: "b"}, {"2:5": "q"}, qrels)
    with pytest.raises(DataError, match=rf"row 2: id '{id}' is not 2:<number> as the first is"):
        convert_file("mteb", folder, tmp_path / "data", split="test")


def test_a_mirrors_row_holds_what_its_modality_says(tmp_path):
    folder = mirror(tmp_path, "x", {"1": "a"}, {"1": "q"}, [("1", "1", 1)])
    for modality, text, found in (("image,text", "a", "text"), ("text", "", "none")):
        row = {"id": "1", "modality": modality, "text": text, "image": None}
        parquet(folder / "corpus-0-of-1.parquet", [row])
        rule = rf"corpus.*:row 1: modality is {modality}, but there is {found}$"
        with pytest.raises(DataError, match=rule):
            convert_file("mteb", folder, tmp_path / "data", split="test")


def test_answers_in_the_sister_set_are_counted(tmp_path):
    qrels = [("6:1", "6:7", 1), ("6:1", "5:9", 1), ("6:2", "5:9", 1)]
    folder = mirror(tmp_path, "mbeir_infoseek_task1", {"6:7": "a"}, {"6:1": "q", "6:2": "r"}, qrels)
    counts = convert_file("mteb", folder, tmp_path / "data", split="test")
    assert counts["queries"] == {"t2t": 2}
    assert counts["notices"] == [
        "2 right answers lie in the sister set of number 5, not in this corpus; "
        "1 queries have no other"
    ]
    path = tmp_path / "data" / "query" / "test" / "mbeir_infoseek_task1_test.jsonl"
    listed = [json.loads(line)["pos_cand_list"] for line in path.read_text().splitlines()]
    assert listed == [["6:7", "5:9"], ["5:9"]]
    folder = mirror(tmp_path, "mbeir_webqa_task1", {"2:7": "a"}, {"2:1": "q"}, [("2:1", "5:9", 1)])
    with pytest.raises(DataError, match=r"qrels.*:row 1: '5:9' is not in the corpus"):
        convert_file("mteb", folder, tmp_path / "other", split="test")


# -- folders -------------------------------------------------------------------------------------


def test_a_first_picture_of_several_in_one_file(tmp_path):
    several = [Image.new("RGB", (16, 16), "blue")]
    Image.new("RGB", (64, 64)).save(_made(tmp_path / "p") / "IMG_1.jpg", "MPO", save_all=True,
                                    append_images=several)  # fmt: skip
    words = ["data", "convert", "folder", str(tmp_path / "p"), "--output", str(tmp_path / "o")]
    assert CliRunner().invoke(app, words).exit_code == 0
    (query,) = load(tmp_path / "o").queries
    assert query.load_image().size == (64, 64) and Path(query.image).suffix == ".jpg"


def _made(folder):
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.txt", "image,caption\na.png,one\na.png,two\n"),
        ("metadata.csv", "file_name,text\na.png,one\na.png,two\n"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n'
         '{"file_name": "a.png", "text": "two"}\n'),
    ],
)  # fmt: skip
def test_captions_by_their_published_names(name, text, tmp_path):
    draw(tmp_path / "s" / "Images" / "a.png")
    draw(tmp_path / "s" / "Images" / "b.png", "blue")
    (tmp_path / "s" / name).write_text(text)
    counts = convert_file("folder", tmp_path / "s", tmp_path / "data")
    assert counts["queries"] == {"t2i": 2} and counts["candidates"] == 2
    assert counts["notices"] == [f"2 captions of 1 picture from {name}; 1 picture has none"]
    assert {query.text for query in load(tmp_path / "data").queries} == {"One.", "Two."}


def test_a_caption_of_several_pictures_asks_once_for_all(tmp_path):
    for name in ("a", "b", "c"):
        draw(tmp_path / "s" / f"{name}.png", (len(name), ord(name), 9))
    (tmp_path / "s" / "captions.csv").write_text("file,caption\na.png,cat\nb.png,Cat.\nc.png,dog\n")
    convert_file("folder", tmp_path / "s", tmp_path / "data")
    found = [len(query.positives) for query in load(tmp_path / "data").queries]
    assert found == [2, 1]


def test_a_missing_picture_is_named_where_it_is_named(tmp_path):
    for folder in ("x", "y"):
        draw(tmp_path / "s" / folder / "a.png")
    table = tmp_path / "s" / "captions.csv"
    table.write_text("file,caption\nb.png,x\n")
    with pytest.raises(DataError, match=r"captions.csv:2: no such picture: 'b.png'"):
        convert_file("folder", tmp_path / "s", tmp_path / "data")
    table.write_text("file,caption\na.png,x\n")
    with pytest.raises(DataError, match=r"captions.csv:2: 'a.png' lies in several folders: 'x/"):
        convert_file("folder", tmp_path / "s", tmp_path / "data")


def test_a_damaged_picture_is_one_line(tmp_path):
    content = bytearray(draw(tmp_path / "s" / "a.png", size=(64, 64)).read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    (tmp_path / "s" / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a.png: unreadable picture") as caught:
        convert_file("folder", tmp_path / "s", tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"name": "my-set"}, "name must be 1 to 100 letters, digits and _, got 'my-set'"),
        ({"name": ""}, "name must be 1 to 100"),
        ({"instruction": "a\tb"}, "instruction must be one line of text without tabs"),
        ({"split": "dev"}, "split must be one of train, val, test, got 'dev'"),
    ],
)
def test_settings_that_the_layout_cannot_hold(settings, rule, tmp_path):
    draw(tmp_path / "s" / "a.png")
    with pytest.raises(DataError, match=rule):
        convert_file("folder", tmp_path / "s", tmp_path / "data", **settings)


def test_a_table_is_one_file_or_all_its_shards(tmp_path):
    (tmp_path / "corpus.jsonl").touch()
    assert table_files(tmp_path, "none", "corpus") == [tmp_path / "corpus.jsonl"]
    (tmp_path / "corpus.csv").touch()
    with pytest.raises(DataError, match=r"holds corpus.jsonl and corpus.csv; leave one of them"):
        table_files(tmp_path, "corpus")
