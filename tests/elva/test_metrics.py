"""Figures against an independent computation, and TREC's files there and back."""

import random

import pytest
import pytrec_eval
from typer.testing import CliRunner

from elva.cli import app
from elva.data.strict import Faults
from elva.errors import DataError
from elva.evaluation.metrics import measure
from elva.evaluation.trec import read_qrels, read_run, write_qrels, write_run

CUTOFFS = (1, 5, 10, 20)


def drawn(seed, queries=60, pool=80, ties=False):
    draw = random.Random(seed)
    run, qrels = {}, {}
    for q in range(queries):
        dids = draw.sample(range(pool), 40)
        scores = [draw.randrange(6) / 8 if ties else draw.random() for _ in dids]
        run[f"q{q}"] = [(f"d{d}", s) for d, s in zip(dids, scores, strict=True)]
        qrels[f"q{q}"] = {f"d{d}": draw.randrange(3) for d in draw.sample(range(pool), 6)}
    return run, qrels


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_trec_evals(seed):
    run, qrels = drawn(seed)
    names = {f"ndcg_cut_{k}": f"ndcg_at_{k}" for k in CUTOFFS}
    names |= {f"recall_{k}": f"recall_at_{k}" for k in CUTOFFS}
    names |= {f"success_{k}": f"hit_at_{k}" for k in CUTOFFS} | {"recip_rank": "mrr"}
    kinds = {"ndcg_cut.1,5,10,20", "recall.1,5,10,20", "success.1,5,10,20", "recip_rank"}
    expected = pytrec_eval.RelevanceEvaluator(qrels, kinds).evaluate(
        {q: dict(answers) for q, answers in run.items()}
    )
    found = measure(run, qrels, CUTOFFS)
    for qid, values in expected.items():
        if qid not in found.per_query:  # nothing is right: trec_eval counts 0, we leave it out
            assert not any(qrels[qid].values())
            continue
        for theirs, ours in names.items():
            assert found.per_query[qid][ours] == pytest.approx(values[theirs], abs=1e-12), ours
    assert len(found.per_query) == sum(any(j.values()) for j in qrels.values())
    for name in names.values():
        values = [v[name] for v in found.per_query.values()]
        assert found.mean[name] == pytest.approx(sum(values) / len(values))
    assert not found.ties() and found.mean == pytest.approx(found.optimistic)


def test_a_tie_counts_against_the_model_and_is_told():
    run = {"q": [("right", 0.5), ("a", 0.5), ("b", 0.5), ("c", 0.4)]}
    found = measure(run, {"q": {"right": 1}}, (1, 3))
    assert (found.mean["hit_at_1"], found.mean["hit_at_3"], found.mean["mrr"]) == (0, 1, 1 / 3)
    assert found.optimistic["hit_at_1"] == 1
    assert any(line.startswith("hit_at_1: 0.00") and "100.00" in line for line in found.ties())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_answers_come_changes_nothing(seed):
    run, qrels = drawn(seed, ties=True)
    shuffled = {q: random.Random(seed).sample(a, len(a)) for q, a in run.items()}
    assert measure(run, qrels) == measure(shuffled, qrels)
    assert measure(run, qrels).ties()


def test_missing_and_foreign_queries_are_counted():
    found = measure({"x": [("d", 1.0)]}, {"q": {"d": 1}, "r": {"d": 0}})
    assert found.unanswered == ["q"] and found.unjudged == ["x"]
    assert set(found.mean.values()) == {0.0} and list(found.per_query) == ["q"]


def test_files_come_back_as_they_were(tmp_path):
    run, qrels = drawn(0, ties=True)
    write_run(tmp_path / "run", run.items(), "tag")
    write_qrels(tmp_path / "qrels", qrels)
    assert read_run(tmp_path / "run").keys() == run.keys()
    for qid, answers in read_run(tmp_path / "run").items():
        assert dict(answers) == pytest.approx(dict(run[qid]), rel=1e-8)
    assert read_qrels(tmp_path / "qrels") == qrels
    five = "".join(f"{line} 7\n" for line in (tmp_path / "qrels").read_text().splitlines())
    (tmp_path / "five").write_text(five)
    assert read_qrels(tmp_path / "five") == qrels


@pytest.mark.parametrize(
    ("reader", "line", "rule"),
    [
        (read_run, "q Q0 d 1 0.5", "5 columns, not qid Q0 did rank score tag"),
        (read_run, "q Q0 d 1 high tag", "score 'high' is no number"),
        (read_run, "q Q0 d 1 nan tag", "score is NaN"),
        (read_run, "q Q0 a 1 0.5 tag", "candidate a again for query q"),
        (
            read_qrels,
            "q 0 d",
            r"3 columns, not qid 0 did relevance \[task\], nor BEIR's",
        ),
        (read_qrels, "q Q0 d 1 0.5 tag", "6 columns, not qid 0 did relevance"),
        (read_qrels, "q 0 d 1.5", "relevance '1.5' is no whole number"),
        (read_qrels, "q 0 a 0", "candidate a was judged otherwise before"),
    ],
)
def test_a_bad_line_is_named_and_may_be_left_out(tmp_path, reader, line, rule):
    path = tmp_path / "file"
    good = "q Q0 a 1 0.9 tag" if reader is read_run else "q 0 a 1"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=f"^{path}:2: {rule}"):
        reader(path)
    faults = Faults(1)
    assert list(reader(path, faults)) == ["q"] and len(faults.found) == 1
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="holds no"):
        reader(tmp_path / "empty")


def test_uniirs_runs_have_a_task_and_files_end_as_they_like(tmp_path):
    path = tmp_path / "run"
    path.write_bytes(b"\xef\xbb\xbfq Q0  d 1 0.5 tag 3\r\nq\tQ0\te\t2\t0.25 tag 3 more\n\n \n")
    assert read_run(path) == {"q": [("d", 0.5), ("e", 0.25)]}
    path.write_text("q 0 d 1 3\n\n")
    assert read_qrels(path) == {"q": {"d": 1}}


def test_beirs_qrels_read_under_their_header(tmp_path):
    path = tmp_path / "qrels"
    path.write_text("query-id\tcorpus-id\tscore\nq\td\t2\nq\te\t0\n")
    assert read_qrels(path) == {"q": {"d": 2, "e": 0}}
    path.write_text("query-id\tcorpus-id\tscore\nq 0 d 2\n")
    with pytest.raises(DataError, match="qrels:2: 4 columns, not "):
        read_qrels(path)


@pytest.mark.parametrize("space", ["\u00a0", "\u2028", "\u3000", "\x85", "\x1c"])
def test_only_space_and_tab_separate_ids(space, tmp_path):
    id = f"a{space}b{space}"
    (tmp_path / "run").write_text(f"{id} Q0 {id} 1 0.5 tag\n", encoding="utf-8")
    (tmp_path / "qrels").write_text(f"{id} 0 {id} 1\n", encoding="utf-8")
    run, qrels = read_run(tmp_path / "run"), read_qrels(tmp_path / "qrels")
    assert run == {id: [(id, 0.5)]} and qrels == {id: {id: 1}}
    assert measure(run, qrels).mean["hit_at_1"] == 1


def test_qrels_that_judge_nothing_right_are_an_error(tmp_path):
    (tmp_path / "run").write_text("q Q0 d 1 0.5 tag\n")
    (tmp_path / "qrels").write_text("q 0 d 0\nr 0 d -1\n")
    words = ["evaluate", "--run", str(tmp_path / "run"), "--qrels", str(tmp_path / "qrels")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and not result.stdout
    assert "judges no candidate right" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
