"""The sets that the paper evaluates on and no stage trains on: rows as they are published, their
figures by hand, rows that are none, and the paper's table."""

import json
import pickle
from statistics import fmean

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from elva.cli import app
from elva.commands import evaluate as command
from elva.commands.embed import embed as embed_data
from elva.commands.survey import random_embeddings
from elva.data import strict
from elva.data.formats import UNSEEN, choices, convert_file
from elva.data.formats.whole import objects
from elva.data.mbeir import read_sets
from elva.errors import DataError
from elva.evaluation import protocol, sets
from elva.evaluation.metrics import measure
from elva.evaluation.submission import submission
from elva.model.encoder import open_encoder
from elva.mrbench.build import NOTES
from elva.report import pictures
from tests.elva import sentence_models, unseen
from tests.elva.test_evaluation import embed
from tests.elva.unseen import converted

FINAL = "ccneg_images/cc3m_subset_images_extracted_final"


def read(data, split="test"):
    return {one.stem: one for one in read_sets(data, split=split)}


def shown(item):
    """What an item says, or of a picture how red it is."""
    return item.text or item.load_image().getpixel((0, 0))[0]


def told(one):
    """Each query with its answers."""
    return [
        (shown(query), [shown(one.pool[one.pool.row(did)]) for did in query.positives])
        for query in one.queries
    ]


def run(*words):
    return CliRunner().invoke(app, [*map(str, words)])


# -- rows as they are published --------------------------------------------------------------------


def test_every_set_has_its_form_here_and_its_place_in_the_table():
    assert set(unseen.MADE) == set(UNSEEN) == {stem.split("_")[0] for stem in sets.UNSEEN}


@pytest.mark.parametrize("make", [unseen.flickr, unseen.flickr_csv])
def test_flickr30k_is_read_in_karpathys_split(make, tmp_path):
    make(tmp_path / "source")
    found = read(converted("flickr30k", tmp_path))
    assert [*found] == ["flickr30k_task0", "flickr30k_task3"]
    first, second = [shown(one) for one in found["flickr30k_task0"].pool]
    captions = ["A dog, number 0.", "It runs.", "A dog, number 2.", 'Hi" is said.']
    answers = [[first], [first], [second], [second]]
    assert told(found["flickr30k_task0"]) == list(zip(captions, answers, strict=True))
    assert told(found["flickr30k_task3"]) == [(first, captions[:2]), (second, captions[2:])]
    assert len(found["flickr30k_task3"].pool) == 4
    train = read(converted("flickr30k", tmp_path, "train"), "train")
    assert [len(one.queries) for one in train.values()] == [2, 1]


def test_a_caption_that_two_pictures_share_is_right_for_one_of_them(tmp_path):
    rows = json.loads(json.dumps(unseen.FLICKR))
    rows[2]["sentences"][0]["raw"] = rows[0]["sentences"][0]["raw"]
    unseen.flickr(tmp_path / "source", rows)
    found = read(converted("flickr30k", tmp_path))
    assert [len(query.positives) for query in found["flickr30k_task0"].queries] == [1, 1, 1, 1]
    assert len({q.positives for q in found["flickr30k_task0"].queries}) == 2
    assert len(found["flickr30k_task3"].pool) == 4


def test_urban1k_is_read_in_the_order_of_its_numbers(tmp_path):
    unseen.urban(tmp_path / "source")
    counts = convert_file("urban1k", tmp_path / "source", tmp_path / "data", split="test")
    assert counts["notices"] == ["1 caption has further lines, which are not part of it"]
    found = read(tmp_path / "data")
    reds = [shown(one) for one in found["urban1k_task0"].pool]
    captions = [f"Street {i}, at dusk." for i in (1, 2, 10)]
    assert told(found["urban1k_task0"]) == [(c, [r]) for c, r in zip(captions, reds, strict=True)]
    assert told(found["urban1k_task3"]) == [(r, [c]) for c, r in zip(captions, reds, strict=True)]


