"""Rewards of rollouts: equal to plain loops, over texts, rows of a bank and several processes."""

import json
import math
import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elva_kernels
from elva.errors import UserError
from elva.integrations import rewards
from elva.integrations.rewards import RECIPES, Candidates
from elva.integrations.rollouts import RolloutReward, Together


def loop(scores, positives, negatives, temperature):
    """One rollout's share and gap as RL code on embedders has them: a list, a number at a time.

    Candidates by score descending, of equal ones the negatives first.
    """
    if not positives or not negatives:
        return math.nan, math.nan
    order = sorted(positives + negatives, key=lambda j: (-scores[j].item(), j in positives))
    share = sum(j in positives for j in order[: len(positives)]) / len(positives)
    mean = sum(scores[j].item() for j in positives) / len(positives)
    weights = [
        1.0 if temperature is None else math.exp(scores[j].item() / temperature) for j in negatives
    ]
    hard = sum(w * scores[j].item() for w, j in zip(weights, negatives, strict=True)) / sum(weights)
    return share, mean - hard


@st.composite
def batches(draw):
    """Embeddings of few values, so that scores tie, with several positives, some without any."""
    rollouts, rows = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    number = st.integers(0, 1).map(float)  # no cancellation: ties are ties in any arithmetic
    vector = st.lists(number, min_size=3, max_size=3).filter(any)
    query = torch.tensor(draw(st.lists(vector, min_size=rollouts, max_size=rollouts)))
    candidates = torch.tensor(draw(st.lists(vector, min_size=rows, max_size=rows)))
    sets = st.lists(st.integers(0, rows - 1), max_size=3, unique=True)
    positives = [draw(sets) for _ in range(rollouts)]
    given_ = draw(st.booleans())
    negatives = [draw(sets) if given_ else list(range(rows)) for _ in range(rollouts)]
    return query.double(), candidates.double(), positives, negatives, given_


def filled(lists, width=3):
    return torch.tensor([x + [-1] * (max(width, *map(len, lists)) - len(x)) for x in lists])


@settings(max_examples=60)
@given(batches(), st.sampled_from([None, 0.05, 0.5]))
def test_other_papers_rewards_are_a_plain_loops(batch, temperature):
    query, rows, positives, negatives, given_ = batch
    candidates = Candidates(rows, filled(positives), filled(negatives) if given_ else None)
    if temperature is None:
        found = rewards.ume_r1(query, candidates)
    else:
        found = rewards.embed_rl(query, candidates, temperature=temperature)
    every = torch.arange(len(rows)).expand(len(query), -1)
    scores = rewards.rank(query, Candidates(rows, every)).positive_scores  # so that ties are theirs
    close = torch.cosine_similarity(query[:, None], rows, dim=-1)
    torch.testing.assert_close(scores, close, rtol=0, atol=1e-14)
    for i, (own, others) in enumerate(zip(positives, negatives, strict=True)):
        share, gap = loop(scores[i], own, [j for j in others if j not in own], temperature)
        wanted = torch.tensor([share * gap, share, gap], dtype=torch.float64)
        got = torch.stack([x[i] for x in found.values()])
        if math.isnan(gap):
            assert got[0].isnan()
        else:
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


@settings(max_examples=60)
@given(batches())
def test_ranking_is_the_mean_of_the_kernels_rewards(batch):
    query, rows, positives, negatives, given_ = batch
    found = rewards.ranking(
        query, Candidates(rows, filled(positives), filled(negatives) if given_ else None),
        margin=0.05, w_rank=0.7,
    )  # fmt: skip
    for i, (own, others) in enumerate(zip(positives, negatives, strict=True)):
        others = [j for j in others if j not in own]
        if not own or not others:
            assert all(part[i].isnan() for part in found.values())
            continue
        each = [
            elva_kernels.ranking_reward(query[i], rows[j], rows[others], margin=0.05, w_rank=0.7)
            for j in own
        ]
        mean = sum(x.reward.item() for x in each) / len(each)
        assert found["reward"][i].item() == pytest.approx(mean, rel=0, abs=1e-13)
        assert found["rank"][i].item() == min(x.rank.item() for x in each)


WORDS = ["red", "green", "blue", "grey", "pink", "gold"]
TABLE = torch.randn(len(WORDS), 8, generator=torch.Generator().manual_seed(0))


