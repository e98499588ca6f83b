"""M-BEIR as it is published: its training layout, its sister sets, its size; parts drawn of it."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from elva.cli import app
from elva.data import Item, load, mbeir
from elva.data import table as tables
from elva.data.layout import query_file
from elva.data.sample import subset_rows, unreadable
from elva.data.strict import Faults
from elva.errors import DataError, UserError
from elva.evaluation.sets import SUBTASKS
from tests.elva.published import published


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    return published(corpus, tmp_path_factory.mktemp("published") / "M-BEIR")


@pytest.fixture
def tree(whole, tmp_path):
    """A copy that a test may change; pictures are links."""
    return shutil.copytree(whole, tmp_path / "M-BEIR", symlinks=True)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def sisters(tmp_path):
    """InfoSeek's real shape, text standing in for pictures: answers of its own and of OVEN's."""
    write(
        tmp_path / "instructions/query_instructions.tsv",
        ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1",
         "text\ttext\tINFOSEEK\t6\tFind it.", "text\ttext\tWebQA\t2\tFind it."],
    )  # fmt: skip
    row = {"txt": "a", "img_path": None, "modality": "text", "src_content": None}
    write(tmp_path / "cand_pool/local/mbeir_infoseek_task1_cand_pool.jsonl",
          [{"did": "6:1", **row}, {"did": "6:2", **row}])  # fmt: skip
    return tmp_path


def ask(root, *changes):
    row = {
        "query_txt": "q", "query_img_path": None, "query_modality": "text", "pos_cand_list": [],
        "neg_cand_list": [], "task_id": 1,
    }  # fmt: skip
    rows = [{"qid": f"6:{n}", **row, **change} for n, change in enumerate(changes, start=10)]
    write(root / "query/test/mbeir_infoseek_task1_test.jsonl", rows)


# -- sister sets ---------------------------------------------------------------------------------


def test_answers_of_the_sister_set_are_judged_but_not_found(sisters):
    ask(sisters, {"pos_cand_list": ["6:1", "5:7"]}, {"pos_cand_list": ["5:8", "5:9"]},
        {"pos_cand_list": ["6:2"], "neg_cand_list": ["5:7", "6:1"]})  # fmt: skip
    write(
        sisters / "qrels/test/mbeir_infoseek_task1_test_qrels.txt",
        ["6:10 0 6:1 1 1", "6:10 0 5:7 1 1", "6:11 0 5:8 1 1", "6:11 0 5:9 1 1", "6:12 0 6:2 1 1"],
    )
    for faults in (Faults(), Faults(3)):  # bad rows allowed or not, no query is lost
        (one,) = mbeir.read_sets(sisters, split="test", faults=faults)
        first, second, third = one.queries
        assert (first.positives, first.outside) == (("6:1",), ("5:7",))
        assert (second.positives, second.outside) == ((), ("5:8", "5:9"))
        assert (third.positives, third.negatives) == (("6:2",), ("6:1",))
        assert one.notices == (
            "infoseek_task1: 1 of 3 queries have no right answer in "
            "mbeir_infoseek_task1_cand_pool; 3 right answers lie outside it, in another set's "
            "pool, 1 negatives outside are left out",
        )
        assert not faults.found


@pytest.mark.parametrize(
    ("change", "did"),
    [
        ({"pos_cand_list": ["6:1", "7:1"]}, "7:1"),  # a set whose pool nobody has
        ({"pos_cand_list": ["6:1", "6:9"]}, "6:9"),  # its own, whose pool is here
        ({"pos_cand_list": ["6:1"], "neg_cand_list": ["2:1"]}, "2:1"),  # WebQA's is not there
    ],
)
def test_an_answer_that_nobody_has_is_an_error(sisters, change, did):
    ask(sisters, {"pos_cand_list": ["6:1"]}, change)
    with pytest.raises(DataError, match=rf"test.jsonl:2: candidate {did} is not in the pool"):
        load(sisters, split="test")
    webqa = sisters / "cand_pool/local/mbeir_webqa_task1_cand_pool.jsonl"
    write(webqa, [{"did": "2:1", "txt": "b", "img_path": None, "modality": "text"}])
    if did == "2:1":  # now somebody has it
        assert load(sisters, split="test").queries[1].negatives == ()


def test_qrels_may_name_what_lies_outside_and_nothing_else(sisters):
    ask(sisters, {"pos_cand_list": ["6:1", "5:7"]})
    qrels = sisters / "qrels/test/mbeir_infoseek_task1_test_qrels.txt"
    for line, rule in (
        ("6:10 0 5:8 1 1", "candidate 5:8 is not in the pool"),
        ("6:10 0 6:2 1 1", "6:2 is not a positive of query 6:10"),
        ("6:11 0 6:1 1 1", "query 6:11 is not in the query file"),
    ):
        write(qrels, ["6:10 0 5:7 1 1", "6:10 0 6:9 0 1", line])
        with pytest.raises(DataError, match=f"qrels.txt:3: {rule}"):
            load(sisters, split="test")


def test_each_test_set_counts_what_its_pool_lacks(whole):
    """A third of OVEN's queries have no answer of their own set; all of InfoSeek's have one."""
    sets = {one.stem: one for one in mbeir.read_sets(whole, split="test")}
    assert set(sets) == set(SUBTASKS)
    none = {stem: int((one.queries.listed("positives") == 0).sum()) for stem, one in sets.items()}
    assert {stem: n for stem, n in none.items() if n} == {"oven_task6": 5, "oven_task8": 5}
    outside = {stem: int(one.queries.listed("outside").sum()) for stem, one in sets.items()}
    assert {s for s, n in outside.items() if n} == {
        "oven_task6", "oven_task8", "infoseek_task6", "infoseek_task8",
    }  # fmt: skip
    assert all(outside[f"{s}_task{k}"] == 10 for s in ("oven", "infoseek") for k in (6, 8))
    assert [bool(one.notices) for one in sets.values()] == [n > 0 for n in outside.values()]
    # Asked of the union, or of all pools of the task, nothing lies outside.
    for one in mbeir.read_sets(whole, split="test", pools="global"):
        assert one.pool_name == "mbeir_union_test_cand_pool" and not one.notices
    assert not load(whole, split="test").queries.listed("outside").any()


# -- training layout -----------------------------------------------------------------------------


def test_training_files_mix_tasks_and_ask_the_union(whole):
    dataset = load(whole)
    assert dataset.queries.tasks() == {
        "it2i": 48, "t2it": 48, "t2i": 72, "i2t": 72, "it2t": 48, "it2it": 48, "i2i": 24, "t2t": 24,
    }  # fmt: skip
    (pool,) = {id(pool): pool for pool in dataset.pools.values()}.values()
    assert len(pool) == 120 * 17  # 16 sets, and MSCOCO's second captions
    assert not dataset.queries.listed("outside").any() and not dataset.notices
    sets = mbeir.read_sets(whole, split="train")
    assert [one.stem for one in sets] == sorted(SUBTASKS, key=lambda s: (s[:-1], s[-1]))
    assert {one.path.name for one in sets if one.stem.startswith("webqa")} == {
        "mbeir_webqa_train.jsonl"
    }
    (nights,) = mbeir.read_sets(whole, split="train", tasks=["nights_task4"])  # without task_id
    assert (len(nights.queries), nights.queries[3].task) == (24, "i2i")
    webqa = load(whole, tasks=["webqa_task1"]).queries
    assert {(len(q.positives), len(q.negatives)) for q in webqa} == {(2, 4)}


def test_the_union_file_repeats_rows_of_small_sets(tree):
    sets, union = load(tree), load(tree, queries="union")
    assert len(union.queries) == len(sets.queries) + 3 * 24
    once = union.queries.distinct()
    assert sorted(once.ids) == sorted(sets.queries.ids)
    assert {q.id: q for q in once} == {q.id: q for q in sets.queries}
    shutil.rmtree(tree / "query" / "train")
    assert list(load(tree).queries) == list(union.queries)  # where only it is there
    assert load(tree, split="val", queries="union").queries.tasks()["i2i"] == 6


def test_files_with_a_task_in_their_names_are_read_alike(tree):
    mixed = tree / "query/train/mbeir_webqa_train.jsonl"
    for task in (1, 2):
        rows = [row for row in rows_of(mixed) if row["task_id"] == task]
        write(query_file(tree, f"webqa_task{task}", "train"), rows)
    before = {q.id: q for q in load(tree, tasks=["t2t", "webqa_task2"]).queries}
    mixed.unlink()
    after = load(tree, tasks=["t2t", "webqa_task2"])
    assert {q.id: q for q in after.queries} == before and len(before) == 48
    assert len(after.pool("t2t")) == 120 * 17


def test_without_a_training_pool_the_test_pool_is_not_taken(tree):
    for path in (tree / "query/train").iterdir():
        if "mscoco" not in path.name:
            path.unlink()
    (tree / "cand_pool/global/mbeir_union_train_cand_pool.jsonl").unlink()
    with pytest.raises(DataError, match="no candidate pool mbeir_mscoco_task<number>_cand_pool"):
        load(tree)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"task_id": 9}, "task_id 9 is not the number of a task"),
        ({"task_id": "0"}, "task_id '0' is not the number of a task"),
        ({"task_id": 3}, "query_modality is text, not image"),
        ({"task_id": None, "pos_cand_list": ["0:2"]}, "task_id is missing and candidate 0:2 "),
    ],
)
def test_a_row_of_no_task_is_an_error(tree, change, rule):
    path = tree / "query/train/mbeir_visualnews_train.jsonl"
    first, *rest = rows_of(path)
    write(path, [{**first, **change}, *rest])
    with pytest.raises(DataError, match=f"{path}:1: {rule}"):
        load(tree)


# -- the mapped table ----------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    return lambda: monkeypatch.setattr(tables, "MAPPED_FROM_BYTES", 0)


def test_large_query_files_are_read_once_and_mapped(tree, mapped, monkeypatch):
    expected = load(tree)
    mapped()
    read = []
    records = mbeir.records
    monkeypatch.setattr(
        mbeir, "records", lambda path, f: read.append(path.name) or records(path, f)
    )
    with ThreadPoolExecutor(3) as pool:
        first, second, third = pool.map(lambda _: load(tree), range(3))
    assert sorted(read) == sorted(set(read)) and len(read) == 11
    for found in (first, second, third):
        assert list(found.queries) == list(expected.queries)
        assert [list(found.pool(t)) for t in ("i2i",)] == [list(expected.pool("i2i"))]
    read.clear()
    instructions = tree / "instructions/query_instructions.tsv"
    instructions.write_text(instructions.read_text().replace("Find what", "Fetch what"))
    assert load(tree, tasks=["i2i"]).queries[0].instruction == "Fetch what is asked for."
    # Checked against something else now; pools are what they were.
    assert len(read) == 10 and not any("pool" in name for name in read)
    pool = tree / "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
    write(pool, [row for row in rows_of(pool) if row["did"].split(":")[0] != "4"])
    with pytest.raises(DataError, match="candidate 4:"):
        load(tree, tasks=["nights_task4"])


def test_faults_of_a_mapped_file_are_those_of_a_small_one(tree, mapped):
    mapped()
    path = query_file(tree, "cirr_task7", "test")
    rows = rows_of(path)
    for bad, rule in (
        ({"pos_cand_list": ["8:999"]}, "candidate 8:999 is not in the pool"),
        ({"qid": rows[0]["qid"]}, f"qid {rows[0]['qid']} again, first in {path}:1"),
        ({"qid": "8:777"}, None),
    ):
        write(path, [*rows[:9], {**rows[9], **bad}, *rows[10:]])
        for _ in range(2):  # nothing of it is kept
            with pytest.raises(DataError) as caught:
                mbeir.read_sets(tree, tasks=["cirr_task7"])
            gone = f"query {rows[9]['qid']} is not in the query file"
            assert str(caught.value).endswith(f"{path}:10: {rule}" if rule else gone)
    write(path, rows)
    assert len(mbeir.read_sets(tree, tasks=["cirr_task7"])[0].queries) == 15


def test_queries_are_a_sequence(whole, mapped):
    mapped()
    queries = load(whole).queries
    every = list(queries)
    assert [queries[i] for i in range(len(queries))] == every and queries[-1] == every[-1]
    assert list(queries[5:40:3]) == every[5:40:3] and list(queries[::-1]) == every[::-1]
    order = np.array([300, 2, 2, 77, 8])
    assert list(queries.select(order)) == [every[i] for i in order]
    assert list(queries.select(order)[1:3]) == [every[2]] * 2
    assert (queries.ids, queries.texts) == ([q.id for q in every], [q.text for q in every])
    for task, count in queries.tasks().items():
        rows = queries.rows_of(task)
        assert rows.tolist() == [i for i, q in enumerate(every) if q.task == task]
        assert len(rows) == count
    assert list(queries.tasks()) == list(dict.fromkeys(q.task for q in every))
    assert len(queries[:0]) == 0 and list(queries[:0]) == [] and queries[:0].tasks() == {}
    with pytest.raises(IndexError):
        queries[len(queries)]


# -- one answer under several ids ----------------------------------------------------------------


def encoded(format, colour="red", **options):
    image = Image.new("RGB", (9, 7), colour)
    image.putpixel((3, 2), (1, 2, 3))
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_content_is_words_and_pixels_however_stored(tmp_path):
    png, webp = encoded("PNG"), encoded("WEBP", lossless=True)
    (tmp_path / "a.png").write_bytes(png)
    held = Image.open(io.BytesIO(png)).convert("RGB")
    pictures = [png, webp, encoded("PNG", compress_level=0), tmp_path / "a.png", held]
    assert len({Item("1:1", None, p, "image").content_hash() for p in pictures}) == 1
    texts = ["A cat.", "a cat", " a  CAT ", "a\u00a0cat.", '"A cat"']
    assert len({Item("1:1", t, None, "text").content_hash() for t in texts}) == 1
    others = [
        ("A cat.", None), ("A cap.", None), ("A cat!", None), (None, png), ("A cat.", png),
        (None, encoded("PNG", "blue")), (None, held.resize((7, 9))),
    ]  # fmt: skip
    assert len({Item("1:1", t, p, "").content_hash() for t, p in others}) == len(others)


def test_shared_captions_have_one_identity(whole):
    (one,) = mbeir.read_sets(whole, tasks=["mscoco_task3"])
    numbers = one.pool.identities(np.arange(len(one.pool)))
    texts = [item.text.casefold() for item in one.pool]
    assert numbers.dtype == np.int64 and numbers.all()
    groups = {n: {t for t, m in zip(texts, numbers, strict=True) if m == n} for n in numbers}
    assert all(len(group) == 1 for group in groups.values())
    assert len(groups) == len(set(texts)) == 120 - 6  # every tenth picture shares a caption


def test_identities_are_made_once_and_kept_beside_a_mapped_pool(tree, mapped, monkeypatch):
    mapped()
    made = []
    content = Item.content_hash
    monkeypatch.setattr(Item, "content_hash", lambda i: made.append(i.id) or content(i))

    def numbers(rows):
        (one,) = mbeir.read_sets(tree, tasks=["nights_task4"])
        return one.pool.identities(rows)

    first = numbers([5, 3, 5])
    assert first[0] == first[2] != first[1] and len(made) == 2
    assert numbers([3, 4]).tolist()[0] == first[1] and len(made) == 3
    assert (
        load(tree, split="test", tasks=["i2i"]).pool("i2i").identities([4, 5]).tolist()[1]
        == (first[0])
    )
    assert len(made) == 3
    (tree / "mbeir_images/nights_images").unlink()
    with pytest.raises(DataError, match="no such picture"):
        numbers([6])


# -- parts, checks -------------------------------------------------------------------------------


def test_a_share_is_drawn_of_each_group(whole):
    queries = load(whole).queries
    rows = subset_rows(queries, 0.25, "dataset", 3)
    assert rows.tolist() == sorted(set(rows.tolist()))
    groups, counts = np.unique(queries.datasets[rows], return_counts=True)
    assert groups.tolist() == list(range(10))
    assert counts.tolist() == [12, 12, 12, 6, 6, 12, 12, 6, 6, 12]
    assert np.array_equal(rows, subset_rows(queries, 0.25, "dataset", 3))
    assert not np.array_equal(rows, subset_rows(queries, 0.25, "dataset", 4))
    assert len(subset_rows(queries, 1e-6, "set", 0)) == 16  # one at least
    assert len(subset_rows(queries, None, "task", 0, count=30)) == 6 * 30 + 2 * 24
    assert subset_rows(queries, 1.0, "task", 0).tolist() == list(range(len(queries)))
    # A group's draw depends on that group alone.
    webqa = queries.select(np.flatnonzero(queries.datasets == 2))
    assert webqa.select(subset_rows(webqa, 0.25, "dataset", 3)).ids == [
        i for i in queries.select(rows).ids if i.startswith("2:")
    ]
    for words in ({}, {"share": 0.5, "count": 2}, {"share": 1.5}, {"count": 0},
                  {"share": 0.1, "per": "day"}):  # fmt: skip
        with pytest.raises(UserError, match="subset: "):
            subset_rows(queries, **words)


def run(*words):
    return CliRunner().invoke(app, ["data", *map(str, words)])


def test_a_subset_is_a_data_directory(whole, tmp_path):
    part = tmp_path / "part"
    result = run("subset", whole, "--share", 0.2, "--per", "set", "--output", part, "--json")
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)
    assert counts["train"]["webqa_task1"] == 5 and counts["test"] == dict.fromkeys(SUBTASKS, 3)
    for split in ("train", "val", "test"):
        known = {q.id: q for q in load(whole, split=split).queries}
        drawn = load(part, split=split).queries
        assert len(drawn) == sum(counts[split].values())
        for query in drawn:
            assert query.positives == known[query.id].positives
    for one in mbeir.read_sets(part, split="test"):  # the qrels agree, or it would not load
        lines = (part / f"qrels/test/mbeir_{one.stem}_test_qrels.txt").read_text().splitlines()
        assert {line.split()[0] for line in lines} == set(one.queries.ids)
    assert (part / "cand_pool").resolve() == (whole / "cand_pool").resolve()
    again = run("subset", whole, "--share", 0.2, "--output", part)
    assert again.exit_code == 2 and "must not exist yet" in again.output


def test_a_published_tree_is_checked_and_proved(tree):
    result = run("check", tree, "--split", "test", "--prove", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bad"] == [] and found["card"]["missing"] == []
    assert set(found["card"]["sets"]) == set(found["proof"]["test"]["sets"]) == set(SUBTASKS)
    assert found["proof"]["test"]["embedded"]["mbeir_mscoco_task3_test_cand_pool"] == 120
    assert len(found["notices"]) == 4 and found["missing_folders"] == []

    (tree / "cand_pool/local/mbeir_oven_task8_cand_pool.jsonl").unlink()
    (tree / "cand_pool/global/mbeir_union_test_cand_pool.jsonl").unlink()
    (tree / "mbeir_images/cirr_images").unlink()
    (tree / "mbeir_images.tar.gz.part-00").write_bytes(b"")
    (tree / "query/train/mbeir_edis_train.jsonl").unlink()
    result = run("check", tree, "--split", "test", "--prove", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 2 and "proof" not in found
    assert "no candidate pool mbeir_oven_task8_cand_pool.jsonl" in found["bad"][0]
    assert found["card"]["missing"] == [
        "oven_task8: no candidate pool", "query/train/mbeir_edis_train.jsonl: not there",
        "cand_pool/global/mbeir_union_test_cand_pool.jsonl: not there",
    ]  # fmt: skip
    # 80 candidates, 15 queries
    assert found["missing_folders"] == [
        "mbeir_images/cirr_images: not there, 95 pictures lie in it"
    ]
    assert found["missing_pictures"] == 95 and len(found["bad"]) == 96
    lines = run("check", tree, "--split", "test").output
    assert "archives that lie here: mbeir_images.tar.gz.part-00; unpack them" in lines
    assert "15 of its 16 test sets are whole" in lines


def test_a_drawn_sample_of_pictures_is_decoded(tree):
    (one,) = mbeir.read_sets(tree, tasks=["nights_task4"])
    parts = [one.queries, one.pool, one.pool]
    assert unreadable(parts, 10_000, 0) == []
    folder = tree / "mbeir_images/nights_images"
    pictures = folder.resolve()
    folder.unlink()
    shutil.copytree(pictures, folder)
    named = one.pool[4].image
    named.write_bytes(named.read_bytes()[:60])
    asked = sum(query.image == named for query in one.queries)
    lines = unreadable(parts, 10_000, 0)
    assert len(lines) == 1 + asked and all("unreadable picture" in line for line in lines)
    assert unreadable(parts, 20, 1) == unreadable(parts, 20, 1)
