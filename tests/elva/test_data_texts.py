"""Every text file that ELVA reads, alike: marks, line ends, empty last lines, and what is right."""

import ast
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elva
from elva.commands import build_index, mine
from elva.data import load, mbeir, qrels, strict
from elva.data.formats import convert_file
from elva.data.formats.rows import rows
from elva.data.instructions import read_instructions
from elva.data.strict import Faults, lines
from elva.errors import DataError, IndexFault, RunError, UserError
from elva.evaluation.trec import read_qrels, read_run
from elva.mrbench.build import write_data
from elva.mrbench.review import Judged, read_review
from elva.recipes import resolve

HOME = Path(elva.__file__).parent

# -- one reader ----------------------------------------------------------------------------------

TREE = {
    "instructions/query_instructions.tsv":
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\ntext\ttext\tX\t9\tfind\n",
    "cand_pool/local/mbeir_x_task1_cand_pool.jsonl":
        '{"did": "9:1", "txt": "ä", "img_path": null, "modality": "text"}\n'
        '{"did": "9:2", "txt": "b", "img_path": null, "modality": "text"}\n',
    "query/test/mbeir_x_task1_test.jsonl":
        '{"qid": "9:1", "query_txt": "q ü", "query_img_path": null, "query_modality": "text", '
        '"pos_cand_list": ["9:1"], "neg_cand_list": []}\n',
    "qrels/test/mbeir_x_task1_test_qrels.txt": "9:1 0 9:1 1 1\n9:1 0 9:2 0 1\n",
    "grains.jsonl":
        '{"qid": "9:1", "grains": [{"text": "q", "type": "t", "span": [0, 1]}]}\n',
}  # fmt: skip


def tree(changed, text):
    """A reader of a data directory of which one file is another's text."""

    def read(path):
        root = path.parent / "tree"
        for name, content in TREE.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content, encoding="utf-8")
        (root / changed).write_bytes(path.read_bytes())
        data = load(root, split="test")
        pool = data.pool("t2t")
        return [vars(query) | {"where": ""} for query in data.queries], list(pool.ids), \
            pool.table["text"].to_pylist()  # fmt: skip

    return read


def converted(format, name):
    def read(path):
        root = path.parent / "s"
        root.mkdir()
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(path.read_bytes())
        if format == "beir":
            for table, ids in (("corpus", "d"), ("queries", "q")):
                text = "".join(f'{{"_id": "{ids}", "text": "ü"}}\n')
                (root / f"{table}.jsonl").write_text(text, encoding="utf-8")
        source = root / name if format == "nli" else root
        convert_file(format, source, path.parent / "data", split="test")
        data = load(path.parent / "data", split="test")
        return [(query.text, query.positives, query.negatives) for query in data.queries]

    return read


def built(path):
    np.save(path.parent / "rows.npy", np.eye(2, dtype="float32"))
    index = build_index.build(
        path.parent / "i", [], npy=path.parent / "rows.npy", ids=path, model="m"
    )
    return index.ids(np.arange(len(index)))


READERS = {
    "run": (read_run, "q Q0 d 1 0.5 tag\nq Q0 ü 2 0.25 tag\n"),
    "qrels": (read_qrels, "q 0 d 1\nq 0 ü 0\n"),
    "beir's qrels": (read_qrels, "query-id\tcorpus-id\tscore\nq\td\t1\n"),
    "ids": (built, "a\nb ü\n"),
    "review": (read_review, "decision\tqid\tset\nkeep\t9:1\tü\n\t9:2\tx\n"),
    "recipe": (lambda path: resolve("smoke", path), "seed: 7\nstages:\n  3:\n    steps: 2\n"),
    "csv": (converted("nli", "a.csv"), 'sent0,sent1\n"a ü",b\nc,d\n'),
    "jsonl": (converted("nli", "a.jsonl"), '{"anchor": "ü", "positive": "b"}\n'),
    "beir": (converted("beir", "qrels/test.tsv"), "query-id\tcorpus-id\tscore\nq\td\t1\n"),
    **{name: (tree(name, text), text) for name, text in TREE.items()},
}

