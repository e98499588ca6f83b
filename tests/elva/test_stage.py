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

import elva_kernels
from elva.data import Item, load
from elva.errors import RunError, UserError
from elva.model.retriever import Retriever
from elva.recipe import LoraSettings, NegativeConfig, RewardConfig, StageConfig
from elva.training import ranking
from elva.training.comparison import SOURCES, Comparison, compare
from elva.training.examples import Examples
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


@pytest.mark.parametrize(
    "changes", [{}, {"negatives": NegativeConfig(given=2)}, {"pathwise": 1.0, "infonce": 0.0}],
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