def test_circo_keeps_its_ids_and_its_secrets(tmp_path):
    one = read(converted("circo", tmp_path), "val")["circo_task7"]
    assert [query.id for query in one.queries] == ["19:0", "19:1"]
    assert one.queries[0].positives == ("19:12", "19:14", "19:15")
    assert one.queries[0].text == "Has two of them."
    assert shown(one.pool[one.pool.row("19:11")]) == one.queries[0].load_image().getpixel((0, 0))[0]
    assert one.pool.ids == [f"19:{i}" for i in range(11, 16)]
    data = converted("circo", tmp_path, "test")
    hidden = read(data)["circo_task7"]
    assert [(q.id, q.positives, q.outside) for q in hidden.queries] == [
        ("19:1", (), ()), ("19:0", (), ()),
    ]  # fmt: skip
    assert not (data / "qrels").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_are_missing_in_no_split_but_test(split, tmp_path):
    data = converted("circo", tmp_path)
    (file,) = data.glob("query/*/*.jsonl")
    text = file.read_text().replace('["19:11"]', "null")
    place = data / "query" / split / f"mbeir_circo_task7_{split}.jsonl"
    place.parent.mkdir(exist_ok=True)
    place.write_text(text)
    with pytest.raises(DataError, match=rf"_{split}.jsonl:2: pos_cand_list is not a list"):
        read(data, split)


def test_answers_that_are_not_published_are_no_misses(tmp_path):
    """Of any set: it is checked, embedded and searched, and has no figure."""
    data = converted("flickr30k", tmp_path)
    (file,) = data.glob("query/test/*task0*")
    rows = [{**row.fields, "pos_cand_list": None} for row in strict.records(file)]
    strict.write_lines(file, map(strict.dump, rows))
    with pytest.raises(DataError, match=r"_qrels.txt:1: 17:\d is not a positive of query 17:1"):
        read(data)
    (data / "qrels" / "test" / "mbeir_flickr30k_task0_test_qrels.txt").unlink()
    assert pictures.names(data) == {}
    assert run("data", "check", data, "--prove").exit_code == 0
    random_embeddings(data, tmp_path / "e", split="test", tasks=None, most=9)
    result = command.evaluate_embeddings(tmp_path / "e", data, tmp_path / "out")
    assert result["sets"]["flickr30k_task0"] == {
        "task": "t2i", "queries": 4, "pool": 2, "k": 1, "answers": "not published",
    }  # fmt: skip
    assert result["no_answer_inside"] == [] and [*result["tasks"]] == ["i2t"]
    (table,) = protocol.tables(result)
    assert list(table.columns[3].cells)[:1] == [""]


def test_sugarcrepe_is_seven_sets_of_two_captions_each(tmp_path):
    data = converted("sugarcrepe", tmp_path)
    found = read(data)
    assert {*found} == {f"sugarcrepe_{kind}_task3" for kind in unseen.KINDS}
    one = found["sugarcrepe_swap_att_task3"]
    assert [item.text for item in one.pool] == [
        "A cat on a mat.", "A dog on a mat, swap_att.", "A dog on a mat, swap_att.",
        "A cat in a hat.",
    ]  # fmt: skip
    own = [row.ids("candidates") for row in strict.records(data / "minimal_pairs.jsonl")]
    assert len(own) == 14 and all(len(dids) == 2 for dids in own)
    for query in one.queries:
        assert (*query.positives, *query.negatives) in own


def test_ccneg_is_tested_on_its_last_rows_without_the_commas_of_the_negated(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "CCNEG_TEST", 3)
    one = read(converted("ccneg", tmp_path))["ccneg_task3"]
    assert [q.negatives for q in one.queries] and [item.text for item in one.pool][:2] == [
        "A lamp, number 1.", "A lamp without light number 1.",
    ]  # fmt: skip
    assert [len(one.queries), len(one.pool)] == [3, 6]
    train = read(converted("ccneg", tmp_path, "train"), "train")["ccneg_task3"]
    assert train.pool[0].text == "A lamp, number 0."
    few = convert_file("ccneg", tmp_path / "source", tmp_path / "few", split="test")
    assert few["notices"] == []
    monkeypatch.setattr(choices, "CCNEG_TEST", 40_000)
    few = convert_file("ccneg", tmp_path / "source", tmp_path / "all", split="test")
    assert few["notices"] == ["4 rows; CC-Neg evaluates on 40,000"]


