"""M-BEIR's protocol on embeddings made by hand, and a trained stage on the tasks its data have."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from elva.cli import app
from elva.commands import evaluate as command
from elva.commands.mine import Mining, mine
from elva.data import Pool, load
from elva.data.mbeir import read_sets, write_queries
from elva.data.schema import TASKS, modalities
from elva.data.strict import dump, records, write_lines
from elva.errors import DataError, UserError
from elva.evaluation import protocol
from elva.evaluation.sets import SUBTASKS
from elva.evaluation.trained import evaluate_stage, evaluation_tasks
from elva.index import segment
from elva.index.embeddings import Embeddings
from elva.model.identity import Identity
from elva.progress import Silent
from elva.recipe import Recipe, StageConfig
from elva.report.figures import rows_of
from elva.report.table import as_json, figure_cells
from elva.run import Run, evaluate_split

MODEL = Identity("by hand", "1", "1")


# -- M-BEIR's protocol on embeddings made by hand --------------------------------------------------

DATASETS = {"visualnews": 0, "fashion200k": 1, "webqa": 2, "edis": 3, "nights": 4, "oven": 5,
            "infoseek": 6, "fashioniq": 7, "cirr": 8, "mscoco": 9}  # fmt: skip
NAMES = {number: task for task, number in TASKS.items()}


def put(root: Path, stem: str, queries: dict[str, list[str]], pool: dict[str, str]) -> None:
    """A set in M-BEIR's layout: query -> its right answers, candidate -> its words."""
    dataset, _, number = stem.partition("_task")
    asked, shown = modalities(NAMES[int(number)])
    prompts = root / "instructions" / "query_instructions.tsv"
    known = prompts.read_text().splitlines() if prompts.exists() else ["a\tb\tc\td\te"]
    line = f"{asked}\t{shown}\t{dataset}\t{DATASETS[dataset]}\tFind it."
    write_lines(prompts, dict.fromkeys([*known, line]))

    def row(kinds: str, names: tuple[str, str, str], words: str) -> dict[str, object]:
        image = f"mbeir_images/{words}.png" if "image" in kinds else None
        values = (words if "text" in kinds else None, image, kinds)
        return dict(zip(names, values, strict=True))

    suffix = "_test" if dataset == "mscoco" else ""
    candidates = [
        dump({"did": did} | row(shown, ("txt", "img_path", "modality"), words))
        for did, words in pool.items()
    ]
    write_lines(root / "cand_pool" / "local" / f"mbeir_{stem}{suffix}_cand_pool.jsonl", candidates)
    keys = ("query_txt", "query_img_path", "query_modality")
    rows = [
        {"qid": qid, "pos_cand_list": dids, "neg_cand_list": [], "task_id": int(number)}
        | row(asked, keys, f"q {qid}")
        for qid, dids in queries.items()
    ]
    write_queries(root, stem, "test", rows)


def unit(rows):
    return rows.double().numpy() / rows.double().norm(dim=1, keepdim=True).numpy()


def embed(directory: Path, ids: list[str], rows: torch.Tensor, side: str) -> None:
    found = Embeddings(directory, len(ids), len(ids), MODEL, {"side": side})
    found.save()
    (directory / "shards").mkdir()
    table = pa.table({"id": ids})
    segment.write(found.shards[0], [rows], table, dim=rows.shape[1], dtype="float32", model=MODEL)


@pytest.mark.parametrize("pools", ["local", "global"])
def test_all_sixteen_sets(pools, tmp_path):
    generator = torch.Generator().manual_seed(9)
    drawn, union = {}, {}
    for at, stem in enumerate(SUBTASKS):
        number = DATASETS[stem.partition("_task")[0]]
        dids = [f"{number}:{1000 * at + i}" for i in range(60)]
        queries = {f"{number}:{1000 * at + i}": dids[2 * i : 2 * i + 1 + i % 2] for i in range(6)}
        put(tmp_path, stem, queries, {did: f"item {did}" for did in dids})
        query, pool = (torch.randn(n, 8, generator=generator) for n in (6, 60))
        pool[:12:2] += 0.7 * query
        drawn[stem] = (queries, query, dids, pool)
        union |= dict(zip(dids, pool, strict=True))
    sets = read_sets(tmp_path, pools=pools)
    assert {one.stem for one in sets} == set(SUBTASKS)
    for one in sets:
        queries, query, dids, pool = drawn[one.stem]
        embed(tmp_path / "e" / f"mbeir_{one.stem}_test", list(queries), query, "queries")
        if pools == "local":
            embed(tmp_path / "e" / one.pool_name, dids, pool, "pool")
    if pools == "global":
        rows = torch.stack([union[did] for did in sets[0].pool.ids])
        embed(tmp_path / "e" / sets[0].pool_name, sets[0].pool.ids, rows, "pool")
        assert len(rows) == 16 * 60
    result = command.evaluate_embeddings(tmp_path / "e", tmp_path, tmp_path / "out", pools=pools)
    hits = {}
    for stem, (queries, query, dids, pool) in drawn.items():
        shown = pool if pools == "local" else torch.stack(list(union.values()))
        names = dids if pools == "local" else list(union)
        scores = unit(query) @ unit(shown).T
        k = 10 if stem.startswith("fashion") else 5
        top = np.argsort(-scores, axis=1)[:, :k]
        found = zip(top, queries.values(), strict=True)
        hits[stem] = np.mean([bool({names[j] for j in row} & set(right)) for row, right in found])
        row = result["sets"][stem]
        assert (row["k"], row[f"hit_at_{k}"]) == (k, pytest.approx(hits[stem]))
        assert row["no_answer_inside"] == 0
    assert result["average"] == pytest.approx(np.mean(list(hits.values())))
    assert 0.1 < result["average"] < 1
    (drawn_table,) = protocol.tables(result)
    assert len(drawn_table.rows) == 17
    assert ("ELVA-2B" in [c.header for c in drawn_table.columns]) == (pools == "local")


