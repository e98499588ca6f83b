"""The sets that the paper evaluates on and no stage trains on: their figures by hand, and the
paper's table."""

import json
from statistics import fmean

import numpy as np
import pytest
import torch

from elva.commands import evaluate as command
from elva.commands.embed import embed as embed_data
from elva.data.formats import UNSEEN
from elva.errors import DataError
from elva.evaluation import protocol, sets
from elva.evaluation.metrics import measure
from elva.evaluation.submission import submission
from elva.model.encoder import open_encoder
from elva.mrbench.build import NOTES
from tests.elva import sentence_models, unseen
from tests.elva.test_evaluation import embed
from tests.elva.unseen import converted, read, run

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