@pytest.mark.parametrize("images", [None, ".", "ccneg_images", FINAL])
def test_ccnegs_pictures_lie_where_its_paths_or_its_readme_say(images, tmp_path):
    paths = [f"/workspace/datasets/cc3m/cc3m_subset_images_extracted_final/{i}.jpg" for i in (0, 1)]
    rows = [unseen.neg_row(i) for i in (0, 1)]
    root = unseen.neg(tmp_path / "source", rows, paths)
    found = read(converted("ccneg", tmp_path, images=None if images is None else root / images))
    assert len({shown(query) for query in found["ccneg_task3"].queries}) == 2


# -- figures by hand -------------------------------------------------------------------------------


def directions(order, size):
    """A query that ranks one-hot candidates in an order."""
    row = torch.zeros(size)
    row[order] = torch.arange(len(order), 0, -1).float()
    return row


def test_circos_map_divides_by_what_could_be_found(tmp_path):
    data = converted("circo", tmp_path)
    embed(tmp_path / "e" / "mbeir_circo_task7_cand_pool", [f"19:{i}" for i in range(11, 16)],
          torch.eye(5), "pool")  # fmt: skip
    rows = torch.stack([directions([1, 2, 3, 0, 4], 5), directions([1, 0, 2, 3, 4], 5)])
    embed(tmp_path / "e" / "mbeir_circo_task7_val", ["19:0", "19:1"], rows, "queries")
    result = command.evaluate_embeddings(tmp_path / "e", data, tmp_path / "out", split="val")
    figures = result["sets"]["circo_task7"]
    first, second = (1 / 1 + 2 / 3 + 3 / 5) / 3, 1 / 2
    for k in (5, 10, 25, 50):
        assert figures[f"map_at_{k}"] == pytest.approx((first + second) / 2)
    assert result["average"] == figures["map_at_5"]
    # Three right answers, of which two can be among the first two: 1 / 1 over 2, and 1 / 2 over 1.
    found = {"a": [("x", 3.0), ("y", 2.0), ("z", 1.0)], "b": [("x", 2.0), ("y", 1.0)]}
    judged = {"a": {"x": 1, "z": 1, "w": 1}, "b": {"y": 1}}
    assert measure(found, judged, map_cutoffs=(2,)).mean["map_at_2"] == (1 / 2 + 1 / 2) / 2
    assert measure(found, judged, map_cutoffs=(3,)).per_query["a"]["map_at_3"] == (1 + 2 / 3) / 3
    assert "map_at_2" not in measure(found, judged).mean
    # A tie is lost: y comes before x, and z's rank is 3 however it is written.
    tied = {"a": [("x", 1.0), ("y", 1.0), ("z", 0.0)]}
    assert measure(tied, judged, map_cutoffs=(5,)).per_query["a"]["map_at_5"] == (1 / 2 + 2 / 3) / 3


def test_circos_server_takes_what_is_written_for_it(tmp_path):
    data = converted("circo", tmp_path, "test", number=77)  # the numbers in the file stay CIRCO's
    one = read(data)["circo_task7"]
    embed(tmp_path / "e" / "mbeir_circo_task7_cand_pool", one.pool.ids, torch.eye(5), "pool")
    rows = torch.stack([directions([1, 2, 3, 0, 4], 5), directions([4, 3, 2, 1, 0], 5)])
    qids = [query.id for query in one.queries]
    embed(tmp_path / "e" / "mbeir_circo_task7_test", qids, rows, "queries")
    done = run("evaluate", "--embeddings", tmp_path / "e", "--data", data, "--output", tmp_path)
    path = tmp_path / "circo_task7.submission.json"
    assert done.exit_code == 0 and f"answers that its server takes: {path}" in done.stdout
    assert path.read_text() == '{"0": [15, 14, 13, 12, 11], "1": [12, 13, 14, 11, 15]}\n'
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["sets"] == {"circo_task7": {
        "task": "it2i", "queries": 2, "pool": 5, "k": 1, "answers": "not published",
        "submission": str(path),
    }}  # fmt: skip
    assert figures["average"] is None and not (tmp_path / "circo_task7.qrels.txt").exists()
    answers = {qid: [(did, 1.0) for did in one.pool.ids] for qid in qids}
    assert submission(one, answers, 2) == {"0": [11, 12], "1": [11, 12]}
    file = one.path
    file.write_text(file.read_text().replace('\\"id\\": \\"19:0\\", ', ""))
    with pytest.raises(DataError, match=r"_test.jsonl:2: src_content has no id of its source"):
        submission(one, answers, 2)


