"""One stage: whom a query is compared with, what of it reaches the weights, and what stops it."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import elva_kernels
from elva.data import Item, Query, load, mbeir
from elva.data.instructions import write_instructions
from elva.data.layout import file_stem
from elva.errors import RunError, UserError
from elva.model.retriever import Retriever
from elva.processes import Processes
from elva.recipe import LoraSettings, NegativeConfig, RewardConfig, StageConfig
from elva.training import objective, ranking
from elva.training.comparison import SOURCES, Comparison, compare
from elva.training.examples import Candidates, Examples
from elva.training.guards import PATIENCE, RUNAWAY_KL, Guards
from elva.training.negatives import Negatives
from elva.training.plan import Batch, plan, steps_an_epoch
from elva.training.relevance import Relevance, shared_grains, similarity
from tests.elva.stages import INFO_NCE, POLICY, Stage

Released = Callable[[str], Path]


@pytest.fixture
def checkpoint(released: Released) -> Path:
    return released("tied")


# -- the losses, against float64 -------------------------------------------------------------------


def embedded(groups: int, bank: int = 0) -> tuple[ranking.Embedded, Comparison]:
    """Three queries among five candidates, the last `bank` of them not rolled out."""
    torch.manual_seed(0)
    rolled = 5 - bank
    query = torch.randn(3, groups, 16, dtype=torch.float64)
    table = torch.randn(rolled * groups + bank, 16, dtype=torch.float64)
    columns = torch.arange(rolled * groups).view(-1, groups)
    kept = torch.arange(rolled * groups, len(table))[:, None].expand(-1, groups)
    comparison = Comparison(
        queries=[None] * 3,  # type: ignore[list-item]
        candidates=np.arange(5), rolled=rolled,
        target=np.array([[0, -1], [1, 2], [2, -1]]),
        excluded=np.array([[0, 2], [2, 1]]),
        negatives=np.array([[3, 4], [4, -1], [-1, -1]]), sources=np.array([[0, 2], [0, 0], [0, 0]]),
    )  # fmt: skip
    return ranking.Embedded(query.requires_grad_(), table, torch.cat([columns, kept])), comparison


def cosines(e: ranking.Embedded) -> torch.Tensor:
    """[B, G, T] in plain torch."""
    return torch.cosine_similarity(e.query[:, :, None], e.table, dim=-1)


@pytest.mark.parametrize(("groups", "bank"), [(1, 0), (3, 0), (2, 2)])
def test_info_nce_is_that_of_every_rollout_against_every_rollout(groups: int, bank: int) -> None:
    e, comparison = embedded(groups, bank)
    loss, metrics = ranking.info_nce(replace(INFO_NCE, symmetric=False), comparison, e, 0.1)
    scores = cosines(e) / 0.1
    expected = []
    for b, right in enumerate(([0], [1, 2], [2])):
        other = {0: [2], 1: [], 2: [1]}[b]
        wrong = [e.columns[c] for c in range(5) if c not in right + other]
        rows = torch.cat(wrong).unique()
        for g in range(groups):
            for place in right:
                for row in e.columns[place]:
                    kept = torch.cat([scores[b, g, row][None], scores[b, g, rows]])
                    expected.append((kept.logsumexp(0) - scores[b, g, row]) / len(right))
    mean = torch.stack(expected).sum() / (3 * groups * groups)
    assert loss.item() == pytest.approx(mean.item(), rel=1e-9)
    mine, its = (torch.autograd.grad(x, e.query)[0] for x in (loss, mean))
    assert (mine - its).abs().max() < 1e-9
    shares = [metrics[name] for name in metrics if "_share_" in name]
    assert sum(shares) == pytest.approx(1.0) and 0 < metrics["infonce_share_given"] < 1


@pytest.mark.parametrize(("groups", "bank"), [(1, 0), (3, 0), (2, 2)])
def test_each_source_has_its_share_of_the_softmax(groups: int, bank: int) -> None:
    e, comparison = embedded(groups, bank)
    _, metrics = ranking.info_nce(INFO_NCE, comparison, e, 0.5)
    scores = cosines(e).detach()
    own, out = {0: [0], 1: [1, 2], 2: [2]}, {0: 2, 2: 1}
    for b, place in out.items():
        scores[b, :, e.columns[place]] = -math.inf
    mass = (scores / 0.5).softmax(-1)
    right = [mass[b][:, e.columns[places].flatten()].sum(1) for b, places in own.items()]
    wrong = (1 - torch.stack(right)).sum()
    negatives = {"given": {0: 3, 1: 4}, "random": {0: 4}}
    for name, places in negatives.items():
        rows = {b: e.columns[place].unique() for b, place in places.items()}
        share = sum(mass[b][:, some].sum() for b, some in rows.items()) / wrong
        assert metrics[f"infonce_share_{name}"] == pytest.approx(float(share))
        outranked = [
            float(scores[b, g, some].max() >= scores[b, g, e.columns[own[b][0], g]])
            for b, some in rows.items() for g in range(groups)
        ]  # fmt: skip
        assert metrics[f"infonce_outranked_{name}"] == pytest.approx(fmean(outranked))


def turned(degrees: Sequence[float]) -> torch.Tensor:
    """[n, 2] unit vectors."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_what_a_reward_says_of_a_step() -> None:
    """Seven queries of rank 1, 2, 3, 4, 10, 11 and 13; rollouts of the first two are alike."""
    right, rollouts = [0, 1, 2, 3, 9, 10, 12], [[0, 0]] * 2 + [[0, -20]] * 5
    others = [[c for c in range(13) if c != place] for place in right]
    comparison = Comparison(
        queries=[None] * 7,  # type: ignore[list-item]
        candidates=np.arange(13), rolled=13, target=np.array(right)[:, None],
        excluded=np.zeros((0, 2), np.int64), negatives=np.array(others),
        sources=np.zeros((7, 12), np.int64),
    )  # fmt: skip
    query = torch.stack([turned(some) for some in rollouts])
    table = turned([3.0 * (c + 1) for c in range(13)])
    e = ranking.Embedded(query.requires_grad_(), table, torch.arange(13)[:, None].expand(-1, 2))
    found, metrics = ranking.reward(POLICY, comparison, e)
    scores, rewards = cosines(e).detach(), found.query.detach()
    expected = {
        "rank_1": 1 / 7, "rank_2_3": 2 / 7, "rank_4_10": 2 / 7, "rank_11_up": 2 / 7,
        "positive_score": scores[range(7), :, right].mean().item(),
        "mean_score": scores.mean().item(), "reward": rewards.mean().item(),
        "reward_std": rewards.std(1, correction=0).mean().item(),
        "frac_zero_std": 2 / 7, "reward_share_given": 1.0, "reward_outranked_given": 6 / 7,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert (found.query[2:, 0] - found.query[2:, 1]).abs().min() > 1e-3


def test_groups_without_an_advantage_are_counted() -> None:
    """Rewards 1e-6 apart have one, those of the next smaller distance none."""
    e, _ = embedded(1)
    out = elva_kernels.ranking_reward(e.query[0, 0], e.table[0], e.table[1:])
    apart = torch.tensor([0.0, 5e-7, np.nextafter(1e-6, 0), 1e-6, 2e-6], dtype=torch.float64)
    rewards = torch.stack([torch.zeros_like(apart), apart], 1)
    without = (objective.advantages(rewards, "group") == 0).all(1)
    assert without.tolist() == [True, True, True, False, False]
    assert ranking._reward_metrics(rewards, out)["frac_zero_std"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_a_step_out_without_a_rest(count: int) -> None:
    """The bank's rows, which nobody rolls out, are the last one's."""
    asked: list[int] = []
    shown: list[int] = []
    for index in range(count):
        processes = Processes()
        processes.count, processes.index = count, index
        shares = ranking.Shares(processes, processes.share(4), processes.share(5))
        asked += range(8)[shares.queries(2)]
        shown += range(17)[shares.table(2, 17)]
    assert asked == list(range(8)) and shown == list(range(17))


@pytest.mark.parametrize("pairings", ["own", "all"])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_reward_of_several_right_answers_is_their_mean(groups: int, pairings: str) -> None:
    e, comparison = embedded(groups)
    stage = replace(POLICY, reward=RewardConfig(margin=-0.5), pairings=pairings)
    found, metrics = ranking.reward(stage, comparison, e)

    def paid(b: int, g: int, h: int, right: list[int], wrong: list[int]) -> float:
        """Of rollout g of a query against rollouts h of its candidates."""
        each = [
            elva_kernels.ranking_reward(
                e.query[b, g], e.table[e.columns[place, h]], e.table[e.columns[wrong, h]],
                margin=-0.5,
            ).reward
            for place in right
        ]  # fmt: skip
        return torch.stack(each).mean().item()

    for b, (right, wrong) in enumerate((([0], [3, 4]), ([1, 2], [4]), ([2], []))):
        for g in range(groups):
            others = range(groups) if pairings == "all" else [g]
            asked = fmean(paid(b, g, h, right, wrong) for h in others)
            shown = fmean(paid(b, h, g, right, wrong) for h in others)
            assert found.query[b, g].item() == pytest.approx(asked, rel=1e-9)
            assert found.shown[b, g].item() == pytest.approx(shown, rel=1e-9)
    assert metrics["reward_share_given"] + metrics["reward_share_random"] == pytest.approx(1.0)


@pytest.mark.parametrize("pairings", ["own", "all"])
def test_a_graded_reward_takes_the_relevance_of_each_negative_to_its_answer(pairings: str) -> None:
    e, comparison = embedded(2)
    stage = replace(POLICY, reward=RewardConfig(margin=0.5, rank_penalty=0.3), pairings=pairings)
    grains = [frozenset(x) for x in ("ab", "ac", "d", "abcd", "e")]  # of candidates, as rows
    found, metrics = ranking.reward(stage, comparison, e, Relevance(shared_grains(grains)))
    graded = {(0, 3): 0.5, (0, 4): 0.0, (1, 4): 0.0}  # (answer, negative)
    for b, (right, wrong) in enumerate((([0], [3, 4]), ([1, 2], [4]))):
        paid = [
            elva_kernels.ranking_reward(
                e.query[b, g], e.table[e.columns[place, h]], e.table[e.columns[wrong, h]],
                margin=0.5, rank_penalty=0.3,
                relevance=torch.tensor([graded.get((place, w), 0.0) for w in wrong]),
            ).reward
            for g in range(2) for h in (range(2) if pairings == "all" else [g]) for place in right
        ]  # fmt: skip
        assert found.query[b].mean().item() == pytest.approx(torch.stack(paid).mean().item())
    plain, _ = ranking.reward(stage, comparison, e)
    assert (found.query[0] - plain.query[0]).abs().min() > 1e-3
    assert torch.equal(found.query[1:], plain.query[1:])
    assert metrics["reward_share_given"] + metrics["reward_share_random"] == pytest.approx(1.0)


def test_relevance_is_a_similarity_or_a_share_of_grains() -> None:
    rows = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    positives, negatives = np.array([0, 1]), np.array([[1, 2, 3], [0, -1, 3]])
    found = similarity(rows)(positives, negatives)
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0, 0], [0.5**0.5, 0, 0]]))
    grains = [frozenset(x) for x in (["a", "b"], ["b", "c"], [], ["a", "b"])]
    found = shared_grains(grains)(positives, negatives)
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 0, 1], [1 / 3, 0, 1 / 3]]))
    with pytest.raises(ValueError, match="shorter"):
        shared_grains(grains)(positives, negatives[:1])


