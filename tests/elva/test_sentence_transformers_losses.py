"""Losses in sentence-transformers' trainer: in value and gradients those that it has itself."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import dot_score

from elva.integrations.sentence_transformers import (
    CachedInfoNCELoss,
    InfoNCELoss,
    RankingRewardLoss,
)
from tests.elva import sentence_gather, sentence_models

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5}
"""Beside the largest value; fp32's at a scale of 100, where a rounding is 100 times as large."""

WAYS = [
    ("query_to_doc",),
    ("query_to_doc", "query_to_query"),
    ("query_to_doc", "doc_to_doc"),
    ("query_to_doc", "doc_to_query"),
    ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
]
SETTINGS = [{"directions": ways} for ways in WAYS]
SETTINGS += [{"directions": ways, "partition_mode": "per_direction"} for ways in (WAYS[0], WAYS[3])]
SETTINGS += [
    {"hardness_mode": mode, "hardness_strength": strength, "directions": ways}
    for mode, strength in (
        ("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 3.0),
    )
    for ways in (WAYS[0], WAYS[4])
]  # fmt: skip
SETTINGS += [dict(SETTINGS[-2], directions=WAYS[3], partition_mode="per_direction")]

TEXTS = [
    ["a cat", "two dogs ran", "the sea", "a very small red house", "rain", "bread and salt"],
    ["a tom", "hounds that run", "water", "a hut", "it pours", "a loaf"],
    ["a dog", "cats sleep", "the desert", "a tower", "a cat", "a stone"],
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_models.text(tmp_path_factory.mktemp("tiny"))


def columns(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Columns [6, 8]; a query's positive is another one's query, and two negatives are equal."""
    drawn = torch.randn(count, 6, 8, dtype=torch.float64, generator=torch.manual_seed(count))
    drawn[1, 2] = drawn[0, 0]
    drawn[-1, 3] = drawn[-1, 4]
    return [*drawn.to(dtype)]


def graded(loss: torch.nn.Module, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """A loss and its gradients on its columns."""
    own = [column.clone().requires_grad_() for column in given]
    value = loss.compute_loss_from_embeddings(own, None)
    return [value.detach(), *torch.autograd.grad(value, own)]


def equal(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        size = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit * size)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_loss_is_that_of_multiple_negatives(settings: dict) -> None:
    for scale in (20.0, 100.0):
        theirs = MultipleNegativesRankingLoss(None, scale, **settings)
        ours = InfoNCELoss(None, scale, **settings)
        for dtype, limit in LIMITS.items():
            for count in (2, 4):
                given = columns(count, dtype)
                equal(graded(ours, given), graded(theirs, given), limit)
        assert ours.get_config_dict() == theirs.get_config_dict()
        assert ours.citation == theirs.citation


def test_a_batch_of_one_has_its_hard_negatives_alone() -> None:
    given = [column[:1] for column in columns(4, torch.float64)]
    for settings in ({}, SETTINGS[-2], {"hardness_mode": "hard_negatives", "hardness_strength": 5}):
        theirs = graded(MultipleNegativesRankingLoss(None, **settings), given)
        equal(graded(InfoNCELoss(None, **settings), given), theirs, 1e-12)


def of_model(model: SentenceTransformer, loss: torch.nn.Module) -> list[torch.Tensor]:
    """A loss and its gradients on a model's parameters, from the same random states."""
    model.zero_grad()
    torch.manual_seed(3)
    value = loss([model.preprocess(texts) for texts in TEXTS], None) / 7
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("settings", [{}, SETTINGS[4], SETTINGS[-3]], ids=str)
def test_the_cached_loss_replays_dropout(model_path: Path, settings: dict) -> None:
    model = sentence_models.own(model_path).double().train()
    at_once = {"mini_batch_size": 4, **settings}
    theirs = of_model(model, CachedMultipleNegativesRankingLoss(model, **at_once))
    ours = CachedInfoNCELoss(model, **at_once)
    equal(of_model(model, ours), theirs, 1e-12)
    assert max(grad.abs().max() for grad in theirs[1:]) > 1e-3
    ours.scale = 5.0  # as theirs, a setting of the loss inside
    assert ours.loss.scale == 5.0 and isinstance(ours.loss, InfoNCELoss)
    model.eval()
    equal(of_model(model, CachedInfoNCELoss(model, **at_once)), of_model(
        model, InfoNCELoss(model, **settings)
    ), 1e-12)  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
def test_prefixes_of_embeddings_are_rows_too(model_path: Path, cached: bool) -> None:
    model = sentence_models.own(model_path).double()
    pairs = (
        (CachedMultipleNegativesRankingLoss, CachedInfoNCELoss)
        if cached
        else (MultipleNegativesRankingLoss, InfoNCELoss)
    )
    theirs, ours = (of_model(model, MatryoshkaLoss(model, c(model), [32, 8])) for c in pairs)
    equal(ours, theirs, 1e-12)


def test_processes_share_their_negatives(tmp_path: Path) -> None:
    """Two of gloo: theirs and ours have the same loss and gradients on each."""
    fork = multiprocessing.get_context("fork")  # everything is imported already
    started = [fork.Process(target=sentence_gather.run, args=(rank, tmp_path)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in started] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in range(2):
        for theirs, ours in found[rank].values():
            equal([ours[0], *ours[1]], [theirs[0], *theirs[1]], 1e-12)
    first, second = (one["plain"][1][1][1] for one in found)
    assert first.abs().max() > 1e-2 and not torch.equal(first, second)


def test_the_reward_is_the_papers() -> None:
    """Against its equations (sec. 3.4) in plain torch, with a query's own negatives."""
    query, positive, *negatives = columns(5, torch.float64)
    how = {"margin": 0.02, "rank_penalty": 0.05, "w_margin": 0.3, "w_rank": 0.7}

    def plain(query, positive, *negatives):
        docs = torch.stack([positive, *negatives], 1)
        scores = torch.cosine_similarity(query[:, None], docs, dim=-1)
        rank = 1 + (scores[:, None, :] >= scores[:, :, None]).sum(-1) - 1
        rank[:, 1:] -= (scores[:, 1:] == scores[:, :1]).long()  # the positive loses ties
        first, others = scores[:, 0], scores[:, 1:]
        logs = rank.double().log()
        penalty = (others * (logs[:, 1:] - 1)).sum(1)
        margin = (first - others.amax(1) - how["margin"]).relu()
        ranked = first / (1 + logs[:, 0]) - how["rank_penalty"] * penalty
        return -(how["w_margin"] * margin + how["w_rank"] * ranked).mean()

    given = [query, positive, *negatives[:2]]
    own = [column.clone().requires_grad_() for column in given]
    value = plain(*own)
    expected = [value.detach(), *torch.autograd.grad(value, own)]
    equal(graded(RankingRewardLoss(None, **how), given), expected, 1e-12)


def test_a_pair_is_rewarded_for_the_batch() -> None:
    """And so is a triplet that is told to; ranks may be smooth among a query's own alone."""
    query, positive, *negatives = columns(3, torch.float64)
    in_batch = graded(RankingRewardLoss(None), [query, positive])
    others = torch.stack([positive[[j for j in range(6) if j != i]] for i in range(6)])
    own = graded(RankingRewardLoss(None), [query, positive, *others.unbind(1)])
    torch.testing.assert_close(in_batch[0], own[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(in_batch[1], own[1], rtol=0, atol=1e-12)
    given = [query, positive, *negatives]
    assert graded(RankingRewardLoss(None, in_batch=True), given)[0] != in_batch[0]
    smooth = RankingRewardLoss(None, rank_temperature=0.1)
    assert graded(smooth, given)[0] != graded(RankingRewardLoss(None), given)[0]
    with pytest.raises(ValueError, match="rank_temperature must be 0 without hard negatives"):
        graded(smooth, [query, positive])
    with pytest.raises(ValueError, match="rank_temperature must be 0"):
        RankingRewardLoss(None, rank_temperature=0.1, in_batch=True)
    with pytest.raises(ValueError, match="in_batch must not be False"):
        RankingRewardLoss(None, in_batch=False, gather_across_devices=True)


def test_what_a_loss_cannot_do_is_said_before_it_begins() -> None:
    with pytest.raises(ValueError, match="similarity_fct must be cos_sim, got dot_score; for the"):
        InfoNCELoss(None, similarity_fct=dot_score)
    for loss in (InfoNCELoss(None), RankingRewardLoss(None)):
        with pytest.raises(ValueError, match="at least 2 columns, got 1; name an anchor"):
            loss.compute_loss_from_embeddings(columns(3, torch.float32)[:1], None)


@pytest.mark.parametrize(
    "kind", [pytest.param(InfoNCELoss, marks=pytest.mark.thorough),
             pytest.param(CachedInfoNCELoss, marks=pytest.mark.thorough), RankingRewardLoss]
)  # fmt: skip
def test_a_trainer_trains_saves_and_goes_on(model_path: Path, tmp_path: Path, kind: type) -> None:
    """Six steps, of which the last three resume: the same weights; the card names the loss."""
    rows = dict(zip(("anchor", "positive", "negative"), TEXTS, strict=True))
    data = Dataset.from_dict(rows)

    def train(where: str, resume: str | None = None) -> SentenceTransformer:
        model = sentence_models.own(model_path)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / where), max_steps=6, save_steps=3, logging_steps=1, seed=1,
            per_device_train_batch_size=3, learning_rate=1e-2, report_to="none", use_cpu=True,
            dataloader_num_workers=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=kind(model)
        )
        trainer.train(resume_from_checkpoint=resume)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        if resume is None:
            assert len(losses) == 6 and float(losses[-1]) < float(losses[0])
        return model

    whole, first = train("whole"), sentence_models.own(model_path)
    resumed = train("again", str(tmp_path / "whole" / "checkpoint-3"))
    weights, again, before = (m.state_dict() for m in (whole, resumed, first))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert max((weights[name] - before[name]).abs().max() for name in weights) > 1e-3
    whole.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text("utf-8")
    assert kind.__name__ in card and "eprint=" in card