def test_a_tie_between_two_captions_is_lost_and_another_rows_caption_is_none(tmp_path):
    """The second row's picture is the first's, whose caption it would be nearest to."""
    data = converted("sugarcrepe", tmp_path)
    for at, (stem, one) in enumerate(sorted(read(data).items())):
        right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        embed(tmp_path / "e" / one.pool_name, one.pool.ids,
              torch.stack([right, wrong, wrong, wrong]), "pool")  # fmt: skip
        asked = torch.tensor([[2.0, 1.0], [2.0, 1.0]]) if at else torch.tensor([[1.0, 2.0]] * 2)
        qids = [query.id for query in one.queries]
        embed(tmp_path / "e" / f"mbeir_{stem}_test", qids, asked, "queries")
    result = command.evaluate_embeddings(tmp_path / "e", data, tmp_path / "out")
    found = [row["hit_at_1_among_its_own"] for _, row in sorted(result["sets"].items())]
    assert found == [0.0, *[0.5] * 6]
    assert result["average"] == pytest.approx(3 / 7)
    (table,) = protocol.tables(result)
    assert [*table.columns[-1].cells] == ["0.0", *["50.0"] * 6, "42.9"]
    assert table.columns[-1].header == "accuracy"


def test_recalls_of_flickr_and_their_table(tmp_path):
    """Two pictures, four captions: one caption finds the other picture first."""
    data = converted("flickr30k", tmp_path)
    found = read(data)
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
    for stem, asked, rows in (
        ("flickr30k_task0", vectors, torch.eye(2)), ("flickr30k_task3", torch.eye(2), vectors),
    ):  # fmt: skip
        qids = [query.id for query in found[stem].queries]
        embed(tmp_path / "e" / f"mbeir_{stem}_test", qids, asked, "queries")
        embed(tmp_path / "e" / found[stem].pool_name, found[stem].pool.ids, rows, "pool")
    result = command.evaluate_embeddings(tmp_path / "e", data, tmp_path / "out")
    (table,) = protocol.tables(result)
    assert [[*column.cells] for column in table.columns[3:]] == [
        ["75.0", "100.0", "87.5"], ["100.0", "100.0", "100.0"], ["100.0", "100.0", "100.0"],
    ]  # fmt: skip
    assert [column.header for column in table.columns[3:]] == ["R@1", "R@5", "R@10"]
    (data / NOTES).write_text("{}")
    again = command.evaluate_embeddings(tmp_path / "e", data, tmp_path / "again")
    assert (result["mrbench"], again["mrbench"]) == (False, True)


def test_a_model_that_is_embedded_and_evaluated_has_its_own_librarys_accuracy(tmp_path):
    """By `elva embed` and `elva evaluate`, as any other data."""
    data, model = converted("sugarcrepe", tmp_path), sentence_models.clip(tmp_path / "clip")
    embed_data(open_encoder(str(model)), data, tmp_path / "e", dtype="float32")
    result = command.evaluate_embeddings(tmp_path / "e", data, tmp_path / "out")
    theirs = sentence_models.own(model)
    for stem, one in read(data).items():
        picture = theirs.encode(one.queries[0].load_image(), normalize_embeddings=True)
        said = theirs.encode([item.text for item in one.pool], normalize_embeddings=True)
        scores = (said @ picture).reshape(2, 2)
        expected = np.mean(scores[:, 0] > scores[:, 1])
        assert result["sets"][stem]["hit_at_1_among_its_own"] == expected


@pytest.mark.parametrize("name", UNSEEN)
def test_the_data_are_proved_by_random_vectors_as_any_other(name, tmp_path):
    splits = ("val", "test") if name == "circo" else (unseen.MADE[name][1],)
    for split in splits:
        done = run("data", "check", converted(name, tmp_path, split), "--prove", "--decode")
        assert done.exit_code == 0 and "0 bad rows" in done.stdout


