"""The reference against the equations written out in plain Python, and its own edges."""

import math
import textwrap

import pytest
import torch

from elva_kernels import ranking_reward, ranking_reward_and_grad, reference, reward_from_scores
from elva_kernels.reference import Weights
from tests.tolerances import REWARD, SCORE

WEIGHTS = {"margin": 0.1, "rank_penalty": 0.02, "w_margin": 0.4, "w_rank": 0.6}


def by_hand(query, positive, negatives, live, *, margin, rank_penalty, w_margin, w_rank):
    """Eq. 1 to 5 for one group, with sorting and loops; returns reward, rank and scores."""

    def cosine(a, b):
        norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0

    scores = [cosine(query, c) for c in (positive, *negatives)]
    candidates = [0] + [i + 1 for i, is_live in enumerate(live) if is_live]
    # The positive, candidate 0, comes after its ties; negatives stand in their own order.
    ranking = sorted(candidates, key=lambda i: (-scores[i], i if i else len(scores)))
    rank = 1 + ranking.index(0)
    rivals = [scores[i] for i in candidates[1:]]
    margin_reward = max(0.0, scores[0] - max(rivals) - margin) if rivals else 0.0
    rank_reward = scores[0] / (1 + math.log(rank))
    for place, i in enumerate(ranking, start=1):
        if i != 0:
            rank_reward -= rank_penalty * scores[i] * (math.log(place) - 1)
    return w_margin * margin_reward + w_rank * rank_reward, rank, scores


@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 1), (6, 4), (40, 17)])
@pytest.mark.parametrize("margin", [0.1, -1.0])
@pytest.mark.parametrize("entries", ["real", "ties"])
def test_agrees_with_loops(n, d, margin, entries):
    weights = WEIGHTS | {"margin": margin}
    for seed in range(5):
        torch.manual_seed(seed)
        if entries == "real":
            rows = torch.randn(n + 2, d, dtype=torch.float64)
        else:
            rows = torch.randint(-1, 2, (n + 2, d)).double()
        live = torch.rand(n) < 0.7
        result = reference.ranking_reward(rows[0], rows[1], rows[2:], live, Weights(**weights))
        reward, rank, scores = by_hand(
            rows[0].tolist(), rows[1].tolist(), rows[2:].tolist(), live.tolist(), **weights
        )
        expected = torch.tensor(scores, dtype=torch.float64)
        expected[1:][~live] = -torch.inf
        torch.testing.assert_close(result.scores, expected, rtol=0, atol=1e-14)
        if entries == "real":  # the loops' ties are decided by their own rounding
            assert result.rank.item() == rank
            assert result.reward.item() == pytest.approx(reward, abs=1e-13)


def test_ties_go_against_the_positive_and_by_index_among_negatives():
    scores = torch.tensor([0.5, 0.5, 0.9, 0.5, -0.0, 0.0], dtype=torch.float64)
    result = reference.reward_from_scores(scores, None, Weights(**WEIGHTS))
    assert result.rank.item() == 4  # 0.9, 0.5 (1), 0.5 (3), then the positive
    penalty = sum(
        s * (math.log(k) - 1) for s, k in [(0.5, 2), (0.9, 1), (0.5, 3), (0.0, 5), (0.0, 6)]
    )
    assert result.rank_reward.item() == pytest.approx(
        0.5 / (1 + math.log(4)) - 0.02 * penalty, abs=1e-15
    )


def test_penalty_weights_sum_to_the_documented_value():
    n = 100
    scores = torch.ones(n + 1, dtype=torch.float64)
    scores[0] = 2.0  # first, so the negatives hold ranks 2..N+1
    result = reference.reward_from_scores(
        scores, None, Weights(margin=0.0, rank_penalty=1.0, w_margin=0.0, w_rank=1.0)
    )
    weights = 2.0 - result.reward.item()
    assert weights == pytest.approx(math.lgamma(n + 2) - n, rel=1e-12)
    assert weights == pytest.approx(268, abs=0.5)


@pytest.mark.parametrize("rank_temperature", [0.0, 0.03])
def test_gradcheck(rank_temperature):
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(2, 5), (2, 5), (2, 4, 5)]
    ]
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    weights = WEIGHTS | {"margin": -1.0, "rank_temperature": rank_temperature}

    def reward(*inputs):
        return reference.ranking_reward(*inputs, mask, Weights(**weights)).reward

    assert torch.autograd.gradcheck(reward, inputs)


def test_soft_ranks_tend_to_the_integer_ones():
    scores = torch.tensor([[0.3, 0.5, 0.1, 0.9, 0.2]], dtype=torch.float64)
    hard = reference.reward_from_scores(scores, None, Weights(**WEIGHTS))
    soft = reference.reward_from_scores(scores, None, Weights(**WEIGHTS, rank_temperature=1e-3))
    torch.testing.assert_close(soft.reward, hard.reward, rtol=0, atol=1e-12)
    assert torch.equal(soft.rank, hard.rank)