@pytest.fixture
def collapsed(tmp_path):
    """InfoSeek's query of 128 right answers, first in a pool of 10,128, whose scores are equal."""
    dids = [f"6:{i}" for i in range(10_128)]
    put(tmp_path, "infoseek_task6", {"6:1": dids[:128]}, {did: did for did in dids})
    embed(tmp_path / "e" / "mbeir_infoseek_task6_test", ["6:1"], torch.ones(1, 4), "queries")
    rows = torch.ones(len(dids), 4)
    embed(tmp_path / "e" / "mbeir_infoseek_task6_cand_pool", dids, rows, "pool")
    return tmp_path


def test_a_collapsed_model_earns_nothing_at_any_cut_off(collapsed):
    """With 150 answers kept a query, 22 of them wrong, its hit@50 was 1."""
    result = command.evaluate_embeddings(collapsed / "e", collapsed, collapsed / "out")
    row = result["sets"]["infoseek_task6"]
    assert {row[f"{name}_at_{k}"] for name in ("hit", "recall", "ndcg") for k in (1, 5, 50)} == {0}
    assert len((collapsed / "out" / "infoseek_task6.run.trec").read_text().splitlines()) == 178
    assert any("hit_at_50: 0.00" in line for line in result["ties"])


def by_angle(*degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1).float()


def test_a_copy_is_right_only_where_content_decides(tmp_path):
    """The copy of q1's answer comes first, the answer eighth."""
    words = {"2:1": "a cat", "2:2": "A CAT."} | {f"2:{i}": f"thing {i}" for i in range(3, 12)}
    put(tmp_path, "webqa_task1", {"2:1": ["2:1"], "2:2": ["2:5"]}, words)
    embed(tmp_path / "e" / "mbeir_webqa_task1_test", ["2:1", "2:2"], by_angle(0, 33), "queries")
    pool = by_angle(80, 1, 10, 20, 30, 40, 50, 60, 84, 86, 88)
    embed(tmp_path / "e" / "mbeir_webqa_task1_cand_pool", list(words), pool, "pool")
    figures = {}
    for name, flag in (("protocol", []), ("content", ["--by-content"])):
        shown = CliRunner().invoke(app, [
            "evaluate", "--embeddings", str(tmp_path / "e"), "--data", str(tmp_path), "--json",
            "--output", str(tmp_path / name), *flag,
        ])  # fmt: skip
        assert shown.exit_code == 0, shown.output
        figures[name] = json.loads(shown.stdout)["sets"]["webqa_task1"]
    assert (figures["protocol"]["hit_at_1"], figures["content"]["hit_at_1"]) == (0.5, 1)
    assert (figures["protocol"]["mrr"], figures["content"]["mrr"]) == ((1 / 8 + 1) / 2, 1)
    assert figures["content"]["recall_at_5"] == 0.75  # one of its two, and the other query's
    assert (tmp_path / "protocol" / "webqa_task1.qrels.txt").read_text().count("\n") == 2
    assert (tmp_path / "content" / "webqa_task1.qrels.txt").read_text().count("\n") == 3


@pytest.fixture
def sisters(tmp_path):
    """InfoSeek as text to text: of three queries one has its only answer in OVEN."""
    root = tmp_path / "data"
    queries = {"6:1": ["6:1", "5:7", "5:8"], "6:2": ["6:2"], "6:3": ["5:9"]}
    put(root, "infoseek_task1", queries, {f"6:{i}": f"text {i}" for i in range(1, 8)})
    return root