# -- rows that are none ----------------------------------------------------------------------------


def changed(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


HOSTILE = [
    ("flickr30k", "dataset_flickr30k.json", '"split": "test"', '"split": "restval"',
     r"flickr30k.json:1: images\[0\]: split 'restval' is not train, val or test"),
    ("flickr30k", "dataset_flickr30k.json", '"1000.jpg"', '"../1000.jpg"',
     r"images\[0\]: filename '../1000.jpg' leaves the root"),
    ("flickr30k", "dataset_flickr30k.json", '"1000.jpg"', '"9.jpg"',
     r"flickr30k.json:1: images\[0\]: no such picture"),
    ("flickr30k", "dataset_flickr30k.json", '"1002.jpg"', '"1000.jpg"',
     r"images\[2\]: 1000.jpg again"),
    ("flickr30k", "dataset_flickr30k.json", '"raw": "It runs"', '"raw": " "',
     r"images\[0\]: caption 1 is empty"),
    ("flickr30k", "dataset_flickr30k.json", '"raw": "It runs", ', "",
     r"images\[0\]: sentences\[1\]: raw is missing"),
    ("flickr30k", "dataset_flickr30k.json", '"images"', '"pictures"', r"json: images is missing"),
    ("flickr30k", "dataset_flickr30k.json", '"dataset": "x"}', '"dataset": "x"',
     r"flickr30k.json:1: not JSON"),
    ("circo", "annotations/val.json", '"target_img_id": 12', '"target_img_id": 14',
     r"val.json:2: \[0\]: target_img_id 14 is not the first of gt_img_ids"),
    ("circo", "annotations/val.json", "            15", "            16",
     r"val.json:2: \[0\]: gt_img_ids: 16 is not among COCO's pictures"),
    ("circo", "annotations/val.json", "            15", "            14",
     r"val.json:2: \[0\]: gt_img_ids is not a list of different ids"),
    ("circo", "annotations/val.json", '"reference_img_id": 12', '"reference_img_id": 99',
     r"val.json:17: \[1\]: reference_img_id 99 is not among COCO's pictures"),
    ("circo", "annotations/val.json", '"is at night"', '""',
     r"val.json:17: \[1\]: relative_caption is empty"),
    ("circo", "annotations/val.json", '"id": 1,', '"id": true,',
     r"val.json:17: \[1\]: id True is not a whole number"),
    ("circo", "annotations/val.json", '"id": 1,', '"id": 0,',
     r"val.json:17: \[1\]: query 19:0 again"),
    ("circo", "annotations/val.json", '"id": 1,', '"id": 1, "id": 2,',
     r"val.json:17: \[1\]: key 'id' twice"),
    ("circo", "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", '"id": 12',
     '"id": 11', r"unlabeled2017.json:1: images\[1\]: id 11 again"),
    ("circo", "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", "000000000015",
     "000000000016", r"unlabeled2017.json:1: images\[4\]: no such picture"),
    ("sugarcrepe", "data/add_att.json", '"negative_caption": "A dog on a mat, add_att."',
     '"negative_caption": "A cat on a mat."',
     r"add_att.json:2: \[0\]: caption and negative caption are the same"),
    ("sugarcrepe", "data/add_att.json", '"A cat in a hat."', "null",
     r"add_att.json:7: \[1\]: the negative caption is empty"),
    ("sugarcrepe", "data/add_att.json", '"1": {', '"0": {', r"add_att.json:7: key '0' twice"),
    ("sugarcrepe", "data/add_att.json", '"filename"', '"file"',
     r"add_att.json:2: \[0\]: filename is missing"),
    ("sugarcrepe", "data/add_att.json", "000000000001.jpg", "000000000002.jpg",
     r"add_att.json:2: \[0\]: no such picture"),
    ("sugarcrepe", "data/add_att.json", "    },", "    }", r"add_att.json:7: not JSON: no , or }"),
    ("urban1k", "caption/2.txt", "Street 2, at dusk.", "", r"2.txt:1: the first line is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "old", "new", "rule"), HOSTILE)
def test_a_row_that_is_none_is_a_line_and_nothing_is_written(name, file, old, new, rule, tmp_path):
    make, split = unseen.MADE[name]
    make(tmp_path / "source")
    changed(tmp_path / "source" / file, old, new)
    with pytest.raises(DataError, match=rule):
        converted(name, tmp_path)
    done = run("data", "convert", name, tmp_path / "source", "--split", split, "--output",
               tmp_path / "out")  # fmt: skip
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_bad_row_may_be_left_out(tmp_path):
    unseen.flickr(tmp_path / "source")
    changed(tmp_path / "source" / "dataset_flickr30k.json", '"1002.jpg"', '"9.jpg"')
    counts = convert_file(
        "flickr30k", tmp_path / "source", tmp_path / "out", split="test", skip_bad=1
    )
    assert counts["queries"] == {"t2i": 2, "i2t": 1} and len(counts["bad"]) == 1


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda root: (root / "image" / "2.jpg").unlink(), r"2.txt:1: no picture .*image/2.jpg"),
        (lambda root: (root / "caption" / "2.txt").unlink(), r"2.jpg: no caption .*caption/2.txt"),
        (lambda root: (root / "image" / "a.png").touch(), r"a.png: not a .jpg file"),
        (lambda root: (root / "image" / "1.jpg").write_bytes(b"no"), r"1.jpg: unreadable picture"),
        (lambda root: (root / "image").rename(root / "images"), r"image: no such folder"),
    ],
)
def test_a_folder_of_urban1k_that_is_not_whole(make, rule, tmp_path):
    make(unseen.urban(tmp_path / "source"))
    with pytest.raises(DataError, match=rule):
        converted("urban1k", tmp_path)