def test_a_negative_at_any_place_has_its_relevance() -> None:
    _, comparison = embedded(1)
    comparison = replace(comparison, negatives=np.array([[3, 4], [4, 0], [-1, 0]]))
    grains = [frozenset(x) for x in ("ab", "ac", "b", "abcd", "e")]
    asks, answers = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 0])
    found = Relevance(shared_grains(grains))(comparison, asks, answers)
    expected = torch.tensor([[0.5, 0], [0, 1 / 3], [0, 0.5], [0, 0.5]])
    torch.testing.assert_close(found, expected)


def test_relevance_comes_from_the_data_or_from_the_start(
    checkpoint: Path, corpus: Path, texts: Callable[..., Path], tmp_path: Path
) -> None:
    stage = replace(INFO_NCE, infonce=0.0, pathwise=1.0, batch_size=24, relevance="grains")
    known = Examples(load(corpus, split="train"), stage).candidate_grains()
    assert sum(map(bool, known)) > len(known) / 2
    run = Stage(checkpoint, corpus, stage, tmp_path, steps=1).train()
    plain = Stage(checkpoint, corpus, replace(stage, relevance="none"), tmp_path / "p", steps=1)
    assert run.log[0]["reward"] != plain.train().log[0]["reward"]
    started = Stage(checkpoint, corpus, replace(stage, relevance="start"), tmp_path / "s", steps=1)
    assert started.train().log[0]["reward"] not in (run.log[0]["reward"], plain.log[0]["reward"])
    with pytest.raises(UserError, match="must have queries with grains for relevance grains"):
        Stage(checkpoint, texts(), replace(stage, tasks={"t2t": 1.0}), tmp_path / "t")