FORMS = {
    "a mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "windows": lambda text: text.replace("\n", "\r\n").encode(),
    "old mac": lambda text: text.replace("\n", "\r").encode(),
    "no last line end": lambda text: text.rstrip("\n").encode(),
    "empty last lines": lambda text: f"{text}\n \n\r\n\n".encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16 of windows": lambda text: b"\xfe\xff" + text.replace("\n", "\r\n").encode("utf-16-be"),
    "all": lambda text: f"{text}\n\n".replace("\n", "\r\n").encode("utf-16"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_text_file_reads_alike_however_it_was_saved(name, tmp_path):
    read, text = READERS[name]
    found = {}
    for form, encode in {"plain": str.encode, **FORMS}.items():
        path = tmp_path / form / "file"
        path.parent.mkdir()
        path.write_bytes(encode(text))
        found[form] = read(path)
    assert all(one == found["plain"] for one in found.values()), found


OWN = {
    "checkpoint.py", "files.py", "run.py", "index/embeddings.py", "index/engines/faiss.py",
    "training/callbacks.py", "training/readiness.py", "report/shapes.py", "commands/doctor.py",
    "commands/follow.py", "commands/index_folder.py", "integrations/kernels_hub.py",
    "model/encoder.py", "model/family.py", "model/note.py", "model/reading.py",
    "model/retriever.py", "model/vision.py",
}  # fmt: skip
"""What they read programs write for programs: JSON beside weights, in runs, in parts of a build."""


def test_no_other_place_reads_a_persons_text():
    found = {
        path.relative_to(HOME).as_posix()
        for path in HOME.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("read_text", "splitlines", "readlines")
    }
    assert found <= OWN


def test_lines_are_numbered_and_capped_in_every_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(strict, "MAX_LINE_BYTES", 100)
    text = f"a\n \t\n{'x' * 250}\nb\n\t\n"
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a").write_bytes(text.encode(encoding))
        faults = Faults(1)
        found = [(where.rpartition(":")[2], line) for where, line in lines(tmp_path / "a", faults)]
        assert found == [("1", "a"), ("2", ""), ("4", "b")]
        assert faults.found == [f"{tmp_path}/a:3: line is longer than 100 bytes"]
    with pytest.raises(DataError, match="a:3: line is longer than 100 bytes"):
        list(lines(tmp_path / "a"))


def test_lines_end_at_line_ends_alone(tmp_path):
    text = "a\u2028b\x85c\x0bd\x1ce"
    (tmp_path / "a").write_text(f"{text}\n{text}", encoding="utf-8")
    assert [line for _, line in lines(tmp_path / "a")] == [text, text]


def test_bad_rows_that_were_left_out_stay_left_out_where_a_file_is_read_again(tmp_path):
    for name, content in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    for name in ("query/test/mbeir_x_task1_test.jsonl", "qrels/test/mbeir_x_task1_test_qrels.txt"):
        (tmp_path / name).write_bytes(b"\xff\n" + TREE[name].encode())
    (one,) = mbeir.read_sets(tmp_path, split="test", faults=Faults(2))
    mine._write(tmp_path / "mined", tmp_path, one, "test", {"9:1": ["9:2"]})
    judged = Judged(one.stem, one.queries[0], "q ü", ())
    write_data(tmp_path / "bench", tmp_path, "test", [judged], {})
    for made in ("mined", "bench"):
        folder = tmp_path / made
        (row,) = (folder / "query/test/mbeir_x_task1_test.jsonl").read_text().splitlines()
        assert json.loads(row)["neg_cand_list"] == (["9:2"] if made == "mined" else [])
        text = (folder / "qrels/test/mbeir_x_task1_test_qrels.txt").read_text()
        assert text == TREE["qrels/test/mbeir_x_task1_test_qrels.txt"]


def test_a_whole_text_is_read_in_the_encodings_of_lines(tmp_path):
    path, text = tmp_path / "a", "a\nü\n"
    for content in (text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
        path.write_bytes(content)
        assert strict.read_text(path) == text
    path.write_bytes(b"a\nb\n\xff")
    with pytest.raises(DataError, match=r"a:3: not UTF-8 at byte 4"):
        strict.read_text(path)
    assert len(path.read_bytes()) == 5
    with pytest.raises(DataError, match=r"a: is larger than 4 bytes, which are read at most"):
        strict.read_text(path, 4)
    path.write_text("a\nb\nc")
    assert strict.read_text(path, 5) == "a\nb\nc"


def test_the_first_bad_row_beyond_the_allowed_ones_is_raised():
    def read(faults, hint=""):
        with faults.row(hint):
            raise DataError("a:1: bad")

    with pytest.raises(DataError, match=r"^a:1: bad; pass x$"):
        read(Faults(), "; pass x")
    with pytest.raises(DataError, match=r"^a:1: bad$"):
        read(Faults())
    for allowed, words in ((1, "1 bad row was"), (2, "2 bad rows were")):
        faults = Faults(allowed)
        for _ in range(allowed):
            read(faults, "; pass x")
        assert faults.found == ["a:1: bad"] * allowed
        rule = rf"^a:1: bad; {words} allowed, this is number {allowed + 1}$"
        with pytest.raises(DataError, match=rule):
            read(faults, "; pass x")


def test_an_empty_line_between_ids_is_no_id(tmp_path):
    (tmp_path / "ids").write_text("a\n\nb\n")
    with pytest.raises(UserError, match=r"ids:2: must hold an id, is an empty line; take it out"):
        built(tmp_path / "ids")


def test_a_table_without_its_header_loses_no_row(tmp_path):
    name = "instructions/query_instructions.tsv"
    (tmp_path / "t").write_text("text\ttext\tX\t9\tfind\n")
    assert read_instructions(tmp_path / "t") == {(9, "text", "text"): ("Find.",)}
    (tmp_path / "r").write_text("drop\t9:1\tx\nkeep\t9:2\tx\n")
    assert [row[0] for row in read_review(tmp_path / "r").values()] == ["drop", "keep"]
    assert name in TREE


# -- what is right -------------------------------------------------------------------------------

RELEVANCE = {
    "graded": ([("q", "d", "2"), ("q", "e", "1")], {"q": ["d", "e"]}),
    "wrong": ([("q", "d", "1"), ("q", "e", "0"), ("q", "f", "-1")], {"q": ["d"]}),
    "whole": ([("q", "d", "1.0"), ("q", "e", "+3")], {"q": ["d", "e"]}),
    "twice alike": ([("q", "d", "1"), ("q", "d", "1")], {"q": ["d"]}),
    "twice otherwise": ([("q", "d", "1"), ("q", "d", "2")], "candidate d was judged otherwise"),
    "right and wrong": ([("q", "d", "1"), ("q", "d", "0")], "candidate d was judged otherwise"),
    "fraction": ([("q", "d", "0.5")], "relevance '0.5' is no whole number"),
    "nan": ([("q", "d", "nan")], "relevance 'nan' is no whole number"),
    "infinite": ([("q", "d", "inf")], "relevance 'inf' is no whole number"),
    "word": ([("q", "d", "yes")], "relevance 'yes' is no whole number"),
    "digits": ([("q", "d", "9" * 5000)], "relevance '9999"),
    "grouped": ([("q", "d", "1_0")], "relevance '1_0' is no whole number"),
    "none right": ([("q", "d", "0"), ("q", "e", "-1")], "judges no candidate right"),
}
IDS = {"q": "9:1", "d": "9:1", "e": "9:2", "f": "9:3"}


def of_trec(root, judged):
    (root / "a").write_text("".join(f"{q} 0 {d} {r}\n" for q, d, r in judged))
    found = read_qrels(root / "a")
    return {q: [d for d, r in some.items() if r > 0] for q, some in found.items()}


def of_beir(root, judged):
    (root / "a").write_text("".join(f"{q} {d} {r}\n" for q, d, r in [qrels.BEIR, *judged]))
    found = read_qrels(root / "a")
    return {q: [d for d, r in some.items() if r > 0] for q, some in found.items()}


def of_beirs_folder(root, judged):
    text = "".join(f"{q}\t{d}\t{r}\n" for q, d, r in [qrels.BEIR, *judged])
    (root / "test.tsv").write_text(text)
    for name, ids in (("corpus", "def"), ("queries", "q")):
        text = "".join(f'{{"_id": "{id}", "text": "{id}"}}\n' for id in ids)
        (root / f"{name}.jsonl").write_text(text)
    convert_file("beir", root, root / "data", split="test")
    return of_data(root / "data")


def of_a_mirror(root, judged):
    root /= "mbeir_cirr_task7"
    root.mkdir()
    shown = [{"id": id, "modality": "text", "text": id, "image": None} for id in "def"]
    pq.write_table(pa.Table.from_pylist(shown), root / "corpus.parquet")
    pq.write_table(pa.Table.from_pylist([{**shown[0], "id": "q", "text": "q"}]),
                   root / "query.parquet")  # fmt: skip
    table = pa.Table.from_pylist([dict(zip(qrels.BEIR, row, strict=True)) for row in judged])
    pq.write_table(table, root / "qrels.parquet")
    convert_file("mteb", root, root / "data", split="test")
    return of_data(root / "data")


def of_mbeir(root, judged):
    for name, content in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    mbeir.write_pool(root, "x_task1", [
        {"did": f"9:{i}", "txt": str(i), "img_path": None, "modality": "text"} for i in (1, 2, 3)
    ])  # fmt: skip
    row = json.loads(TREE["query/test/mbeir_x_task1_test.jsonl"])
    mbeir.write_queries(
        root, "x_task1", "test", [{**row, "task_id": 1, "pos_cand_list": ["9:1", "9:2", "9:3"]}]
    )
    text = "".join(f"{IDS[q]} 0 {IDS[d]} {r} 1\n" for q, d, r in judged)
    (root / "qrels/test/mbeir_x_task1_test_qrels.txt").write_text(text)
    names = {number: name for name, number in IDS.items() if name != "q"}
    load(root, split="test")
    found = qrels.read(root / "qrels/test/mbeir_x_task1_test_qrels.txt")
    return {"q": [names[did] for did, one in found["9:1"].items() if one.is_right]}


def of_data(root):
    data = load(root, split="test")
    pool = data.pool("t2t")
    return {
        (query.raw_text or ""): [pool[pool.row(did)].text[0].lower() for did in query.positives]
        for query in data.queries
    }


@pytest.mark.parametrize("read", [of_trec, of_beir, of_beirs_folder, of_a_mirror, of_mbeir])
@pytest.mark.parametrize("name", RELEVANCE)
def test_one_rule_says_what_is_right(name, read, tmp_path):
    judged, expected = RELEVANCE[name]
    if isinstance(expected, dict):
        assert read(tmp_path, judged) == expected
        return
    expected = expected.replace("candidate d", f"candidate ({IDS['d']}|d)")
    with pytest.raises(DataError, match=expected) as caught:
        read(tmp_path, judged)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize("read", [of_trec, of_beir])
def test_qrels_without_a_line_are_one_line(read, tmp_path):
    with pytest.raises(DataError, match="a: holds no judgements"):
        read(tmp_path, [])


def test_numbers_of_parquet_are_relevances(tmp_path):
    for i, value in enumerate((1, 1.0, 2)):
        (tmp_path / str(i)).mkdir()
        assert of_a_mirror(tmp_path / str(i), [("q", "d", value)]) == {"q": ["d"]}
    for i, value in enumerate((0.5, True, float("nan"))):
        (tmp_path / f"bad{i}").mkdir()
        with pytest.raises(DataError, match=rf"relevance '{value}' is no whole number"):
            of_a_mirror(tmp_path / f"bad{i}", [("q", "d", value)])


# -- one line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UserError, DataError, RunError, IndexFault])
def test_an_error_that_quotes_megabytes_is_a_line_with_its_place_and_its_advice(kind):
    line = str(kind(f"a.csv:3: {'x' * 10**7} is no number; write one"))
    assert len(line) < 720
    assert line.startswith("a.csv:3: xxx") and line.endswith("is no number; write one")
    assert str(kind("a.csv:3: rule")) == "a.csv:3: rule"


@pytest.mark.parametrize("read", [read_run, read_qrels, read_review, read_instructions])
def test_no_reader_quotes_megabytes(read, tmp_path):
    long = "x" * 10**6
    for line in (f"q 0 {long} {long}", f"q Q0 d 1 {long} t", long):
        (tmp_path / "a").write_text(f"{line}\n{line}\n")
        with pytest.raises(DataError) as caught:
            read(tmp_path / "a")
        assert len(str(caught.value)) < 800


def test_damaged_parquet_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"sent0": ["a dog", "Blüte"], "sent1": ["x", "y"]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole.replace("Blüte".encode(), b"Bl\xff\xffte"))
    with pytest.raises(DataError, match=r"a.parquet: not readable parquet after row 0: "):
        list(rows(path, ("sent0",), Faults()))
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            list(rows(path, ("sent0",), Faults()))
        except DataError as error:
            assert "\n" not in str(error)


def test_a_quote_that_is_never_closed_is_no_bad_row(tmp_path):
    """It swallows all rows behind it, which --skip-bad would leave out without a word."""
    path = tmp_path / "captions.csv"
    path.write_text('file,caption\na.png,one\nb.png,"two\nc.png,three\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"captions.csv:3: not csv: a quote that is never closed"):
        list(rows(path, ("file", "caption"), Faults(5)))


def test_a_header_may_end_in_columns_that_rows_leave_out(tmp_path):
    path = tmp_path / "titles.csv"
    path.write_text("id,text,,,\na,A dog\nb,Two dogs,\n", encoding="utf-8")
    found = [record.fields for record in rows(path, ("text",), Faults(), known=("id",))]
    assert found == [{"id": "a", "text": "A dog"}, {"id": "b", "text": "Two dogs"}]
