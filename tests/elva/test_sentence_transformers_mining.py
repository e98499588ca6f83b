"""Hard negatives and figures in sentence-transformers: those that it finds itself."""

import csv
import random
from functools import cache
from pathlib import Path
from zlib import crc32

import pytest
import torch
from datasets import Dataset
from sentence_transformers import util
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from elva.integrations.sentence_transformers import RankingEvaluator, mine_hard_negatives


@cache
def drawn(text: str) -> torch.Tensor:
    return torch.randn(6, generator=torch.Generator().manual_seed(crc32(text.encode())))


class Card:
    """What a model remembers of an evaluation."""

    def set_evaluation_metrics(self, evaluator, metrics, epoch=0, step=0):
        self.kept = metrics, epoch, step


class Vectors:
    """A model that gives each text a vector of its own, of another length each."""

    device, similarity_fn_name = torch.device("cpu"), "cosine"
    similarity = staticmethod(util.cos_sim)
    similarity_pairwise = staticmethod(util.pairwise_cos_sim)

    def __init__(self, vectors=None):
        self.model_card_data, self.vectors = Card(), vectors or {}

    def encode_document(self, texts, normalize_embeddings=False, convert_to_numpy=False, **how):
        rows = torch.stack([
            self.vectors[text] if text in self.vectors else drawn(text) for text in texts
        ])  # fmt: skip
        rows = rows / rows.norm(dim=1, keepdim=True) if normalize_embeddings else 3 * rows
        return rows.numpy() if convert_to_numpy else rows

    encode_query = encode_document


@pytest.fixture(scope="module")
def pairs():
    """40 anchors, some with up to three positives, some pairs twice, 50 distinct positives."""
    dice = random.Random(0)
    rows = [(f"q{i}", f"d{dice.randrange(50)}") for i in range(40)]
    rows += [(f"q{dice.randrange(12)}", f"d{dice.randrange(50)}") for _ in range(18)] + rows[:3]
    return Dataset.from_dict({"asks": [a for a, _ in rows], "says": [b for _, b in rows]})


WINDOWS = [
    {},
    {"range_min": 4, "range_max": 20, "num_negatives": 5},
    {"max_score": 0.4, "min_score": -0.2},
    {"absolute_margin": 0.1, "num_negatives": 2},
    {"relative_margin": 0.3, "range_max": 90},  # of 80 texts
    {"relative_margin": 0.05, "max_score": 0.9, "range_min": 1, "sampling_strategy": "random"},
    {"sampling_strategy": "random", "range_max": 30},
]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("form", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_negatives_are_those_of_the_library(pairs, form, scored, capsys):
    corpus = [f"x{i}" for i in range(30)]
    for window in WINDOWS:
        how = {"output_format": form, "output_scores": scored, "corpus": corpus, **window}
        random.seed(7)
        theirs = util.mine_hard_negatives(pairs, Vectors(), verbose=False, **how)
        ours = mine_hard_negatives(pairs, Vectors(), seed=7, verbose=False, **how)
        assert ours.column_names == theirs.column_names and len(ours) == len(theirs) > 10
        for name in theirs.column_names:
            found, expected = ours[name], theirs[name]
            if name not in ("score", "scores"):
                assert list(found) == list(expected), (window, name)
                continue
            for one, other in zip(found, expected, strict=True):
                assert one == pytest.approx(other, abs=1e-6)
    capsys.readouterr()
    mine_hard_negatives(pairs, Vectors(), max_score=0.4, num_negatives=9)
    said = capsys.readouterr().out
    assert said.startswith("mined ") and "of 40 queries; max_score left out" in said


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"range_min": -1}, "range_min must be at least 0, got -1"),
        ({"range_min": 5, "range_max": 5}, "range_max must be above range_min, 5, got 5"),
        ({"range_max": 2}, "num_negatives must be at most the 2 ranks from range_min to range_max"),
        ({"output_format": "pairs"}, "output_format must be one of triplet, n-tuple, labeled-pair"),
        ({"sampling_strategy": "best"}, "sampling_strategy must be top or random, got best"),
        ({"corpus": "one text"}, "corpus must be a list of texts, got 'one text'; pass several"),
        ({"anchor_column_name": "query"}, "must be a column, got 'query'; there are asks, says"),
    ],
)
def test_what_cannot_be_mined_is_said_before_it_begins(pairs, wrong, rule):
    with pytest.raises(ValueError, match="^mine_hard_negatives: .*" + rule):
        mine_hard_negatives(pairs, None if "column" in next(iter(wrong)) else Vectors(), **wrong)