# -- whom a query is compared with -----------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., Path]:
    """A directory of twelve text queries, each with a pool row of its own, and one row more."""

    def write(
        pool: list[str] | None = None,
        positives: Callable[[int], list[int]] = lambda i: [i],
        negatives: Callable[[int], list[int]] = lambda i: [],
        name: str = "data",
    ) -> Path:
        root = tmp_path / name
        answers = pool or [f"answer number {i}" for i in range(40)]
        files = {
            "instructions/query_instructions.tsv": [
                "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1",
                "text\ttext\tX\t90\tFind it.",
            ],
            "cand_pool/local/mbeir_x_task1_cand_pool.jsonl": [
                json.dumps({"did": f"90:{i + 1}", "txt": text, "img_path": None,
                            "modality": "text", "src_content": None})
                for i, text in enumerate(answers)
            ],
            "query/train/mbeir_x_task1_train.jsonl": [
                json.dumps({
                    "qid": f"90:{i + 1}", "query_txt": f"question {i}", "query_img_path": None,
                    "query_modality": "text", "task_id": 1,
                    "pos_cand_list": [f"90:{p + 1}" for p in positives(i)],
                    "neg_cand_list": [f"90:{n + 1}" for n in negatives(i)],
                })
                for i in range(12)
            ],
        }  # fmt: skip
        for place, lines in files.items():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_text("\n".join(lines) + "\n")
        return root

    return write


TEXTS = replace(INFO_NCE, tasks={"t2t": 1.0})


def comparison_of(root: Path, stage: StageConfig, step: int = 0) -> Comparison:
    examples = Examples(load(root, split="train"), stage)
    negatives = Negatives(stage, examples, (0,), lambda items: torch.eye(len(items), 64))
    batch = Batch(step, list(range(6)))
    return compare(stage, examples, batch, *negatives.of(batch), (0,))