def embed(texts):
    """Mean of the words' vectors."""
    return torch.stack([TABLE[[WORDS.index(x) for x in text.split()]].mean(0) for text in texts])


ROLLOUTS = ["red red green", "blue", "green grey", "pink gold"]
POSITIVES = ["red", "blue", ["green", "grey"], "pink"]
PAIRS = [["red green", "gold"], ["grey", "red", "blue"], ["pink"], ["gold", "red"]]


def by_hand(rollouts, positives, negatives):
    values = []
    for text, own, others in zip(rollouts, positives, negatives, strict=True):
        own = [own] if isinstance(own, str) else own
        others = embed([x for x in others if x not in own])
        each = [elva_kernels.ranking_reward(embed([text])[0], embed([x])[0], others) for x in own]
        values.append(sum(x.reward.item() for x in each) / len(each))
    return values


def test_texts_are_ranked_among_given_negatives():
    found = RolloutReward(embed).score(ROLLOUTS, POSITIVES, PAIRS)
    assert found["reward"] == pytest.approx(by_hand(ROLLOUTS, POSITIVES, PAIRS), abs=1e-6)
    assert found["rank"] == [2, 1, 1, 3]


def test_texts_are_ranked_among_the_batchs_positives():
    """A positive of two rows is one candidate, and of neither a negative."""
    texts, positives = [*ROLLOUTS, "red grey"], [*POSITIVES, "red"]
    every = ["red", "blue", "green", "grey", "pink"]
    found = RolloutReward(embed).score(texts, positives)
    assert found["reward"] == pytest.approx(by_hand(texts, positives, [every] * 5), abs=1e-6)


def test_rows_of_a_bank_are_the_texts_they_embed():
    """In half precision too; without given negatives all its rows are compared."""
    rows = [[WORDS.index(x) for x in ([own] if isinstance(own, str) else own)] for own in POSITIVES]
    pairs = [["gold"], ["grey", "red"], ["pink"], ["gold", "red"]]
    numbers = [[WORDS.index(x) for x in others] for others in pairs]
    bank = embed(WORDS)
    of_bank = RolloutReward(embed, bank=bank)
    assert of_bank.score(ROLLOUTS, rows, numbers) == RolloutReward(embed).score(
        ROLLOUTS, POSITIVES, pairs
    )
    assert of_bank.score(ROLLOUTS, rows)["reward"] == pytest.approx(
        by_hand(ROLLOUTS, POSITIVES, [WORDS] * 4), abs=1e-6
    )
    tensors = [torch.tensor(x) for x in numbers]  # as `datasets` with a format hands them on
    of_tensors = RolloutReward(embed, bank=bank.numpy()).score(
        ROLLOUTS, [torch.tensor(x) for x in rows], [tensors[0], tensors[1].numpy(), *tensors[2:]]
    )
    assert of_tensors == of_bank.score(ROLLOUTS, rows, numbers)
    half = RolloutReward(embed, bank=bank.half()).score(ROLLOUTS, rows, numbers)
    assert half["reward"] == pytest.approx(
        of_bank.score(ROLLOUTS, rows, numbers)["reward"], abs=2e-3
    )


