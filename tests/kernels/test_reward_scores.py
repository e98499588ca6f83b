"""The contract of `reward_from_scores` on every backend, and of `group_advantages`."""

import decimal
import math
from fractions import Fraction

import pytest
import torch

from elva_kernels import group_advantages, ranking_reward, reference, reward_from_scores
from elva_kernels.reference import Weights
from tests import tolerances
from tests.kernels.cases import (
    DTYPES,
    EVERY_LEVEL,
    OPEN_HINGE,
    SOFT_RANKS,
    WEIGHTS,
    embeddings,
    exact,
    layouts,
    relevance_of,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
each_backend = pytest.mark.parametrize("backend", EVERY_LEVEL, indirect=True)
each_ranks = pytest.mark.parametrize("weights", [WEIGHTS, SOFT_RANKS], ids=["hard", "soft"])
each_grade = pytest.mark.parametrize("graded", [False, True])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(1,), (5, 1), (4, 2), (2, 3, 9), (0, 4), (3, 101), (2, 1000)])
@pytest.mark.parametrize("masked", [False, True])
@each_grade
def test_values_and_gradients(backend, dtype, shape, masked, graded):
    scores = (torch.randn(shape) * 2).to(dtype)
    mask = torch.rand(*shape[:-1], shape[-1] - 1) < 0.7 if masked else None
    relevance = relevance_of(graded, *shape[:-1], shape[-1] - 1, dtype=dtype)
    weight = torch.randn(shape[:-1], dtype=reference.compute_dtype(dtype))
    for weights in (WEIGHTS, OPEN_HINGE, SOFT_RANKS):
        leaf = scores.clone().requires_grad_()
        options = {"mask": mask, "relevance": relevance, "backend": backend} | weights
        result = reward_from_scores(leaf, **options)
        result.reward.backward(weight)
        constants = (Weights(**weights), exact(relevance))
        right = reference.reward_from_scores(scores.double(), mask, *constants)
        assert torch.equal(result.rank, right.rank)
        assert torch.equal(result.scores.double(), right.scores)
        penalty = weights["rank_penalty"] * (math.lgamma(shape[-1] + 1) + shape[-1])
        if graded:  # the weights of the relevance in (4g)
            penalty += sum(1 / (1 + math.log(k)) for k in range(1, shape[-1]))
        largest = 1 + scores.double().abs().max() if scores.numel() else 1
        allowed = tolerances.REWARD[result.reward.dtype] * (3 + penalty) * largest
        for name in ("reward", "margin_reward", "rank_reward"):
            error = (getattr(result, name).double() - getattr(right, name)).abs()
            assert (error <= allowed).all()
        truth = reference.reward_from_scores_backward(
            scores.double(), mask, weight.double(), *constants
        )
        bound = tolerances.GRADIENT[dtype] + tolerances.half_ulp(truth, dtype)
        assert leaf.grad.dtype == dtype
        assert ((leaf.grad.double() - truth).abs() <= bound).all()
        if masked:
            assert (leaf.grad[..., 1:][~mask] == 0).all()


@each_backend
@each_dtype
@each_ranks
@each_grade
def test_agrees_with_ranking_reward_on_its_scores(backend, dtype, weights, graded):
    inputs = embeddings((6,), 30, 24, dtype)
    mask = torch.rand(6, 30) < 0.7
    relevance = relevance_of(graded, 6, 30, dtype=dtype)
    options = {"mask": mask, "relevance": relevance, "backend": backend} | weights
    result = ranking_reward(*inputs, **options)
    again = reward_from_scores(result.scores, **options)
    for a, b in zip(result, again, strict=True):
        assert same_bits(a, b)


@each_backend
@each_ranks
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_score_stays_in_its_group(backend, weights, bad):
    scores = torch.randn(5, 8)
    clean = scores.clone().requires_grad_()
    options = {"backend": backend} | weights
    expected = reward_from_scores(clean, **options)
    expected.reward.sum().backward()
    for place in (0, 3):
        dirty = scores.clone()
        dirty[2, place] = bad
        dirty.requires_grad_()
        result = reward_from_scores(dirty, **options)
        result.reward.sum().backward()
        others = [0, 1, 3, 4]
        for a, b in zip((*result, dirty.grad), (*expected, clean.grad), strict=True):
            assert same_bits(a[others], b[others])
        assert torch.isnan(result.reward[2])
        assert torch.isnan(dirty.grad[2]).all()
        if place == 0:
            assert result.rank[2] == 8
        hidden = torch.ones(5, 7, dtype=torch.bool)
        if place:
            hidden[2, place - 1] = False
            assert reward_from_scores(dirty, mask=hidden, **options).reward.isfinite().all()