def test_copies_of_an_answer_are_one_candidate(texts: Callable[..., Path]) -> None:
    """Found by audit: 12 queries whose answers are 12 rows of one text had 0 of 132 pairs left
    out: each was pushed from 11 copies of its own answer."""
    found = comparison_of(texts(pool=[["The same. ", "the SAME"][i % 2] for i in range(40)]), TEXTS)
    assert len(found.candidates) == 1 and (found.target == 0).all()
    copies = texts(pool=[["a", "A.", "b", "c", "d", "e"][i % 6] for i in range(40)], name="some")
    found = comparison_of(copies, TEXTS)
    assert len(found.candidates) == 5 and found.target[0] == found.target[1]


def test_a_second_right_answer_is_no_negative(texts: Callable[..., Path]) -> None:
    root = texts(positives=lambda i: [i, (i + 1) % 12])
    one = comparison_of(root, TEXTS)
    right = {b: {b, b + 1} for b in range(6)}
    for b in range(6):
        trained = one.candidates[one.target[b]].tolist()
        assert len(trained) == 1 and set(trained) <= right[b]
        out = {int(one.candidates[c]) for q, c in one.excluded.tolist() if q == b}
        assert out == (right[b] - set(trained)) & set(one.candidates.tolist())
    every = comparison_of(root, replace(TEXTS, positives="all"))
    assert {b: set(every.candidates[t].tolist()) for b, t in enumerate(every.target)} == right
    drawn = {comparison_of(root, TEXTS, step).candidates[0] for step in range(20)}
    assert drawn == {0, 1}, "drawn anew each step"


def test_given_negatives_that_are_right_are_dropped(texts: Callable[..., Path]) -> None:
    root = texts(negatives=lambda i: [i, 20 + i], pool=[f"answer {i % 20}" for i in range(40)])
    found = comparison_of(root, replace(TEXTS, negatives=NegativeConfig(given=2)))
    assert (found.negatives == -1).all(), "one is the answer, the other its copy"


def test_a_ranking_is_among_the_answers_of_the_batch_that_are_not_its_own(
    texts: Callable[..., Path],
) -> None:
    root = texts(positives=lambda i: [i, i + 1], negatives=lambda i: [i + 2])
    stage = replace(
        TEXTS, infonce=0.0, pathwise=1.0, positives="all", negatives=NegativeConfig(given=1)
    )
    found = comparison_of(root, stage)
    for b, (places, sources) in enumerate(zip(found.negatives, found.sources, strict=True)):
        rows = found.candidates[places[places >= 0]].tolist()
        assert rows[0] == b + 2 and sorted(rows) == sorted({b + 2, *range(7)} - {b, b + 1})
        named = [SOURCES[source] for source in sources[places >= 0]]
        assert named == ["given"] + ["in_batch"] * (len(rows) - 1)


def test_a_negative_and_its_copy_are_one(texts: Callable[..., Path]) -> None:
    pool = [f"answer {min(i, 20)}" for i in range(40)]
    root = texts(pool=pool, negatives=lambda i: [20, 21, 13])
    found = comparison_of(root, replace(TEXTS, negatives=NegativeConfig(given=3)))
    assert [found.candidates[some[[0, 2]]].tolist() for some in found.negatives] == [[20, 13]] * 6
    assert found.negatives[:, 1].tolist() == [-1] * 6


def test_an_answer_among_the_given_takes_no_place(texts: Callable[..., Path]) -> None:
    """Found by use: given 2, mined 2, random 2 and a list of [other, answer] left three."""
    root = texts(negatives=lambda i: [30, i])
    stage = replace(TEXTS, negatives=NegativeConfig(given=2, mined=0, random=4))
    found = comparison_of(root, stage)
    assert (found.negatives >= 0).all() and found.negatives.shape == (6, 4)
    assert found.sources.tolist() == [[0, 2, 2, 2]] * 6


def test_a_stage_that_ranks_against_nothing_is_refused(texts: Callable[..., Path]) -> None:
    """Found by use: it trained on the positive's similarity alone, silently."""
    alone = NegativeConfig(given=3, in_batch=False)
    stage = replace(TEXTS, infonce=0.0, pathwise=1.0, negatives=alone)
    with pytest.raises(UserError, match="must have negatives to rank against, got none in step 0"):
        comparison_of(texts(), stage)


def test_a_querys_own_negatives_come_in_order_and_are_drawn_anew(
    texts: Callable[..., Path],
) -> None:
    root = texts(negatives=lambda i: [20 + i, 30])
    stage = replace(TEXTS, negatives=NegativeConfig(given=2, mined=0, random=5))
    examples = Examples(load(root, split="train"), stage)
    negatives = Negatives(stage, examples, (0,), lambda items: torch.eye(len(items), 64))
    rows, sources = negatives.of(Batch(3, [4, 5]))
    assert rows[0, :2].tolist() == [24, 30] and sources[0].tolist() == [0, 0, 2, 2, 2]
    for b, query in enumerate((4, 5)):
        assert len(set(rows[b].tolist())) == 5 and query not in rows[b]
    again, _ = negatives.of(Batch(3, [4, 5]))
    later, _ = negatives.of(Batch(4, [4, 5]))
    assert (again == rows).all() and not (later == rows).all()
    counts = np.bincount(
        np.concatenate([negatives.of(Batch(step, [4]))[0][0, 2:] for step in range(400)]),
        minlength=40,
    )
    free = np.setdiff1d(np.arange(40), [4, 24, 30])
    assert counts[[4, 24, 30]].sum() == 0
    assert counts[free].std() < 2 * math.sqrt(1200 / len(free)), "even over the rest of the pool"


