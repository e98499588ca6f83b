"""Every format, written from the emoji corpus as its publishers write it: read, converted, loaded,
and the same texts, pictures and answers come back."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from elva.cli import app
from elva.data import load, strict
from elva.data.formats import FORMATS, convert_file
from elva.data.schema import normalise
from elva.errors import DataError

COUNT = 24


def picture(item):
    return None if item.image is None else Path(item.image).read_bytes()


def content(item):
    return item.text, picture(item)


@pytest.fixture(scope="module")
def sources(corpus):
    """task -> the first examples of the corpus as (query, positives, negatives)."""
    found = {}
    for task in ("t2i", "t2t", "it2i", "i2t"):
        data = load(corpus, split="train", tasks=[task])
        pool = data.pool(task)
        found[task] = [
            (q, [pool[pool.row(p)] for p in q.positives], [pool[pool.row(n)] for n in q.negatives])
            for q in data.queries[:COUNT]
        ]
    return found


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def put(folder, item):
    """A picture as a file of its own; its name under the folder."""
    if item.image is None:
        return ""
    (folder / "images").mkdir(exist_ok=True)
    name = f"images/{Path(item.image).parent.name}-{Path(item.image).name}"
    (folder / name).write_bytes(picture(item))
    return name


def write_nli(folder, examples):
    path = folder / "nli.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sent0", "sent1", "hard_neg"])
        for query, positives, negatives in examples:
            negative = negatives[0].text if negatives else ""
            writer.writerow([query.raw_text, positives[0].text, negative])
    return path


def mmeb_row(folder, query, positive, negative):
    mark = "<|image_1|>\n"
    said = query.prompted
    return {
        "qry": (mark if query.image else "") + said, "qry_image_path": put(folder, query),
        "pos_text": (mark if positive.image else "") + (positive.text or ""),
        "pos_image_path": put(folder, positive),
        "neg_text": "" if negative is None else (negative.text or mark),
        "neg_image_path": "" if negative is None else put(folder, negative),
    }  # fmt: skip


def write_mmeb(folder, examples):
    path = folder / "mmeb.parquet"
    parquet(path, [mmeb_row(folder, q, p[0], n[0] if n else None) for q, p, n in examples])
    return path


def write_mmeb_test(folder, examples):
    path = folder / "mmeb-test.jsonl"
    rows = [
        {
            "qry_inst": q.instruction, "qry_text": q.raw_text or "", "qry_img_path": put(folder, q),
            "tgt_inst": "", "tgt_text": [i.text or "" for i in (*p[:1], *n)],
            "tgt_img_path": [put(folder, i) for i in (*p[:1], *n)],
        }
        for q, p, n in examples
    ]  # fmt: skip
    jsonl(path, rows)
    return path


def write_tevatron(folder, examples):
    documents = {i.id: i for _, p, n in examples for i in (*p, *n)}
    rows = [
        {"docid": i.id, "document_text": i.text, "document_image": put(folder, i) or None}
        for i in documents.values()
    ]
    jsonl(folder / "corpus.jsonl", rows)
    rows = [
        {
            "query_id": q.id, "query_text": q.raw_text, "query_image": put(folder, q) or None,
            "positive_document_ids": [i.id for i in p], "negative_document_ids": [i.id for i in n],
        }
        for q, p, n in examples
    ]  # fmt: skip
    jsonl(folder / "queries.jsonl", rows)
    return folder


def write_beir(folder, examples):
    documents = {i.id: i for _, p, _ in examples for i in p}
    jsonl(folder / "corpus.jsonl", [{"_id": i.id, "text": i.text} for i in documents.values()])
    jsonl(folder / "queries.jsonl", [{"_id": q.id, "text": q.raw_text} for q, _, _ in examples])
    (folder / "qrels").mkdir()
    rows = [f"{q.id}\t{i.id}\t2\n" for q, p, _ in examples for i in p]
    (folder / "qrels" / "train.tsv").write_text("".join(["query-id\tcorpus-id\tscore\n", *rows]))
    return folder


def write_mteb(folder, examples):
    root = folder / "mbeir_cirr_task7"
    root.mkdir()

    def row(item):
        image = None if item.image is None else {"bytes": picture(item), "path": "a.png"}
        raw = getattr(item, "raw_text", None) or item.text
        return {"id": item.id, "modality": item.modality, "text": raw, "image": image}

    documents = {i.id: i for _, p, _ in examples for i in p}
    parquet(root / "query-00000-of-00001.parquet", [row(q) for q, _, _ in examples])
    whole = [row(i) for i in documents.values()]
    parquet(root / "corpus-00000-of-00002.parquet", whole[:10])
    parquet(root / "corpus-00001-of-00002.parquet", whole[10:])
    qrels = [
        {"query-id": q.id, "Q0": "0", "corpus-id": i.id, "score": 1}
        for q, p, _ in examples
        for i in p
    ]
    parquet(root / "qrels-00000-of-00001.parquet", qrels)
    return root


def write_folder(folder, examples):
    rows = [["file", "caption", "year"]]
    rows += [[put(folder, p[0]), q.raw_text, i] for i, (q, p, _) in enumerate(examples)]
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


CASES = [
    ("nli", write_nli, "t2t", "csv"),
    ("beir", write_beir, "t2t", "plain"),
    ("mmeb", write_mmeb, "t2i", "prompted"),
    ("mmeb", write_mmeb, "i2t", "prompted"),
    ("mmeb-test", write_mmeb_test, "t2i", "prompted"),
    ("tevatron", write_tevatron, "t2i", "plain"),
    ("tevatron", write_tevatron, "it2i", "plain"),
    ("mteb", write_mteb, "it2i", "plain"),
    ("folder", write_folder, "t2i", "plain"),
]


@pytest.mark.parametrize(("name", "writer", "task", "form"), CASES)
def test_what_was_written_comes_back(name, writer, task, form, sources, tmp_path):
    examples = sources[task]
    (tmp_path / "source").mkdir()
    source = writer(tmp_path / "source", examples)
    counts = convert_file(name, source, tmp_path / "data")
    data = load(tmp_path / "data")
    assert sum(counts["queries"].values()) == len(data.queries) == len(examples)
    for query, (old, positives, negatives) in zip(data.queries, examples, strict=True):
        pool = data.pool(query.task)
        said = old.prompted if form == "prompted" else old.text
        assert query.text == (None if said is None else normalise(said))
        assert picture(query) == picture(old)
        found = [content(pool[pool.row(d)]) for d in query.positives]
        expected = [content(i) for i in positives]
        assert found == (expected if name in ("tevatron", "mteb", "beir") else expected[:1])
        if name in ("nli", "mmeb"):
            wanted = [content(i) for i in negatives[:1]]
            assert [content(pool[pool.row(d)]) for d in query.negatives] == wanted
        if name == "mmeb-test":
            listed = [content(pool[pool.row(d)]) for d in data.minimal_pairs[query.id]]
            assert listed == [content(i) for i in (*positives[:1], *negatives)]
    again = convert_file(name, source, tmp_path / "again")
    assert again == counts
    for path in (p for p in (tmp_path / "data").rglob("*") if p.is_file()):
        other = tmp_path / "again" / path.relative_to(tmp_path / "data")
        assert other.read_bytes() == path.read_bytes(), path


def test_a_task_that_every_format_covers():
    assert {name for name, *_ in CASES} == set(FORMATS)


def test_pictures_without_captions_ask_for_themselves(sources, tmp_path):
    (tmp_path / "s").mkdir()
    for _, positives, _ in sources["t2i"][:5]:
        put(tmp_path / "s", positives[0])
    convert_file("folder", tmp_path / "s", tmp_path / "data", split="test")
    data = load(tmp_path / "data", split="test")
    pool = data.pool("i2i")
    assert len(pool) == 5 and all(q.positives == (pool.ids[i],)
                                  for i, q in enumerate(data.queries))  # fmt: skip


def test_metadata_of_captions_is_kept(sources, tmp_path):
    (tmp_path / "s").mkdir()
    convert_file("folder", write_folder(tmp_path / "s", sources["t2i"]), tmp_path / "data")
    line = next((tmp_path / "data" / "cand_pool" / "local").iterdir()).read_text().splitlines()[3]
    assert json.loads(json.loads(line)["src_content"])["year"] == "3"


@pytest.mark.parametrize(
    ("name", "file", "text", "rule"),
    [
        ("nli", "a.csv", b"premise,sent1\na,b\n",
         "a.csv:1: no columns sent0,sent1 nor anchor,positive; there are premise, sent1"),
        ("nli", "a.csv", b"sent0,sent1,hard_neg\na,b\n", "a.csv:2: 2 cells, not 3"),
        ("nli", "a.csv", b"sent0,sent1,hard_neg\na,,c\n", "a.csv:2: has neither text nor picture"),
        ("nli", "a.csv", b"sent0,sent0,hard_neg\na,b,c\n", "a.csv:1: column 'sent0' twice"),
        ("nli", "a.csv", b"sent0,sent1,hard_neg\n\xff,b,c\n", "a.csv:2: not UTF-8 at byte 0"),
        ("nli", "a.csv", b'sent0,sent1,hard_neg\n"a,b,c\n', "a.csv:2: not csv"),
        ("nli", "a.csv", b"sent0,sent1,hard_neg\n" + b"x" * 1300, "a.csv:2: line is lo"),
        ("nli", "a.csv", b"", "a.csv: holds no rows"),
        ("nli", "a.txt", b"a", "a.txt: holds no rows"),
        ("nli", "absent.csv", None, "absent.csv: no such file or folder"),
        ("csv", "a.csv", b"a", "format must be one of beir, folder, mmeb"),
        ("mmeb", "a.parquet", b"PAR1 not really PAR1", "a.parquet: not readable parquet after row"),
        ("mmeb", "a.jsonl", b'{"qry": "a"}\n', "a.jsonl:1: qry_image_path is missing"),
        ("mmeb", "a.jsonl", b'{"qry": "a", "qry_image_path": "../x.png", "pos_text": "b", '
         b'"pos_image_path": ""}\n', "a.jsonl:1: qry_image_path '../x.png' leaves the root"),
        ("mmeb", "a.jsonl", b'{"qry": "a", "qry_image_path": "http://x/y.png", "pos_text": "b", '
         b'"pos_image_path": ""}\n', "a.jsonl:1: .* is a URL"),
        ("mmeb", "a.jsonl", b'{"qry": "a", "qry_image_path": "x.png", "pos_text": "b", '
         b'"pos_image_path": ""}\n', "a.jsonl:1: no such picture"),
        ("mmeb", "a.jsonl", b'{"qry": "a", "qry_image_path": "a.jsonl", "pos_text": "b", '
         b'"pos_image_path": ""}\n', "a.jsonl:1: unreadable picture"),
        ("mmeb-test", "a.jsonl", b'{"qry_text": "a", "qry_img_path": "", "tgt_text": ["b"], '
         b'"tgt_img_path": []}\n', "a.jsonl:1: tgt_text and tgt_img_path are not lists of one len"),
        ("nli", "a.xlsx", b"a", "a.xlsx: not a .csv, .tsv, .jsonl or .parquet file"),
        ("tevatron", "", None, "no queries or train as .jsonl, .parquet or .csv"),
        ("beir", "", None, "no corpus as .jsonl, .parquet or .csv"),
        ("mteb", "", None, "no corpus as .jsonl, .parquet or .csv"),
        ("folder", "", None, "s: holds no picture that can be read$"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(
    name, file, text, rule, tmp_path, monkeypatch
):
    monkeypatch.setattr(strict, "MAX_LINE_BYTES", 1000)
    source = tmp_path / "s"
    source.mkdir()
    if text is not None:
        (source / file).write_bytes(text)
    with pytest.raises(DataError, match=rule) as caught:
        convert_file(name, source / file, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    words = ["data", "convert", name, str(source / file), "--output", str(tmp_path / "data")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1


def test_bad_rows_are_left_out_as_far_as_allowed(sources, tmp_path):
    path = write_tevatron(tmp_path, sources["t2i"])
    file = path / "queries.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["positive_document_ids"] = ["unknown"]
    rows[2]["query_id"] = rows[0]["query_id"]
    rows[3]["query_text"] = None
    jsonl(file, rows)
    with pytest.raises(DataError, match=r"queries.jsonl:2: 'unknown' is not in the corpus"):
        convert_file("tevatron", path, tmp_path / "data")
    with pytest.raises(DataError, match=r"queries.jsonl:4: .*; 2 bad rows were allowed"):
        convert_file("tevatron", path, tmp_path / "data", skip_bad=2)
    counts = convert_file("tevatron", path, tmp_path / "data", skip_bad=3)
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in counts["bad"]] == ["2", "3", "4"]
    assert len(load(tmp_path / "data").queries) == COUNT - 3


def test_check_lists_every_fault_and_stats_count(sources, tmp_path):
    convert_file("tevatron", write_tevatron(tmp_path, sources["t2i"]), tmp_path / "data")
    path = next((tmp_path / "data" / "query" / "train").iterdir())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sheet = tmp_path / "sheet.png"
    words = ["data", "sample", str(tmp_path / "data"), "--split", "train", "--sheet", str(sheet)]
    drawn = json.loads(CliRunner().invoke(app, [*words, "--json", "--count", "3"]).stdout)
    assert len({row["id"] for row in drawn}) == 3 and sheet.stat().st_size > 10_000
    rows[0]["pos_cand_list"] = ["13:999"]
    rows[1]["query_modality"] = "sound"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{torn\n")
    next((tmp_path / "data" / "mbeir_images").rglob("*.png")).unlink()
    words = ["data", "check", str(tmp_path / "data")]
    result = CliRunner().invoke(app, [*words, "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 2 and found["missing_pictures"] == 1
    named = {line.split(": ")[0].rsplit(":", 1)[1] for line in found["bad"][:3]}
    assert named == {"1", "2", "25"}
    assert len(found["bad"]) == 4
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "4 bad rows, 1 of them missing" in result.stdout
    with pytest.raises(DataError, match=r"_train.jsonl:[12]: (candidate 13|query_modality)"):
        load(tmp_path / "data")
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[2:]))
    qrels = next((tmp_path / "data" / "qrels" / "train").iterdir())
    qrels.write_text("".join(qrels.read_text().splitlines(keepends=True)[2:]))
    result = CliRunner().invoke(app, ["data", "stats", str(tmp_path / "data"), "--json"])
    (row,) = json.loads(result.stdout).values()
    assert (row["queries"], row["answers"], row["task"]) == (COUNT - 2, 1.0, "t2i")