@each_backend
@each_dtype
def test_layouts_and_shared_scores(backend, dtype):
    scores = torch.randn(4, 3, 11).to(dtype)
    expected = reward_from_scores(scores, backend=backend)
    for name, given in layouts(scores).items():
        for a, b in zip(reward_from_scores(given, backend=backend), expected, strict=True):
            assert same_bits(a, b), name
    mask = torch.rand(5, 11) < 0.8
    shared = torch.randn(12).to(dtype).requires_grad_()
    reward = reward_from_scores(shared, mask=mask, backend=backend).reward
    assert reward.shape == (5,)
    reward.sum().backward()
    truth = reference.reward_from_scores_backward(
        shared.detach().double(), mask, torch.ones(5, dtype=torch.float64), Weights(**WEIGHTS)
    )
    bound = 5 * tolerances.GRADIENT[dtype] + tolerances.half_ulp(truth, dtype)
    assert ((shared.grad.double() - truth).abs() <= bound).all()


@each_backend
def test_ties_and_signed_zeros(backend):
    scores = torch.tensor([[0.5, 0.5, 0.9, 0.5], [0.0, -0.0, 0.0, -1.0], [-0.0, 0.0, 1.0, -1.0]])
    result = reward_from_scores(scores, backend=backend)
    assert result.rank.tolist() == [4, 3, 3]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.05, 1.0, 1e6])
def test_soft_ranks_at_every_temperature(backend, dtype, temperature):
    """Apart, tied and nearly tied scores: no overflow; gradients to the bound over temperature."""
    scores = torch.stack([torch.randn(101), torch.full((101,), 0.5), torch.randn(101)]).to(dtype)
    scores[2, ::3] = scores[2, 0]
    scores[2, 1::3] = scores[2, 0] + torch.linspace(-4, 4, 34) * temperature
    weights = OPEN_HINGE | {"rank_temperature": temperature}
    leaf = scores.clone().requires_grad_()
    result = reward_from_scores(leaf, backend=backend, **weights)
    result.reward.sum().backward()
    right = reference.reward_from_scores(scores.double(), None, Weights(**weights))
    truth = reference.reward_from_scores_backward(
        scores.double(), None, torch.ones(3, dtype=torch.float64), Weights(**weights)
    )
    penalty = weights["rank_penalty"] * (math.lgamma(102) + 101)
    allowed = tolerances.REWARD[dtype] * (3 + penalty) * (1 + scores.abs().max())
    for name in ("reward", "margin_reward", "rank_reward"):
        assert ((getattr(result, name).double() - getattr(right, name)).abs() <= allowed).all()
    bound = tolerances.GRADIENT[dtype] * (1 + 1 / temperature) + tolerances.half_ulp(truth, dtype)
    assert ((leaf.grad.double() - truth).abs() <= bound).all()


@each_backend
def test_soft_ranks_of_one_candidate_and_of_ties_are_exact(backend):
    alone = reward_from_scores(torch.tensor([0.7]), backend=backend, rank_temperature=0.1)
    assert alone.rank_reward == torch.tensor(0.7)
    tied = torch.full((2, 5), 0.25)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 1:] = False
    weights = {"rank_penalty": 1.0, "rank_temperature": 0.1}
    rank_reward = reward_from_scores(tied, mask=mask, backend=backend, **weights).rank_reward
    for reward, rank, negatives in [(rank_reward[0], 3.0, 4), (rank_reward[1], 1.5, 1)]:
        expected = 0.25 / (1 + math.log(rank)) - negatives * 0.25 * (math.log(rank) - 1)
        torch.testing.assert_close(reward.item(), expected, rtol=0, atol=1e-7)


@each_backend
def test_soft_ranks_of_huge_scores_are_finite(backend):
    """Differences that overflow are as far apart as can be."""
    scores = torch.tensor([2e38, -3e38, 3e38, 1.0, 0.0], requires_grad=True)
    reward = reward_from_scores(scores, backend=backend, margin=0.0, rank_temperature=0.1).reward
    reward.backward()
    hard = reward_from_scores(scores.detach(), backend=backend, margin=0.0).reward
    torch.testing.assert_close(reward.detach(), hard, rtol=1e-6, atol=0)
    assert scores.grad.isfinite().all()