class Runs:
    """What a pickle may call when it is opened."""

    def __reduce__(self):
        return print, ("run",)


BAD = "annotations is not an object of json and sop_data"
NEG = [
    ({"annotations": [{"json": {"caption": "a"}}]}, rf"preprocessed.pt:row 1: {BAD}"),
    ({"annotations": ["a"]}, rf"preprocessed.pt:row 1: {BAD}"),
    ({"annotations": [{"json": {}, "sop_data": {"negative-prompt": "b", "caption": "c"}}]},
     r"row 1: caption is missing"),
    ({"annotations": [{"json": {"caption": "a"}, "sop_data": {"negative-prompt": ", "}}]},
     r"row 1: the negative caption is empty"),
    ({"annotations": [unseen.neg_row(0)], "paths": ["/etc/passwd"]}, r"row 1: .* is absolute"),
    ({"annotations": [unseen.neg_row(0)], "paths": ["/workspace/datasets/cc3m/../a.jpg"]},
     r"row 1: image_paths '../a.jpg' leaves the root"),
    ({"annotations": [unseen.neg_row(0)], "paths": ["gone.jpg"]}, r"row 1: no such picture: gone"),
    ({"annotations": [unseen.neg_row(0)], "paths": []}, r"image_paths and annotations, lists of"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "rule"), NEG)
def test_a_row_of_ccneg_that_is_none(fields, rule, tmp_path):
    unseen.neg(tmp_path / "source", **fields)
    with pytest.raises(DataError, match=rule):
        converted("ccneg", tmp_path)


@pytest.mark.parametrize(
    "content", [pickle.dumps(Runs(), 2), b"text", b"", b"PK\x03\x04", b"\x80\x02."]
)
def test_nothing_in_ccnegs_file_is_run(content, tmp_path, capsys):
    file = unseen.neg(tmp_path / "source") / "ccneg_preprocessed.pt"
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=r"preprocessed.pt: not lists, dicts and texts as torch.save"
    ):
        converted("ccneg", tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "split", "rule"),
    [
        ("urban1k", "val", "split must be test, got 'val'"),
        ("sugarcrepe", "train", "split must be test, got 'train'"),
        ("circo", "train", "split must be val or test, got 'train'"),
        ("ccneg", "val", "split must be train or test, got 'val'"),
        ("ccneg", "train", "holds no rows of split train"),
    ],
)
def test_a_split_that_a_set_has_not_is_refused(name, split, rule, tmp_path):
    with pytest.raises(DataError, match=rule):
        converted(name, tmp_path, split)


