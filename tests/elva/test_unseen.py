"""The sets that the paper evaluates on and no stage trains on: rows as they are published, and rows
that are none."""

import json

import pytest

from elva.commands import evaluate as command
from elva.commands.survey import random_embeddings
from elva.data import strict
from elva.data.formats import UNSEEN, convert_file
from elva.data.formats.whole import objects
from elva.errors import DataError
from elva.evaluation import protocol, sets
from elva.report import pictures
from tests.elva import unseen
from tests.elva.unseen import converted, read, run


def shown(item):
    """What an item says, or of a picture how red it is."""
    return item.text or item.load_image().getpixel((0, 0))[0]


def told(one):
    """Each query with its answers."""
    return [
        (shown(query), [shown(one.pool[one.pool.row(did)]) for did in query.positives])
        for query in one.queries
    ]


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
        ("ccneg", "ccneg.json", "ccneg.json: No such file"),
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


def test_a_whole_file_is_read_with_spaces_and_without(tmp_path):
    path, rows = tmp_path / "a.json", [{"x": 1}, {"x": [2, {"y": "}]"}]}]
    lists, named = {"0": rows[0], "1": rows[1]}, {"a": rows[0]}
    for separators in ((",", ":"), (", ", ": "), (" ,\n", " :\t")):
        for key, whole, expected in (
            (None, rows, lists), (None, named, named), ("of", {"more": 7, "of": rows}, lists),
            ("of", {"of": named, "more": rows}, named),
        ):  # fmt: skip
            path.write_text(json.dumps(whole, separators=separators))
            found = {name: one.fields for name, one in objects(path, strict.Faults(), key)}
            assert found == expected