def test_nothing_to_rank_is_none():
    found = RolloutReward(embed).score(
        ROLLOUTS, ["red", None, [], "pink"], [["gold"], ["red"], ["red"], None]
    )
    assert [x is None for x in found["reward"]] == [False, True, True, True]
    alone = RolloutReward(embed, reward="ume_r1").score(["red", "blue"], ["red", "red"])
    assert alone["reward"] == [None, None]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RolloutReward(embed, reward="rank"), "reward must be one of ranking, ume_r1, emb"),
        (lambda: RolloutReward(embed, marign=1), "unexpected keyword argument 'marign'"),
        (lambda: RolloutReward(embed, margin=-3.0), "margin must be in [-2, 2], got -3.0"),
        (lambda: RolloutReward(embed, reward="embed_rl", temperature=0), "must be positive"),
        (lambda: RolloutReward(embed, reward=lambda *_: 1.0), "must return a dict with 'reward'"),
        (lambda: RolloutReward(embed).score(["red"], [[{}]]), "must be texts, names of files or"),
        (lambda: RolloutReward(embed).score(["red"], [{"text": "red"}]), "got {'text': 'red'}; ta"),
        (lambda: RolloutReward(embed).score(["red"], [b"red"]), "must be texts, names of files or"),
        (lambda: RolloutReward(embed).score(["red"] * 2, ["red"]), "positives must be of 2 rollou"),
        (
            lambda: RolloutReward(embed).score(["red"] * 2, ["red"] * 2, [["blue"]]),
            "negatives must be of 2 rollouts, got 1",
        ),
        (lambda: RolloutReward(lambda _: None).score(["a"], ["b"]), "floating, got NoneType"),
        (lambda: RolloutReward(lambda _: [*TABLE]).score(["a"], ["b"]), "floating, got list"),
        (lambda: RolloutReward(embed, bank=torch.eye(2).long()), "bank must be [M, D] floating"),
        (lambda: RolloutReward(lambda _: torch.eye(2)).score(["a"], ["b"]), "must return [1, D]"),
        (lambda: RolloutReward(lambda _: TABLE[:1] / 0).score(["a"], ["b"]), "NaN or inf for 'a'"),
        (lambda: RolloutReward(embed, bank=TABLE).score(["red"], [6]), "row of the bank, from 0 "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(make, said):
    with pytest.raises(UserError) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_rollouts_that_wait_are_scored_together():
    """One call for those that came during another; what is wrong with one fails it alone."""
    sizes, began, go = [], threading.Event(), threading.Event()

    def slow(texts):
        sizes.append(len(texts))
        began.set()
        go.wait()
        return embed(texts)

    together = Together(RolloutReward(slow, candidate_fn=embed))
    first = together("red", "red", ["gold"])
    began.wait()
    results = [together(*row) for row in zip(ROLLOUTS, POSITIVES, PAIRS, strict=True)]
    go.set()
    assert first.result()["rank"] == 1
    expected = by_hand(ROLLOUTS, POSITIVES, PAIRS)
    assert [x.result()["reward"] for x in results] == pytest.approx(expected, abs=1e-6)
    assert sizes == [1, 4]
    go.clear()
    began.clear()
    together("red", "red", ["gold"])
    began.wait()
    bad, good = together("red", "red", None), together("blue", "blue", ["red"])
    go.set()
    with pytest.raises(UserError, match="must have negatives, got None"):
        bad.result()
    assert good.result()["rank"] == 1


def test_a_rollout_that_is_given_up_stops_no_other():
    """Given up while it waits, or while it is scored, as a trainer's time limit does it."""
    began, go = threading.Event(), threading.Event()

    def slow(texts):
        began.set()
        go.wait()
        return embed(texts)

    together = Together(RolloutReward(slow, candidate_fn=embed))
    running, waiting = (together("red", "red", ["gold"]) for _ in range(2))
    began.wait()
    assert waiting.cancel() or running.cancel() is False
    go.set()
    assert together("blue", "blue", ["red"]).result(timeout=30)["rank"] == 1


ONE_PROCESS = f"""
import json, sys, torch
from accelerate import PartialState
from elva.integrations.rewards import RECIPES
from elva.integrations.trl import RankingReward

WORDS, TABLE = {WORDS}, torch.tensor({TABLE.tolist()})
def embed(texts):
    return torch.stack([TABLE[[WORDS.index(x) for x in t.split()]].mean(0) for t in texts])

state = PartialState(cpu=True)
texts, positives = json.loads(sys.argv[1])
mine = slice(3 * state.process_index, 3 * state.process_index + 3)
found = [RankingReward(embed, reward=x)(texts[mine], positive=positives[mine]) for x in RECIPES]
print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def test_in_batch_means_the_batch_of_every_process():
    """Two processes, one of which has a rollout without a positive, and a positive of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    texts, positives = [*ROLLOUTS, "red grey", "gold"], [*POSITIVES, "red", None]
    processes = []
    for index in range(2):
        place = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
            "RANK": str(index), "LOCAL_RANK": str(index), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        words = [sys.executable, "-c", ONE_PROCESS, json.dumps([texts, positives])]
        processes.append(
            subprocess.Popen(words, env=os.environ | place, stdout=subprocess.PIPE, text=True)
        )
    shares = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    for name, first, second in zip(RECIPES, *shares, strict=True):
        whole = RolloutReward(embed, reward=name).score(texts, positives)["reward"]
        assert whole[-1] is None and second[-1] is None
        assert first + second[:-1] == pytest.approx(whole[:-1], abs=1e-6)