@pytest.mark.parametrize(
    ("name", "lost", "rule"),
    [
        ("flickr30k", "flickr30k-images", "no folder flickr30k-images or .*; --images names where"),
        ("sugarcrepe", "val2017", "no folder val2017 or .*; --images names where"),
        ("sugarcrepe", "data/swap_obj.json", "swap_obj.json: no such file; SugarCrepe has add_obj"),
        ("circo", "annotations/val.json", "val.json: no such file; CIRCO's README says"),
        ("circo", "COCO2017_unlabeled/unlabeled2017", "no folder COCO2017_unlabeled/unlabeled2017"),
        ("ccneg", "ccneg_preprocessed.pt", "ccneg_preprocessed.pt: no such file"),
    ],
)
def test_what_is_missing_is_named(name, lost, rule, tmp_path):
    source = tmp_path / "source"
    unseen.MADE[name][0](source)
    (source / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rule):
        converted(name, tmp_path)
    if "--images" in rule:
        converted(name, tmp_path, images=tmp_path / "elsewhere")


def test_flickrs_captions_without_a_split_are_refused(tmp_path):
    root = unseen.flickr(tmp_path / "source")
    (root / "dataset_flickr30k.json").unlink()
    (root / "results.csv").write_text("image_name| comment_number| comment\n1000.jpg| 0| A dog .\n")
    with pytest.raises(
        DataError, match=r"no dataset_flickr30k.json .*; results.csv names no split"
    ):
        converted("flickr30k", tmp_path)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[1]", r"a.json:1: \[0\]: not a JSON object"),
        ("[{}\n,]", "a.json:2: not JSON"),
        ("[{}] {}", "a.json:1: not JSON: more after the last ]"),
        ("[{},\n{}", "a.json:2: not JSON: no , or ]"),
        ("{1: {}}", 'a.json:1: not JSON: no "name":'),
        ("7", "a.json:1: neither a list nor an object"),
        ("", "a.json:1: neither a list nor an object"),
        ("[]", "a.json: holds no rows"),
        ('[{"a": NaN}]', r"a.json:1: \[0\]: NaN is not JSON"),
        ("[" * 100_000, "a.json:1: nested too deeply"),
    ],
)
def test_a_whole_file_that_is_no_json(text, rule, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rule):
        list(objects(tmp_path / "a.json", strict.Faults()))


# -- the paper's table -----------------------------------------------------------------------------


def test_the_papers_means_are_those_of_its_cells_to_its_digits():
    """It rounds from digits that it does not print."""
    for _, cells, means in sets.BENCHMARKS.values():
        for model, mean in means.items():
            assert abs(fmean(cells[model]) - mean) < 0.15, model


def figures_file(directory, found, **more):
    whole = {"split": "test", "pools": "local", "by_content": False, "mrbench": False, **more}
    whole["sets"] = found
    directory.mkdir()
    (directory / "figures.json").write_text(json.dumps(whole))
    return directory