def test_soft_ranks_see_a_swap_that_integer_ranks_do_not():
    scores = torch.tensor([0.50, 0.51], dtype=torch.float64, requires_grad=True)
    weights = {"margin": 0.0, "rank_penalty": 0.0, "w_margin": 0.0, "w_rank": 1.0}
    for temperature, seen in [(0.0, False), (0.05, True)]:
        reward = reference.reward_from_scores(
            scores, None, Weights(**weights, rank_temperature=temperature)
        ).reward
        (grad,) = torch.autograd.grad(reward, scores)
        assert (grad[1] != 0) == seen
        assert (grad[1] < 0) == seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_steps_are_exact(dtype):
    """The prescale's powers are exact, so scaled rows keep their mantissas."""
    info = torch.finfo(dtype)
    exponents = torch.arange(round(math.log2(info.smallest_normal)), round(math.log2(info.max)))
    powers = torch.exp2(exponents.to(dtype))
    mantissa, exponent = torch.frexp(powers)
    assert (mantissa == 0.5).all()
    assert torch.equal(exponent.long(), exponents + 1)


def test_parallel_rows_of_extreme_magnitude_score_one():
    for small, large in [(1e-20, 1e20), (1e-40, 3e38), (1e-45, 1.0)]:
        query, candidate = torch.full((8,), small), torch.full((8,), large)
        scores = reference.cosine_scores(query, candidate, candidate.unsqueeze(0), None)
        torch.testing.assert_close(scores, torch.ones(2), rtol=0, atol=SCORE[torch.float32])


def test_documented_equivalent_is_equivalent():
    """The snippet under "Equivalent to" in the docstring, run as it is printed."""
    snippet = textwrap.dedent(ranking_reward.__doc__.split("Equivalent to::")[1])
    inputs = {
        "query": torch.randn(4, 16, dtype=torch.float64),
        "positive": torch.randn(4, 16, dtype=torch.float64),
        "negatives": torch.randn(4, 9, 16, dtype=torch.float64),
    }
    names = {"torch": torch, "N": 9, **inputs, **WEIGHTS}
    exec(snippet, names)
    result = ranking_reward(**inputs, **WEIGHTS)
    assert torch.equal(names["rank"], result.rank)
    for name in ("scores", "margin_reward", "rank_reward", "reward"):
        # torch's logarithm of an integer, and so the snippet's, is float32.
        close = {"rtol": 0, "atol": REWARD[torch.float32]}
        torch.testing.assert_close(names[name], getattr(result, name), **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_soft_ranks_through_the_public_functions(dtype):
    inputs = [torch.randn(shape, dtype=dtype) for shape in [(3, 8), (3, 8), (3, 5, 8)]]
    mask = torch.rand(3, 5) < 0.7
    options = WEIGHTS | {"rank_temperature": 0.1, "mask": mask}
    result, *gradients = ranking_reward_and_grad(*inputs, **options)
    leaves = [x.double().requires_grad_() for x in inputs]
    truth = ranking_reward(*leaves, **options).reward
    truth.sum().backward()
    torch.testing.assert_close(result.reward.double(), truth, rtol=0, atol=1e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.dtype == dtype
        close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(gradient.double(), leaf.grad, **close)
    soft = reward_from_scores(result.scores, **options)
    torch.testing.assert_close(soft.reward, result.reward, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rank_temperature", [1e-6, 1e6])
def test_extreme_temperatures_stay_finite(rank_temperature):
    scores = torch.tensor([0.5, 0.5, 1.0, -1.0], requires_grad=True)
    reward = reward_from_scores(scores, rank_temperature=rank_temperature).reward
    reward.backward()
    assert reward.isfinite()
    assert scores.grad.isfinite().all()


class TestGroupAdvantages:
    def test_equals_the_formula(self):
        reward = torch.randn(5, 8)
        expected = (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-4)
        actual = reference.group_advantages(reward, scale="std", std_eps=1e-4)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)

    def test_scales(self):
        reward = torch.randn(5, 8, dtype=torch.float64)
        centred = reward - reward.mean(-1, keepdim=True)
        batch = reference.group_advantages(reward, scale="batch", std_eps=0.0)
        torch.testing.assert_close(batch, centred / reward.std(), rtol=0, atol=1e-14)
        none = reference.group_advantages(reward, scale="none", std_eps=1.0)
        torch.testing.assert_close(none, centred, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("scale", ["std", "batch", "none"])
    def test_edges(self, scale):
        def advantages(rows):
            return reference.group_advantages(torch.tensor(rows), scale=scale, std_eps=1e-4)

        assert torch.equal(advantages([[3.0], [4.0]]), torch.zeros(2, 1))
        nearly = torch.tensor([[1.0, 1.0 + 5e-7, 1.0], [1.0, 2.0, 3.0]])
        assert torch.equal(
            reference.group_advantages(nearly, scale=scale, std_eps=0.0)[0], torch.zeros(3)
        )
        clean = advantages([[1.0, 2.0], [3.0, 5.0]])
        for bad in (math.nan, math.inf):
            mixed = advantages([[1.0, 2.0], [bad, 0.0], [3.0, 5.0]])
            assert torch.isnan(mixed[1]).all()
            assert torch.equal(mixed[[0, 2]], clean)
        assert advantages([[1e38, -1e38]]).isfinite().all()
        empty = reference.group_advantages(torch.empty(0, 4), scale=scale, std_eps=1e-4)
        assert empty.shape == (0, 4)
