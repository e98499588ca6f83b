"""Whatever a converter writes, the loader reads: hostile rows of every format and split."""

import csv
import io
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from elva.data import load
from elva.data.formats import FORMATS, convert_file
from elva.data.layout import SPLITS
from elva.errors import DataError

ANY = 10**6


def encoded(colour, kind):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, kind, lossless=True)
    return file.getvalue()


PICTURES = {"red.png": encoded("red", "PNG"), "red.webp": encoded("red", "WEBP"),
            "blue.jpg": encoded("blue", "JPEG"), "torn.png": b"\x89PNG\r\n\x1a\n torn"}  # fmt: skip
NO_PICTURES = ["", "x.png", "x" * 300, "a/" * 2000, "../red.png", "/etc/hosts", "C:\\red.png",
               "a\0.png", ".", "http://a/red.png", "a.csv", "\u2028"]  # fmt: skip

hard = st.sampled_from([
    "a", "A.", " a ", '"', '""a"', "\r\n", "\ta\t", "a,b;c\td", "\u00a0", "\u2028x", "\x00", "\x85",
    "<|image_1|>", "<|image_pad|> a", "{}", "\\", "=1+1", "ß", "\U0001f600", "-", "null", "sep=;",
])  # fmt: skip
text = st.one_of(st.sampled_from("abc"), hard, st.text(max_size=6))
picture = st.sampled_from(["red.png", "red.webp", "blue.jpg"])
ITEMS = {
    "text": st.tuples(text, st.just("")),
    "image": st.tuples(st.just(""), picture),
    "both": st.tuples(text, picture),
    "bad": st.tuples(st.sampled_from(["", None, "x"]), st.sampled_from([*PICTURES, *NO_PICTURES])),
}


@st.composite
def drawn(draw):
    """Queries with answers and negatives, those of a query mostly of one kind."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        asked, shown = (draw(st.sampled_from(list(ITEMS))) for _ in range(2))
        right, wrong = (draw(st.lists(ITEMS[shown], min_size=n, max_size=3)) for n in (1, 0))
        found.append((draw(ITEMS[asked]), right, wrong))
    return found


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def folder(root, found):
    rows = [(name, words, key) for (words, name), right, _ in found for key, _ in right]
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption", "more"), *rows])
    return root


def nli(root, found):
    with open(root / "a.csv", "w", newline="", encoding="utf-8") as file:
        rows = [
            (query[0], *(one[0] for one in (right + wrong)[:2])) for query, right, wrong in found
        ]
        csv.writer(file).writerows([("sent0", "sent1", "hard_neg"), *rows])
    return root / "a.csv"


def mmeb(root, found):
    rows = [
        {"qry": q[0], "qry_image_path": q[1], "pos_text": p[0], "pos_image_path": p[1],
         "neg_text": [n[0] for n in wrong], "neg_image_path": [n[1] for n in wrong]}
        for q, right, wrong in found
        for p in right[:1]
    ]  # fmt: skip
    jsonl(root / "a.jsonl", rows)
    return root / "a.jsonl"


def mmeb_test(root, found):
    rows = [
        {"qry_text": q[0], "qry_img_path": q[1], "tgt_text": [i[0] for i in right + wrong],
         "tgt_img_path": [i[1] for i in right + wrong]}
        for q, right, wrong in found
    ]  # fmt: skip
    jsonl(root / "a.jsonl", rows)
    return root / "a.jsonl"


def numbered(found):
    """(queries, candidates, pairs): ids are places; an item that comes twice is one candidate."""
    places: dict[tuple, int] = {}
    for _, right, wrong in found:
        for one in (*right, *wrong):
            places.setdefault(one, len(places))
    pairs = [(i, places[one]) for i, (_, right, _) in enumerate(found) for one in right]
    return [query for query, _, _ in found], places, pairs


def tevatron(root, found):
    queries, places, _ = numbered(found)
    jsonl(root / "corpus.jsonl",
          [{"docid": i, "text": w, "image": name} for (w, name), i in places.items()])  # fmt: skip
    rows = [
        {"query_id": i, "query_text": q[0], "query_image": q[1],
         "positive_document_ids": [places[one] for one in right],
         "negative_document_ids": [places[one] for one in wrong]}
        for i, (q, (_, right, wrong)) in enumerate(zip(queries, found, strict=True))
    ]  # fmt: skip
    jsonl(root / "queries.jsonl", rows)
    return root


def beir(root, found):
    queries, places, pairs = numbered(found)
    for name, items in (("corpus", places.items()), ("queries", zip(queries, itertools.count()))):
        jsonl(root / f"{name}.jsonl", [{"_id": f" {i}", "text": one[0]} for one, i in items])
    (root / "qrels").mkdir()
    lines = "".join(f" {q}\t {d}\t{d - 1}\n" for q, d in pairs)
    for split in ("train", "dev", "test"):
        (root / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    return root


def mteb(root, found):
    queries, places, pairs = numbered(found)
    root = root / "mbeir_cirr_task7"
    root.mkdir()
    for name, items in (("corpus", places.items()), ("query", zip(queries, itertools.count()))):
        rows = [
            {"id": f"8:{i}", "modality": ",".join(m for m, t in (("text", w), ("image", p)) if t),
             "text": w, "image": {"bytes": PICTURES.get(p), "path": None}}
            for (w, p), i in items
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), root / f"{name}-0-of-1.parquet")
    rows = [{"query-id": f"8:{q}", "corpus-id": f"8:{d}", "score": d - 1} for q, d in pairs]
    pq.write_table(pa.Table.from_pylist(rows), root / "qrels-0-of-1.parquet")
    return root


WRITERS = {"beir": beir, "folder": folder, "mmeb": mmeb, "mmeb-test": mmeb_test, "mteb": mteb,
           "nli": nli, "tevatron": tevatron}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read(format, tmp_path):
    attempt, loaded = itertools.count(), []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(drawn(), st.sampled_from(SPLITS))
    def holds(found, split):
        root = tmp_path / str(next(attempt))
        (root / "s").mkdir(parents=True)
        for name, content in PICTURES.items():
            (root / "s" / name).write_bytes(content)
        source = WRITERS[format](root / "s", found)
        try:
            counts = convert_file(format, source, root / "data", split=split, skip_bad=ANY)
        except DataError as error:  # every row is bad: one line, and nothing is left
            assert "\n" not in str(error) and not (root / "data").exists()
            return
        data = load(root / "data", split=split)
        loaded.append(len(data.queries))
        assert loaded[-1] == sum(counts["queries"].values())
        check(data, root / "data")

    holds()
    assert sum(loaded) > 20


def check(data, root: Path):
    shared: dict[tuple, set[str]] = {}
    for query in data.queries:
        assert query.positives and not set(query.positives) & set(query.negatives)
        assert len(set(query.positives)) == len(query.positives)
        key = query.task, query.instruction, query.content_hash()
        assert shared.setdefault(key, set(query.positives)) == set(query.positives)
        assert query.image is None or query.image.is_file()
    for pool in data.pools.values():
        for item in pool:
            assert item.image is None or item.image.is_relative_to(root)
    for id, dids in data.minimal_pairs.items():
        assert id and len(set(dids)) == len(dids)