def exact_advantages(row, sample, std_eps, scale):
    """Of a group's rewards, with the deviation of `sample`: in rational numbers and 60 digits."""
    row, sample = ([Fraction(x) for x in values] for values in (row, sample))
    if max(row) - min(row) < Fraction(reference.SAME_REWARD):
        return [0.0] * len(row)
    divisor = Fraction(1)
    if scale != "none":
        mean = sum(sample) / len(sample)
        variance = sum((x - mean) ** 2 for x in sample) / (len(sample) - 1)
        digits = decimal.Context(prec=60)
        quotient = digits.divide(*map(decimal.Decimal, (variance.numerator, variance.denominator)))
        divisor = Fraction(digits.sqrt(quotient)) + Fraction(std_eps)
    return [float((x - sum(row) / len(row)) / divisor) for x in row]


class TestGroupAdvantages:
    @each_dtype
    def test_dtype_and_detachment(self, dtype):
        reward = torch.randn(3, 4).to(dtype).requires_grad_()
        advantages = group_advantages(reward)
        assert advantages.dtype == reference.compute_dtype(dtype)
        assert not advantages.requires_grad

    def test_default_is_the_groups_standard_deviation(self):
        reward = torch.randn(3, 4)
        assert same_bits(group_advantages(reward), group_advantages(reward, scale="std"))
        centred = reward - reward.mean(-1, keepdim=True)
        expected = centred / (reward.std(-1, keepdim=True) + 1e-4)
        torch.testing.assert_close(group_advantages(reward), expected, rtol=0, atol=1e-6)

    def test_sums_to_zero_and_follows_the_reward(self):
        advantages = group_advantages(torch.randn(50, 8) * 100)
        assert advantages.sum(-1).abs().max() < 1e-5
        reward = torch.randn(1, 8)
        assert torch.equal(group_advantages(reward).argsort(), reward.argsort())

    @each_dtype
    @pytest.mark.parametrize("scale", ["std", "batch", "none"])
    @pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 5, 8), (700, 33), (0, 4)], ids=str)
    def test_every_layout_follows_the_reference(self, dtype, scale, shape):
        wide = torch.randn(*shape, 2)
        if wide.shape[0] > 2:
            wide[0] = 0.25  # no difference: with (7,) one reward of the group
            wide[1, ..., 0] = torch.nan
        for reward in (wide[..., 0].to(dtype), wide[..., 1].to(dtype).contiguous()):
            advantages = group_advantages(reward, scale=scale, std_eps=0.01)
            expected = reference.group_advantages(reward.double(), scale=scale, std_eps=0.01)
            rtol = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(
                advantages.double(), expected, rtol=rtol, atol=rtol, equal_nan=True
            )

    @pytest.mark.parametrize("computed_by", ["cpu", "reference"])
    @pytest.mark.parametrize("scale", ["std", "batch", "none"])
    @pytest.mark.parametrize(
        "rows",
        [
            [[1e200, 2e200]],
            [[1e308, -1e308]],
            [[1.7e308, 1.6e308, 1.7e308]],
            [[1.7e308, -1e-300], [1.0, 2.0], [3e153, -3e154]],
            [[1e308, 1e308], [0.0, 1e308]],
        ],
        ids=str,
    )
    def test_the_largest_rewards_are_right(self, computed_by, scale, rows):
        op = torch.ops.elva_kernels.group_advantages.default
        for std_eps in (1e-4, 1e307):
            found = op(torch.tensor(rows, dtype=torch.float64), scale, std_eps, computed_by)
            for row, advantages in zip(rows, found, strict=True):
                sample = [x for y in rows for x in y] if scale == "batch" else row
                expected = exact_advantages(row, sample, std_eps, scale)
                torch.testing.assert_close(advantages.tolist(), expected, rtol=1e-14, atol=0)

    def test_is_the_same_on_any_number_of_threads(self):
        reward = torch.randn(5000, 8)
        reward[17, 3] = torch.inf
        threads = torch.get_num_threads()
        for scale in ("std", "batch"):
            torch.set_num_threads(1)
            alone = group_advantages(reward, scale=scale)
            torch.set_num_threads(3)
            together = group_advantages(reward, scale=scale)
            torch.set_num_threads(threads)
            assert same_bits(alone, together)
        assert alone[17].isnan().all() and alone[18].isfinite().all()

    def test_is_an_op_to_torch(self):
        op = torch.ops.elva_kernels.group_advantages.default
        for dtype in DTYPES:
            for backend in ("cpu", "reference"):
                torch.library.opcheck(op, (torch.randn(3, 4).to(dtype), "batch", 0.1, backend))
        compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
        reward = torch.randn(3, 4)
        assert same_bits(compiled(reward), group_advantages(reward))