def test_of_a_longer_list_so_many_are_drawn_as_are_wanted(texts: Callable[..., Path]) -> None:
    root = texts(negatives=lambda i: [30, 31, 32])
    stage = replace(TEXTS, negatives=NegativeConfig(given=2, random=3))
    examples = Examples(load(root, split="train"), stage)
    negatives = Negatives(stage, examples, (0,), lambda items: torch.eye(len(items), 64))
    drawn = set()
    for step in range(20):
        rows, sources = negatives.of(Batch(step, [4]))
        assert sources.tolist() == [[0, 0, 2]]
        drawn.add(tuple(rows[0, :2].tolist()))
    assert drawn == {(30, 31), (30, 32), (31, 32)}


def test_a_pool_without_enough_negatives_leaves_places_empty(texts: Callable[..., Path]) -> None:
    root = texts(pool=[f"answer {i % 4}" for i in range(12)], positives=lambda i: [i])
    stage = replace(TEXTS, negatives=NegativeConfig(given=0, random=5))
    examples = Examples(load(root, split="train"), stage)
    negatives = Negatives(stage, examples, (0,), lambda items: torch.eye(len(items), 64))
    rows, _ = negatives.of(Batch(0, [4, 5]))
    assert rows[:, 3:].tolist() == [[-1, -1]] * 2 and (rows[:, :3] >= 0).all()
    uneven = texts(positives=lambda i: [i, 6] if i else [0], name="uneven")
    found = comparison_of(uneven, replace(TEXTS, positives="all"))
    assert found.target[0].tolist() == [0, -1] and (found.target[1:] >= 0).all()


