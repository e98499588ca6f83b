"""What a report draws of embeddings, beside independent computations, and its intervals."""

import numpy as np
import pytest
import torch

from elva.data import Grain, Query
from elva.evaluation.intervals import mean_interval, paired_interval, sign_test
from elva.evaluation.portrait import grains_of, plane, pushes, spread
from elva.recipe import RewardConfig, StageConfig
from elva_kernels.reference import reward as reference

TEMPERATURE = 0.1


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


# -- the plane -------------------------------------------------------------------------------------


def test_the_plane_is_that_of_the_covariances_largest_eigenvectors() -> None:
    embeddings = rows(80, 0) * torch.linspace(3, 0.1, 16)
    points, explained = plane(embeddings)
    unit = torch.nn.functional.normalize(embeddings.double())
    values, vectors = torch.linalg.eigh(torch.cov(unit.T))
    share = values.flip(0)[:2] / values.sum()
    torch.testing.assert_close(torch.tensor(explained, dtype=torch.float64), share)
    expected = (unit - unit.mean(0)) @ vectors.flip(1)[:, :2]
    torch.testing.assert_close(points.abs(), expected.abs(), atol=1e-10, rtol=0)


def test_the_plane_does_not_depend_on_lengths_and_turns_the_same_way() -> None:
    embeddings = rows(20, 1)
    points, _ = plane(embeddings * torch.linspace(0.1, 9, 20)[:, None])
    torch.testing.assert_close(points, plane(embeddings)[0], atol=1e-6, rtol=0)
    assert plane(torch.ones(4, 16))[1] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_rows_are_spread_evenly() -> None:
    assert spread(np.arange(10), 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(np.arange(3), 5).tolist() == [0, 1, 2]


def test_a_candidate_has_the_grains_of_the_first_query_that_it_answers() -> None:
    def query(id: str, positives: tuple[str, ...], *grains: Grain) -> Query:
        return Query(
            id, "a red cat", None, "text", "Find it.", "t2i", positives, grains=grains or None,
            raw_text="a red cat",
        )  # fmt: skip

    colour, entity = Grain("red", "colour", (2, 5)), Grain("cat", "entity", (6, 9))
    found = grains_of([query("7:1", ("7:3",)), query("7:2", ("7:3", "7:4"), colour, entity),
                       query("7:5", ("7:4",), entity)])  # fmt: skip
    assert found == {"7:3": {"colour": "red", "entity": "cat"}} | {
        "7:4": {"colour": "red", "entity": "cat"}
    }


# -- pushes ----------------------------------------------------------------------------------------


def test_pushes_are_the_gradients_of_both_losses_on_the_scores() -> None:
    """InfoNCE's and the reward's written out over a matrix of scores, by autograd."""
    query, pool = rows(12, 2), rows(40, 3)
    positives = [[i, i + 20] if i % 3 else [i] for i in range(11)] + [[]]
    identities = np.arange(40)
    identities[39] = 0  # a copy of the first query's answer
    stage = StageConfig(
        infonce_temperature=TEMPERATURE, reward=RewardConfig(rank_temperature=0.05, w_margin=0.3)
    )
    found = pushes(query, pool, positives, identities, stage)
    assert found is not None and (found["queries"], found["temperature"]) == (11, TEMPERATURE)
    cosine = torch.cosine_similarity(query[:, None].double(), pool[None].double(), dim=-1)
    infonce, reward = [], []
    for i, some in enumerate(positives[:11]):
        left_out = {*some, *([39] if i == 0 else [])}
        negatives = [j for j in range(40) if j not in left_out]
        scores = torch.cat([cosine[i, some[:1]], cosine[i, negatives]]).requires_grad_()
        order = scores[1:].argsort(descending=True) + 1
        loss = torch.logsumexp(scores / TEMPERATURE, 0) - scores[0] / TEMPERATURE
        (pull,) = torch.autograd.grad(loss, scores)
        infonce.append((pull / pull[1:].sum())[order])
        (pull,) = torch.autograd.grad(-soft_reward(scores, stage.reward), scores)
        reward.append((pull / pull[1:].abs().sum())[order])
    for name, by_query in (("infonce", infonce), ("reward", reward)):
        shortest = min(map(len, by_query))
        expected = torch.stack([one[:shortest] for one in by_query]).mean(0)
        given = torch.tensor(found[name][:shortest], dtype=torch.float64)
        torch.testing.assert_close(given, expected, atol=2e-5, rtol=0)


def soft_reward(scores: torch.Tensor, reward: RewardConfig) -> torch.Tensor:
    """By autograd through the reference's formulas, in float64."""
    weights = reference.Weights(
        reward.margin, reward.rank_penalty, reward.w_margin, reward.w_rank, reward.rank_temperature
    )
    return reference.reward_from_scores(scores[None], None, weights).reward.sum()


def test_nothing_is_pushed_without_a_positive_or_a_negative() -> None:
    stage = StageConfig()
    assert pushes(rows(2, 4), rows(3, 5), [[], []], np.arange(3), stage) is None
    assert pushes(rows(1, 4), rows(1, 5), [[0]], np.arange(1), stage) is None
    assert pushes(rows(1, 4), rows(2, 5), [[0, 1]], np.arange(2), stage) is None


# -- intervals -------------------------------------------------------------------------------------


def test_an_interval_is_the_percentile_bootstraps() -> None:
    """Of rows drawn with replacement one by one, by another generator: to three standard errors."""
    values = np.array([1.0] * 40 + [0.0] * 50 + [-1.0] * 10)
    drawn = np.random.default_rng(0).choice(values, (10_000, 100)).mean(1)
    found = mean_interval(values.tolist())
    assert found.mean == pytest.approx(0.3) and found.queries == 100
    for given, quantile in ((found.low, 0.025), (found.high, 0.975)):
        assert given == pytest.approx(np.quantile(drawn, quantile), abs=0.011)


def test_paired_values_have_the_interval_of_their_differences() -> None:
    theirs = [float(i % 2) for i in range(200)]
    ours = [1.0 if i < 20 else x for i, x in enumerate(theirs)]
    apart = paired_interval(ours, theirs)
    assert apart == mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])
    assert apart.mean == pytest.approx(0.05) and 0 < apart.low < apart.high < 0.1
    alone = mean_interval(ours)
    assert apart.high - apart.low < alone.high - alone.low


def test_the_sign_test_is_the_binomials() -> None:
    """Of 20 tosses 15 or more of one side: 2 x 21700 / 2^20, counted by hand."""
    ours, theirs = [1.0] * 15 + [0.0] * 5 + [1.0] * 9, [0.0] * 15 + [1.0] * 5 + [1.0] * 9
    assert sign_test(ours, theirs) == (15, 5, pytest.approx(2 * 21700 / 2**20, abs=1e-9))
    assert sign_test(theirs, ours) == (5, 15, sign_test(ours, theirs).p)
    assert sign_test([1.0, 0.0], [0.0, 1.0]).p == sign_test([1.0], [1.0]).p == 1.0
    drawn = np.random.default_rng(0).binomial(5000, 0.5, 400_000)
    many = sign_test([1.0] * 2570 + [0.0] * 2430, [0.0] * 2570 + [1.0] * 2430)
    assert many.p == pytest.approx((abs(drawn - 2500) >= 70).mean(), rel=0.03)


def test_the_same_values_give_the_same_interval_and_equal_ones_none() -> None:
    assert mean_interval([1.0, 0.0] * 9) == mean_interval([0.0, 1.0] * 9)
    assert mean_interval([0.25] * 7) == (0.25, 0.25, 0.25, 7)