def test_only_the_cosine_is_mined_by(pairs):
    model = Vectors()
    model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="model must be one that is ranked by the cosine"):
        mine_hard_negatives(pairs, model)
    with pytest.raises(ValueError, match="got 0 rows of 2 columns; add them"):
        mine_hard_negatives(pairs.select([]), Vectors())


def judged():
    dice = random.Random(3)
    queries = {f"q{i}": f"query {i}" for i in range(30)}
    corpus = {f"d{i}": f"document {i}" for i in range(60)}
    right = {q: {f"d{dice.randrange(60)}" for _ in range(1 + i % 3)}
             for i, q in enumerate(queries)}  # fmt: skip
    right["q4"] = {"d1", "elsewhere"}  # one that the corpus lacks
    del right["q29"]
    return queries, corpus, right


def test_figures_are_those_of_the_library(tmp_path: Path):
    queries, corpus, right = judged()
    model, cutoffs = Vectors(), [1, 3, 10, 20]
    theirs = InformationRetrievalEvaluator(
        queries, corpus, right, mrr_at_k=[10], ndcg_at_k=cutoffs, accuracy_at_k=cutoffs,
        precision_recall_at_k=cutoffs, score_functions={"cosine": util.cos_sim},
    )(model)  # fmt: skip
    evaluator = RankingEvaluator(queries, corpus, right, cutoffs=cutoffs, name="dev")
    ours = evaluator(model, str(tmp_path), 1, 20)
    for name, value in ours.items():
        if "@" in name:
            assert value == pytest.approx(theirs[f"cosine_{name.removeprefix('dev_')}"]), name
    assert evaluator.primary_metric == "dev_ndcg@20" and model.model_card_data.kept[0] == ours
    evaluator(model, str(tmp_path), 2, 40)
    with (tmp_path / "RankingEvaluator_dev_results.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["steps"], second["epoch"]) == ("20", "2")
    assert float(second["ndcg@20"]) == ours["dev_ndcg@20"] and 0 < ours["dev_mrr"] < 1


def test_a_collapsed_model_earns_nothing():
    """Every tie is lost: all ranks are the last, though any order could be called right."""
    queries, corpus, right = judged()
    same = torch.ones(6)
    model = Vectors(dict.fromkeys([*queries.values(), *corpus.values()], same))
    found = RankingEvaluator(queries, corpus, right)(model)
    assert found["recall@10"] == found["ndcg@10"] == found["mrr@10"] == 0
    # q4's two, of which one is elsewhere, leave it one; the others have one to three of 60.
    owned = [len(right[q] & set(corpus)) for q in queries if q in right]
    expected = sum(61 - n for n in owned) / len(owned)
    assert found["rank"] == pytest.approx(expected)
    best = {f"query {i}": torch.eye(30, 30)[i] for i in range(30)}
    best |= {f"document {i}": torch.eye(30, 30)[i % 30] * (i < 30) for i in range(60)}
    alone = {f"q{i}": {f"d{i}"} for i in range(30)}
    found = RankingEvaluator(queries, corpus, alone)(Vectors(best))
    assert found["rank"] == found["mrr"] == found["ndcg@10"] == 1
    # sec. 3.4 with s_0 = 1 above nothing but zeros: 0.4 (1 - 0.1) + 0.6.
    assert found["reward"] == pytest.approx(0.96, abs=1e-6)


def test_what_cannot_be_evaluated_is_said():
    queries, corpus, right = judged()
    with pytest.raises(ValueError, match="queries must have right documents in relevant_docs"):
        RankingEvaluator(queries, corpus, {"other": {"d1"}})
    with pytest.raises(ValueError, match="cutoffs must be at least 1 each"):
        RankingEvaluator(queries, corpus, right, cutoffs=[0, 5])
    with pytest.raises(ValueError, match="corpus must hold documents, got none"):
        RankingEvaluator(queries, {}, right)
    with pytest.raises(ValueError, match="must hold lists of ids, got 'd12' of query 'q1'"):
        RankingEvaluator(queries, corpus, {"q1": "d12"})