def test_answers_outside_the_pool_are_judged_and_cannot_be_found(sisters, tmp_path):
    """The query without one inside is a miss, and it is named."""
    out, dids = tmp_path / "out", [f"6:{i}" for i in range(1, 8)]
    embed(tmp_path / "e" / "mbeir_infoseek_task1_test", dids[:3], by_angle(0, 10, 20), "queries")
    pool = by_angle(0, 10, 20, 30, 40, 50, 60)
    embed(tmp_path / "e" / "mbeir_infoseek_task1_cand_pool", dids, pool, "pool")
    result = command.evaluate_embeddings(tmp_path / "e", sisters, out, by_content=True)
    row = result["sets"]["infoseek_task1"]
    assert (row["queries"], row["no_answer_inside"]) == (3, 1)
    assert (row["hit_at_1"], row["mrr"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert row["recall_at_5"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    (line,) = result["no_answer_inside"]
    assert line.startswith("infoseek_task1: 1 of 3 queries have no right answer in mbeir_infoseek")
    assert "6:3 first" in line
    again = command.evaluate_files(
        out / "infoseek_task1.run.trec", out / "infoseek_task1.qrels.txt"
    )
    assert all(again[name] == row[name] for name in again if name in row)


def test_a_file_of_several_tasks_is_mined(sisters, tmp_path):
    """As M-BEIR's training files are: no task in the name, answers in two pools."""
    (sisters / "qrels" / "test" / "mbeir_infoseek_task1_test_qrels.txt").unlink()
    (sisters / "query" / "train").mkdir()
    (sisters / "query" / "test" / "mbeir_infoseek_task1_test.jsonl").rename(
        sisters / "query" / "train" / "mbeir_infoseek_train.jsonl"
    )
    dids = [f"6:{i}" for i in range(1, 8)]
    embed(tmp_path / "e" / "mbeir_infoseek_task1_train", dids[:3], by_angle(0, 10, 20), "queries")
    pool = by_angle(0, 10, 20, 30, 40, 50, 60)
    embed(tmp_path / "e" / "mbeir_infoseek_task1_cand_pool", dids, pool, "pool")
    settings = Mining(num_negatives=2, num_random=2)
    counts = mine(tmp_path / "e", sisters, tmp_path / "mined", settings)
    assert (counts["infoseek_task1"].hard, counts["infoseek_task1"].random) == (6, 6)
    found = {q.id: q for q in load(tmp_path / "mined", split="train").queries}
    assert found["6:1"].outside == ("5:7", "5:8") and found["6:3"].positives == ()
    # at 20 degrees the third query's own place is a negative of 0.99 and less: 1 is too similar
    hard = {qid: q.negatives[:2] for qid, q in found.items()}
    assert hard == {"6:1": ("6:2", "6:3"), "6:2": ("6:1", "6:3"), "6:3": ("6:2", "6:4")}
    assert all(not set(q.positives) & set(q.negatives) for q in found.values())
    assert all(len(set(q.negatives)) == 4 for q in found.values())


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["RUN", "--pools", "global"], "--pools must not come with RUN"),
        (["--run", "a", "--qrels", "b", "--by-content"], "--by-content must not come with --run"),
        (["--embeddings", "a", "--data", "b", "--stage", "1"], "--stage must not come with --embe"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(words, rule):
    shown = CliRunner().invoke(app, ["evaluate", *words])
    assert shown.exit_code == 2 and rule in shown.stderr


# -- a trained stage on data of other tasks --------------------------------------------------------


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def finish(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Texts that ask for texts: 12 queries of two right answers, 40 candidates, no pictures."""
    root = tmp_path_factory.mktemp("words")
    pool = {f"2:{i}": f"text number {i}" for i in range(40)}
    put(root, "webqa_task1", {f"2:{i}": [f"2:{i}", f"2:{i + 20}"] for i in range(12)}, pool)
    return root


def trained(finished, data, directory, **fields):
    """A run of one stage on some data, with a model that the session has trained."""
    recipe = Recipe("mine", stages={"1": StageConfig(data=str(data), steps=4)}, **fields)
    run = Run.create(directory / "run", recipe)
    run.write("1", "stage.json", {"steps": 4, "seconds": 1.0})
    os.symlink(finished / "stage-2" / "model", run.model("1"))
    return run


def test_a_stage_is_evaluated_on_the_tasks_that_its_data_have(finished, words, tmp_path):
    run, told = trained(finished, words, tmp_path), Lines()
    assert evaluate_split(words) == "test" and evaluation_tasks(words, "test") == ["t2t"]
    result = evaluate_stage(run, "1", told)
    figures = result["figures"]
    assert (figures["t2t_queries"], figures["t2t_pool"]) == (12, 40)
    found = [sample["rank"] for sample in result["samples"]["t2t"]]
    assert figures["t2t_recall_at_5"] == pytest.approx(np.mean([rank <= 5 for rank in found]))
    assert figures["t2t_chance_at_1"] == pytest.approx(2 / 40)
    assert -1 < figures["t2t_reward"] < 1 and figures["t2t_no_answer_inside"] == 0
    assert not any(name.startswith(("t2i", "i2t", "minimal")) for name in figures)
    (line,) = told.lines
    assert line.startswith("stage 1: t→t R@1 ")
    cells = figure_cells(rows_of(run))
    assert cells.head[1:3] == ["t→t R@1", "t→t R@5"]
    assert cells.rows[-1][:3] == ["chance", "0.050", "0.237"]  # 1 - 35 * 34 / (40 * 39)
    assert as_json(run)["chance"]["t2t_recall_at_1"] == pytest.approx(2 / 40)
    page = CliRunner().invoke(app, ["report", str(run.directory)])
    assert page.exit_code == 0, page.output
    html = (run.directory / "report.html").read_text("utf-8")
    assert "to find texts by texts" in html and "12 queries t→t against 40 candidates" in html


def test_a_limit_is_spread_over_all_of_the_data(finished, words, tmp_path, monkeypatch):
    run = trained(finished, words, tmp_path, evaluate_limit=5)
    opened: set[int] = set()
    item = Pool.__getitem__
    monkeypatch.setattr(
        Pool, "__getitem__", lambda self, row: (opened.add(row), item(self, row))[1]
    )
    result = evaluate_stage(run, "1", Lines())
    asked = {0, 2, 4, 7, 9}  # of twelve, evenly
    right = asked | {row + 20 for row in asked}
    others = sorted({*range(40)} - right)
    assert opened == right | {*others[::6]}
    assert (result["figures"]["t2t_queries"], result["figures"]["t2t_pool"]) == (5, 15)


def test_a_query_without_an_answer_in_its_pool_is_a_miss(finished, sisters, tmp_path):
    """And in no mean of rewards, of which it has none."""
    run, told = trained(finished, sisters, tmp_path), Lines()
    result = evaluate_stage(run, "1", told)
    figures, samples = result["figures"], result["samples"]["t2t"]
    assert (figures["t2t_queries"], figures["t2t_no_answer_inside"]) == (3, 1)
    assert samples[2]["rank"] == 8 and len(samples[2]["top"]) == 5
    assert figures["t2t_recall_at_5"] <= 2 / 3 and figures["t2t_reward"] != 0
    assert figures["t2t_chance_at_1"] == pytest.approx(2 / 3 / 7)
    assert "queries without an answer in their pool: 1" in told.lines[-1]


def test_a_stage_has_no_figure_of_answers_that_are_not_published(finished, words, tmp_path):
    hidden = tmp_path / "hidden"
    shutil.copytree(words, hidden, ignore=shutil.ignore_patterns("qrels"))
    (file,) = hidden.glob("query/test/*.jsonl")
    rows = [{**row.fields, "pos_cand_list": None} for row in records(file)]
    write_lines(file, map(dump, rows))
    run = trained(finished, hidden, tmp_path)
    with pytest.raises(UserError, match="t2t of test must have right answers, got none"):
        evaluate_stage(run, "1", Silent())


def test_the_tasks_of_the_last_stage_are_preferred(corpus):
    stage = StageConfig(tasks={"it2i": 0.5, "t2i": 0.5})
    recipe = Recipe("mine", stages={"2": StageConfig(tasks={"t2t": 1.0}), "10": stage})
    assert evaluation_tasks(corpus, "test") == ["t2i", "t2t", "i2t", "it2i"]
    assert evaluation_tasks(corpus, "test", recipe) == ["t2i", "it2i"]
    other = Recipe("mine", stages={"1": StageConfig(tasks={"i2i": 1.0})})
    assert evaluation_tasks(corpus, "test", other) == ["t2i", "t2t", "i2t", "it2i"]


def test_data_without_a_test_split_is_a_line_and_val_is_the_second_choice(
    finished, words, tmp_path
):
    (tmp_path / "data").mkdir()
    for path in words.iterdir():
        if path.name not in ("query", "qrels"):
            os.symlink(path, tmp_path / "data" / path.name)
    run, told = trained(finished, tmp_path / "data", tmp_path), Lines()
    assert evaluate_stage(run, "1", told) is None
    assert told.lines == [
        f"stage 1: not evaluated, {tmp_path / 'data'} has no queries of test or val"
    ]
    assert not (run.stage("1") / "evaluation.json").exists()
    with pytest.raises(DataError, match="must hold queries of test or val to evaluate on, got no"):
        command.evaluate(run, Lines())
    source = words / "query" / "test" / "mbeir_webqa_task1_test.jsonl"
    val = tmp_path / "data" / "query" / "val" / "mbeir_webqa_task1_val.jsonl"
    val.parent.mkdir(parents=True)
    val.write_bytes(source.read_bytes())
    assert evaluate_stage(run, "1", told)["split"] == "val"