def test_what_is_only_captioned_is_told_from_nothing(
    texts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are its pictures looked at."""

    def identities(self: Candidates, rows: np.ndarray) -> np.ndarray:
        raise AssertionError("looked at")

    monkeypatch.setattr(Candidates, "identities", identities)
    root = texts(pool=["the same"] * 40, negatives=lambda i: [20 + i])
    stage = replace(TEXTS, infonce=0.0, lm=1.0, negatives=NegativeConfig(given=1, random=2))
    found = comparison_of(root, stage)
    assert found.candidates.tolist() == list(range(6)) and found.negatives.shape == (6, 0)


def test_a_bank_is_asked_only_for_what_is_not_rolled_out(texts: Callable[..., Path]) -> None:
    root = texts(negatives=lambda i: [20 + i])
    shares = {"query": 0, "query_positive": 6, "all": 12}
    for name, rolled in shares.items():
        drawn = NegativeConfig(given=1, random=1)
        stage = replace(TEXTS, negatives=drawn, rollout_candidates=name)
        assert comparison_of(root, stage).rolled == rolled
    assert comparison_of(root, replace(TEXTS, negatives=NegativeConfig(given=1))).rolled == 12


@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param(x, marks=pytest.mark.thorough)
           for x in ({"negatives": NegativeConfig(given=2)}, {"pathwise": 1.0, "infonce": 0.0}))],
    ids=["one", "two", "ranking"],
)  # fmt: skip
def test_changing_only_the_given_negatives_changes_the_weights(
    changes: dict[str, Any], texts: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    """Found by audit: three directories that differed in neg_cand_list gave the same weights."""
    stage = replace(TEXTS, **{"negatives": NegativeConfig(given=1), **changes})
    lists: list[Callable[[int], list[int]]] = [
        lambda i: [], lambda i: [20 + i], lambda i: [20 + i, (i + 3) % 12],
    ]  # fmt: skip
    digests = set()
    for place, negatives in enumerate(lists):
        root = texts(negatives=negatives, name=f"data{place}")
        digests.add(Stage(checkpoint, root, stage, tmp_path / str(place)).train().digest)
    assert len(digests) == 3


@pytest.mark.parametrize("positives", ["one", "all"])
def test_changing_only_the_second_answer_changes_the_weights(
    positives: str, texts: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    stage = replace(TEXTS, positives=positives)
    lists: list[Callable[[int], list[int]]] = [
        lambda i: [i], lambda i: [i, 12 + i], lambda i: [i, 12 + (i + 5) % 12],
    ]  # fmt: skip
    digests = set()
    for place, right in enumerate(lists):
        root = texts(positives=right, name=f"data{place}")
        digests.add(Stage(checkpoint, root, stage, tmp_path / str(place)).train().digest)
    assert len(digests) == 3


def test_a_pool_is_embedded_only_where_a_query_needs_it(texts: Callable[..., Path]) -> None:
    """Found by reading: with every list full, as `elva mine` writes them, the whole pool was."""
    chosen = NegativeConfig(given=2, mined=1, random=1, in_batch=False)
    stage = replace(POLICY, tasks={"t2t": 1.0}, negatives=chosen)
    embedded: list[int] = []

    def embed(items: Sequence[Item]) -> torch.Tensor:
        embedded.append(len(items))
        return torch.randn(len(items), 8, generator=torch.Generator().manual_seed(len(items)))

    for lists, expected in ((lambda i: [39, 20 + i], []), (lambda i: [39], [40, 12])):
        root = texts(negatives=lists, name=f"data{len(expected)}")
        examples = Examples(load(root, split="train"), stage)
        Negatives(stage, examples, (0,), embed).prepare(0)
        assert embedded == expected


@pytest.fixture
def pools(texts: Callable[..., Path], tmp_path: Path) -> Path:
    """Twelve texts and twelve pictures that ask, each task among twenty texts of its own."""
    root = texts(pool=[f"answer {i}" for i in range(20)], name="pools")
    stem = file_stem("x", "i2t")
    pool = [
        {"did": f"90:{100 + i}", "txt": f"words {i}", "img_path": None, "modality": "text"}
        for i in range(1, 21)
    ]
    mbeir.write_pool(root, stem, pool)
    Image.new("RGB", (32, 32)).save(root / "one.png")
    queries = [
        {"qid": f"90:{100 + i}", "query_txt": None, "query_img_path": "one.png",
         "query_modality": "image", "task_id": 3, "pos_cand_list": [f"90:{100 + i}"],
         "neg_cand_list": []}
        for i in range(1, 13)
    ]  # fmt: skip
    mbeir.write_queries(root, stem, "train", queries)
    prompts = {("text", "text"): ["Find it."], ("image", "text"): ["Find it."]}
    write_instructions(root, "X", 90, prompts)
    return root


class Turning:
    """Embeds item n at n steps of an angle and a query a third of a step on; counts its calls."""

    def __init__(self, step: float = 5.0) -> None:
        self.step, self.calls = step, 0

    def __call__(self, items: Sequence[Item]) -> torch.Tensor:
        self.calls += 1
        numbers = [int(item.id.split(":")[1]) % 100 for item in items]
        more = [0.3 * isinstance(item, Query) for item in items]
        return turned([self.step * (n + m) for n, m in zip(numbers, more, strict=True)]).float()


MINED = replace(
    POLICY, tasks={"t2t": 1.0, "i2t": 1.0}, max_score=1.0,
    negatives=NegativeConfig(given=0, mined=3, in_batch=False), rollout_candidates="query",
)  # fmt: skip


def mined_by(root: Path, stage: StageConfig, embed: Turning) -> tuple[Negatives, Examples]:
    examples = Examples(load(root, split="train"), stage)
    return Negatives(stage, examples, (0,), embed), examples


def nearest(place: int) -> list[int]:
    """Places of the answers next to that of a query, by `Turning`."""
    return sorted({*range(20)} - {place}, key=lambda other: abs(other - place - 0.3))


def test_negatives_are_mined_in_the_pool_of_their_task(pools: Path) -> None:
    negatives, examples = mined_by(pools, MINED, Turning())
    negatives.prepare(0)
    starts = {task: examples.candidates.span(task)[0] for task in examples.rows}
    assert sorted(starts.values()) == [0, 20]
    for task, queries in examples.rows.items():
        rows, sources = negatives.of(Batch(0, queries.tolist()))
        assert (sources == SOURCES.index("mined")).all()
        for place, some in enumerate((rows - starts[task]).tolist()):
            assert some == nearest(place)[:3]
    assert negatives.bank is not None
    items = [examples.candidates[row] for row in range(40)]
    assert torch.equal(negatives.bank, Turning()(items))


def test_only_queries_without_a_full_list_are_mined(texts: Callable[..., Path]) -> None:
    root = texts(
        pool=[f"answer {i}" for i in range(20)],
        negatives=lambda i: [12, 13, 14] if i % 2 else [12],
    )
    given = NegativeConfig(given=3, mined=2, random=1, in_batch=False)
    stage = replace(MINED, tasks={"t2t": 1.0}, negatives=given)
    negatives, _ = mined_by(root, stage, Turning())
    negatives.prepare(0)
    assert negatives.mined is not None
    for place, some in enumerate(negatives.mined.tolist()):
        assert some == ([-1, -1] if place % 2 else nearest(place)[:2])


def test_a_stage_mines_anew_when_it_is_due(pools: Path) -> None:
    negatives, _ = mined_by(pools, replace(MINED, refresh_steps=2), Turning())
    calls = []
    for step in range(5):
        negatives.prepare(step)
        calls.append(negatives.embed.calls)
    assert [negatives.due(step) for step in range(5)] == [False, False, True, False, True]
    assert calls == [calls[0], calls[0], 2 * calls[0], 2 * calls[0], 3 * calls[0]]
    once, _ = mined_by(pools, replace(MINED, rollout_candidates="all"), Turning())
    once.prepare(0)
    calls = once.embed.calls
    once.prepare(2)
    assert once.embed.calls == calls > 0 and once.bank is None


@pytest.mark.parametrize("rolled", ["query", "all"])
def test_what_was_mined_outlives_a_checkpoint(pools: Path, rolled: str) -> None:
    stage = replace(MINED, rollout_candidates=rolled, refresh_steps=2)
    first, examples = mined_by(pools, stage, Turning())
    first.prepare(0)
    rows = examples.rows["i2t"].tolist()
    expected, _ = first.of(Batch(1, rows))
    state = first.state()
    kept = {name: value.clone() for name, value in state.items()}
    first.embed.step = 7.0  # the weights move on
    first.prepare(2)
    assert set(state) == ({"bank", "mined"} if rolled == "query" else {"mined"})
    assert all(torch.equal(kept[name], value) for name, value in state.items())
    again, _ = mined_by(pools, stage, Turning())
    again.restore(state, torch.device("cpu"))
    again.prepare(1)
    assert again.embed.calls == 0 and (again.of(Batch(1, rows))[0] == expected).all()
    assert (again.bank is None) == (rolled == "all")


def test_a_querys_neighbours_are_those_whose_answers_it_is_likely_to_be_given(pools: Path) -> None:
    negatives, examples = mined_by(pools, replace(MINED, hard_batches=True), Turning())
    negatives.mine()
    found = negatives.neighbours()
    for rows in examples.rows.values():
        for place, row in enumerate(rows.tolist()):
            asking = [other for other in nearest(place) if other < 12]
            assert found[row] == [int(rows[other]) for other in asking]


def test_what_is_rolled_out_is_what_the_setting_says(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """`query`, `query_positive` and `all` are three things; the rest comes from the bank."""
    counts, digests = {}, set()
    for name in ("query", "query_positive", "all"):
        stage = replace(POLICY, pathwise=0.5, rollout_candidates=name)
        run = Stage(checkpoint, corpus, stage, tmp_path / name, steps=2).train()
        last = run.work.last
        assert last is not None
        counts[name] = len(last.asked.prompts)
        assert (last.bank is None) == (name == "all")
        digests.add(run.digest)
    assert counts["query"] == 2 and counts["query_positive"] == 4
    assert counts["all"] == 2 + len(last.asked.comparison.candidates) > 8
    assert len(digests) == 3


def test_mined_negatives_are_the_hardest_and_no_copies(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = Stage(checkpoint, corpus, POLICY, tmp_path, steps=1)
    negatives, examples = run.work.negatives, run.work.examples
    negatives.prepare(0)
    first, beyond = examples.candidates.span("t2i")
    bank = run.work.summaries.embed([examples.candidates[i] for i in range(first, beyond)]).double()
    batch = plan(POLICY, examples, 1, (0,))[0]
    rows, sources = negatives.of(batch)
    assert sources.tolist() == [[1, 1, 1, 2, 2]] * 2
    for b, row in enumerate(batch.rows):
        query = examples.query(row)
        asked = run.work.summaries.embed([query]).double()
        scores = torch.cosine_similarity(asked, bank)
        order = [
            i
            for i in scores.argsort(descending=True).tolist()
            if i + first not in examples.right(query) and scores[i] <= POLICY.max_score
        ]
        worst = scores[rows[b, 2] - first].item()
        assert set(rows[b, :2].tolist()) <= {i + first for i in order[:4]}
        assert worst == pytest.approx(scores[order[2]].item(), abs=1e-5)


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", ["task", "mixed"])
def test_an_epoch_is_a_pass(corpus: Path, batches: str) -> None:
    """Found by audit: 2.6 % of the rows never seen in "1 epoch", 2.6 % twice."""
    stage = StageConfig(infonce=1.0, epochs=2, batch_size=64, batches=batches)
    examples = Examples(load(corpus, split="train"), stage)
    steps = steps_an_epoch(stage, examples)
    planned = plan(stage, examples, 2 * steps, (0,))
    for epoch in (planned[:steps], planned[steps:]):
        seen = sorted(row for batch in epoch for row in batch.rows)
        assert seen == sorted(np.concatenate(list(examples.rows.values())).tolist())
    tasks = [{examples.query(r).task for r in batch.rows} for batch in planned]
    assert max(map(len, tasks)) == (1 if batches == "task" else 4)
    assert max(len(batch.rows) for batch in planned) <= 64
    assert planned[0].rows != planned[steps].rows
    assert plan(stage, examples, 3, (0,)) == planned[:3]


# -- legal settings that were silently wrong -------------------------------------------------------


def test_gold_completions_train_by_info_nce(corpus: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Found by audit: the loss stayed at log B for ever, for the embeddings were zeros."""
    stage = replace(INFO_NCE, completions="gold", learning_rate=2e-3)
    run = Stage(checkpoint, corpus, stage, tmp_path, steps=12).train()
    assert abs(run.log[0]["infonce"] - math.log(6)) > 1e-3
    assert np.mean([s["infonce"] for s in run.log[-3:]]) < run.log[0]["infonce"]
    assert run.moved > 1e-3


def test_a_temperature_is_learnt(corpus: Path, checkpoint: Path, tmp_path: Path) -> None:
    """By each step's own gradient, and by nothing left of the step before."""
    stage = replace(INFO_NCE, learn_infonce_temperature=True, symmetric=True)
    run = Stage(checkpoint, corpus, stage, tmp_path, steps=4)
    step, gaps = run.work.step, []

    def compared(*given: Any) -> dict[str, float]:
        found = step(*given)
        last, learnt = run.work.last, run.retriever.log_temperature
        assert last is not None
        again = learnt.detach().clone().requires_grad_()
        there = last.embedded(last.rollouts.embeddings)
        ranking.info_nce(stage, last.asked.comparison, there, again.exp())[0].backward()
        gaps.append((learnt.grad - again.grad).abs().item())
        return found

    run.work.step = compared
    run.train()
    assert len(gaps) == 4 and max(gaps) < 1e-6
    learnt = [step["infonce_temperature"] for step in run.log]
    assert learnt[0] == pytest.approx(stage.infonce_temperature) and len(set(learnt)) == 3
    # the first step is warm-up's, of a learning rate of 0


def test_a_loss_that_is_no_number_stops_the_stage_and_no_model_is_written(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Found by audit: lr 1e38 "ended normally", and a model of NaN was saved and evaluated."""
    stage = replace(INFO_NCE, learning_rate=1e38, max_grad_norm=0.0)
    run = Stage(checkpoint, corpus, stage, tmp_path, steps=6)
    with pytest.raises(RunError, match=r"stage 3: loss must be finite, got nan at step \d"):
        run.train()
    with pytest.raises(RunError, match="weights must be finite, got NaN or inf in"):
        run.loop.whole_weights()
    with pytest.raises(RunError, match="weights must be finite"):
        run.loop.save()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_guards_speak_by_name() -> None:
    said: list[str] = []
    guards = Guards("stage 3", POLICY, said.append)
    for step in range(PATIENCE - 1):
        guards.watch(step, {"loss": 1.0, "frac_no_ret": 1.0, "frac_zero_std": 1.0, "kl": 11.0})
    assert not said
    with pytest.raises(RunError, match=r"stage 3: frac_no_ret is over 0.9 for 8 steps, 1.00 now"):
        guards.watch(PATIENCE, {"loss": 1.0, "frac_no_ret": 1.0})
    guards = Guards("stage 3", replace(POLICY, infonce=1.0), said.append)
    for step in range(2 * PATIENCE):
        guards.watch(step, {"loss": 1.0, "frac_no_ret": 1.0, "frac_zero_std": 1.0, "kl": 11.0})
    assert [re.sub(" .*", "", line.removeprefix("stage 3: ")) for line in said] == [
        "frac_no_ret", "rewards", "kl",
    ]  # fmt: skip
    assert set(guards.said) == {"frac_no_ret", "frac_zero_std", "kl"}


def test_a_policy_whose_summaries_never_end_is_stopped(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Found by audit: stage 3 of the paper's recipes trained nothing, silently."""
    endless = Retriever.load(checkpoint)
    head = endless.plain.lm_head
    # No longer the embeddings: every token is as likely, so that a summary hardly ever ends.
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    endless.model.config.tie_word_embeddings = False
    endless.save(tmp_path / "endless")
    (tmp_path / "endless" / "elva.json").unlink()
    stage = replace(POLICY, max_completion_length=2)
    run = Stage(tmp_path / "endless", corpus, stage, tmp_path, steps=PATIENCE + 1)
    with pytest.raises(RunError, match=r"frac_no_ret is over 0.9 for 8 steps.*nothing is trained"):
        run.train()


def test_rewards_that_do_not_vary_are_named_and_train_nothing(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """A temperature at which a group's rollouts are all the same: no advantage, no step."""
    stage = replace(POLICY, temperature=1e-7, beta=0.0)
    run = Stage(checkpoint, corpus, stage, tmp_path, steps=PATIENCE + 2).train()
    assert [step["frac_zero_std"] for step in run.log] == [1.0] * (PATIENCE + 2)
    line = f"stage 3: rewards do not vary for {PATIENCE} steps: the policy gradient is zero"
    assert run.said == [line] and run.moved == 0.0


def test_a_kl_that_runs_away_is_named(corpus: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A model whose words are far from those of the stage's start: as if it had run away there."""
    stage = replace(POLICY, learning_rate=1e-6)
    run = Stage(checkpoint, corpus, stage, tmp_path, steps=PATIENCE + 2)
    assert run.work.tokens.reference is not None
    with torch.no_grad():
        run.work.tokens.reference.plain.lm_head.weight.mul_(-20.0)
    run.train()
    high = [step["kl"] > RUNAWAY_KL for step in run.log]
    assert all(high)
    told = [line for line in run.said if "kl is over" in line]
    assert told == [
        f"stage 3: kl is over 10 nats a token for {PATIENCE} steps; lower the learning_rate or "
        "raise beta"
    ]


def test_sources_are_named_in_their_order() -> None:
    assert SOURCES == ("given", "mined", "random", "in_batch")


@pytest.mark.thorough
@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_summaries_shrink_to_nothing_without_an_anchor(
    anchor: float, released: Released, corpus: Path, tmp_path: Path
) -> None:
    """InfoNCE alone leaves the words of a summary to drift: measured, they vanish."""
    stage = replace(
        INFO_NCE, tasks={}, ret=1.0, anchor=anchor, batch_size=24, learning_rate=1e-3,
        lora=LoraSettings(128, 256), max_completion_length=16,
    )  # fmt: skip
    run = Stage(released("untied"), corpus, stage, tmp_path, steps=120).train()
    length = np.mean([step["completion_length"] for step in run.log[-10:]])
    assert length < 1.5 if anchor == 0 else length > 3, length