def test_the_papers_table_has_our_cells_only_where_something_was_measured(tmp_path):
    mbeir = figures_file(tmp_path / "mbeir", {"cirr_task7": {"hit_at_5": 0.25}})
    rebuilt = figures_file(tmp_path / "mrb", {"cirr_task7": {"hit_at_5": 0.5}}, mrbench=True)
    crepe = {"sugarcrepe_swap_att_task3": {"hit_at_1_among_its_own": 0.625, "hit_at_1": 0.1}}
    other = figures_file(tmp_path / "crepe", crepe)
    val = figures_file(tmp_path / "val", {"circo_task7": {"map_at_25": 0.125}}, split="val")
    words = [word for path in (mbeir, rebuilt, other, val) for word in ("--figures", path)]
    rows = json.loads(run("evaluate", "--paper", *words, "--json").stdout)
    assert [(r["benchmark"], r["set"], r["figure"], r["ours"]) for r in rows if r["ours"]] == [
        ("M-BEIR", "CIRR", "R@5", {str(mbeir): 25.0}),
        ("MRBench", "CIRR it→i", "R@5", {str(rebuilt): 50.0}),
        ("Unseen", "CIRCO it→i", "mAP@25", {str(val): 12.5}),
        ("Unseen", "SugarCrepe swap att", "accuracy", {str(other): 62.5}),
    ]
    assert [sum(r["benchmark"] == b for r in rows) for b in ("M-BEIR", "MRBench")] == [17, 5]
    means = {r["benchmark"]: r["paper"] for r in rows if r["set"] == "average"}
    assert (means["M-BEIR"]["ELVA-7B"], means["MRBench"]["ELVA-7B"]) == (58.7, 43.2)
    assert [r["paper"] for r in rows if r["benchmark"] == "Unseen"] == [{}] * 20
    cirr = next(r["paper"] for r in rows if r["set"] == "CIRR it→i")
    assert cirr == {"Qwen2-VL-7B": 10.8, "LamRA-Ret-7B": 25.7, "ELVA-7B": 32.5}
    whole = {stem: {"hit_at_5": 0.5} for stem in sets.MRBENCH}
    whole["cirr_task7"]["hit_at_5"] = 0.3
    every = figures_file(tmp_path / "every", whole, mrbench=True)
    rows = json.loads(run("evaluate", "--paper", "--figures", every, "--json").stdout)
    assert [r["ours"] for r in rows if r["set"] == "average"] == [{}, {str(every): 45.0}]
    said = " ".join(run("evaluate", "--paper").stdout.split())
    assert "MRBench is rebuilt: the paper's own list of queries is not public." in said
    assert "unseen sets are not known to us: their cells are empty" in said
    empty = json.loads(run("evaluate", "--paper", "--json").stdout)
    assert [row["ours"] for row in empty] == [{}] * 42


def test_mrbenchs_figures_stand_beside_mrbenchs(tmp_path):
    row = {"task": "it2i", "queries": 2, "pool": 9, "k": 5, "hit_at_5": 0.5, "recall_at_5": 0.5,
           "mrr": 0.5, "ndcg_at_10": 0.5}  # fmt: skip
    result = {"split": "test", "pools": "local", "sets": {"cirr_task7": row}, "average": 0.5}
    for mrbench, heads, cells in (
        (True, ["ELVA-7B"], [["32.5", ""]]),
        (False, ["ELVA-2B", "ELVA-7B"], [["50.0", ""], ["55.4", ""]]),
    ):
        (table,) = protocol.tables({**result, "mrbench": mrbench})
        found = [c for c in table.columns if str(c.header).startswith("ELVA")]
        assert ([c.header for c in found], [[*c.cells] for c in found]) == (heads, cells)


ONE = {"cirr_task7": {"hit_at_5": 0.5}}


@pytest.mark.parametrize(
    ("found", "more", "rule"),
    [
        (
            ONE,
            {"pools": "global"},
            "pools must be 'local' to stand beside the paper's figures, got",
        ),
        (ONE, {"by_content": True}, "by_content must be False to stand beside the paper's figures"),
        (ONE, {"split": "train"}, "figures.json: must be of split test, got 'train'"),
        ({"emoji_task0": {}}, {}, "must have a set that the paper reports, got emoji_task0"),
        ({"cirr_task7": {"hit_at_5": 50}}, {}, "cirr_task7: hit_at_5 must be from 0 to 1, got 50"),
        ({"cirr_task7": 1}, {}, "sets must be an object of sets, as elva evaluate writes it"),
    ],
)
def test_figures_that_cannot_stand_beside_the_papers(found, more, rule, tmp_path):
    figures_file(tmp_path / "other", found, **more)
    done = run("evaluate", "--paper", "--figures", tmp_path / "other")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1) and rule in done.stderr


def test_the_papers_table_takes_no_option_that_would_do_nothing(tmp_path):
    for words, rule in (
        (["--paper", "--figures", tmp_path], "figures.json: No such file or directory"),
        (["--paper", "--split", "val"], "--split must not come with --paper"),
        (["--run", "a", "--qrels", "b", "--figures", "c"], "--figures must not come with --run"),
    ):
        done = run("evaluate", *words)
        assert done.exit_code == 2 and rule in done.stderr
