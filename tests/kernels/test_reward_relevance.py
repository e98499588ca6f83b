"""Negatives that are relevant themselves, on every backend: (3g) and (4g) of the reference."""

import math

import pytest
import torch

from elva_kernels import (
    RankingRewardLoss,
    ranking_reward,
    ranking_reward_and_grad,
    reference,
    reward_from_scores,
)
from elva_kernels.backends.launcher import Groups
from elva_kernels.backends.table import LAUNCHERS
from elva_kernels.reference import Weights
from tests import tolerances
from tests.kernels.cases import (
    DTYPES,
    EVERY_LEVEL,
    INTERPRETED,
    OPEN_HINGE,
    SOFT_RANKS,
    WEIGHTS,
    check_gradients,
    computing,
    embeddings,
    relevance_of,
    same_bits,
    truth_gradients,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
every_level = pytest.mark.parametrize("backend", EVERY_LEVEL, indirect=True)
of_scores = pytest.mark.parametrize(
    "backend", computing("reward_from_scores", EVERY_LEVEL), indirect=True
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_weights = pytest.mark.parametrize(
    "weights", [WEIGHTS, OPEN_HINGE, SOFT_RANKS], ids=["paper", "open", "soft"]
)
NONE = [math.nan, -1e-3, 1.001, math.inf, -math.inf]


def flat(results):
    """Values and gradients of a call as one list."""
    values, *gradients = results
    return [*values, *gradients]


def on_autograd(query, positive, negatives, **options):
    """The same by backward()."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, positive, negatives)]
    result = ranking_reward(*leaves, **options)
    result.reward.sum().backward()
    return tuple(x.detach() for x in result), *(x.grad for x in leaves)


@every_level
@each_dtype
@each_weights
@pytest.mark.parametrize("of_bank", [False, True])
def test_a_relevance_of_0_is_none_at_all(backend, dtype, weights, of_bank):
    query, positive, negatives = embeddings((4,), 9, 37, dtype)
    negatives[1, 2], negatives[2, 5] = positive[1], 0
    options = {"mask": torch.rand(4, 9) < 0.8, "backend": backend} | weights
    if of_bank:
        negatives = negatives.flatten(0, 1)
        options["negative_index"] = torch.randint(-1, 36, (4, 9))
    for call in (ranking_reward_and_grad, on_autograd):
        expected = flat(call(query, positive, negatives, **options))
        zeros = torch.zeros(9, dtype=torch.bfloat16)
        found = flat(call(query, positive, negatives, relevance=zeros, **options))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@every_level
@each_dtype
@each_weights
def test_rank_and_scores_do_not_depend_on_it(backend, dtype, weights):
    inputs, mask = embeddings((4,), 20, 33, dtype), torch.rand(4, 20) < 0.8
    options = {"mask": mask, "backend": backend} | weights
    plain = ranking_reward(*inputs, **options)
    graded = ranking_reward(*inputs, relevance=relevance_of(True, 4, 20), **options)
    assert same_bits(plain.rank, graded.rank)
    assert same_bits(plain.scores, graded.scores)
    assert not torch.equal(plain.reward, graded.reward)


def rows_at(*eighths, dtype):
    """Rows of +-1 whose cosines with a row of 16 ones are so many eighths, exactly."""
    rows = torch.ones(len(eighths), 16, dtype=dtype)
    for row, share in zip(rows, eighths, strict=True):
        row[: 8 - share] = -1
    return rows


@every_level
@each_dtype
def test_the_formula_by_hand(backend, dtype):
    """Ranks 1 and 2, 3, 4, 5; rivals 1/2, 7/16, 1/2, -3/8: the first of two equal ones."""
    query = torch.ones(16, dtype=dtype)
    positive, negatives = rows_at(7, dtype=dtype)[0], rows_at(6, 4, 4, -2, dtype=dtype)
    relevance = torch.tensor([1.0, 0.25, 0.0, 0.5])
    options = {"relevance": relevance, "margin": 0.25, "rank_penalty": 0.5, "backend": backend}
    result, _, _, gradient = ranking_reward_and_grad(
        query, positive, negatives, w_margin=1.0, w_rank=0.0, **options
    )
    assert result.scores.tolist() == [0.875, 0.75, 0.5, 0.5, -0.25]
    assert result.rank == 1
    assert result.margin_reward == 0.125
    logs = [math.log(k) for k in range(1, 6)]
    gain = 0.875 + 0.75 / (1 + logs[1]) + 0.125 / (1 + logs[2]) - 0.125 / (1 + logs[4])
    penalty = 0.375 * (logs[2] - 1) + 0.5 * (logs[3] - 1) - 0.125 * (logs[4] - 1)
    allowed = 4 * tolerances.REWARD[result.reward.dtype]
    assert abs(result.rank_reward.item() - (gain - 0.5 * penalty)) <= allowed
    # (q^ - s c^) / |c| of the hardest negative, whose slope is -1.
    expected = -(query.double() - 0.75 * negatives[0].double()) / 16
    error = (gradient[0].double() - expected).abs()
    assert (error <= tolerances.GRADIENT[dtype] + tolerances.half_ulp(expected, dtype)).all()
    assert (gradient[1:] == 0).all()


@every_level
@each_dtype
@pytest.mark.parametrize("n", [12, 100])
def test_open_hinges_have_the_rivals_of_the_truth(backend, dtype, n):
    """Of positives that lead by more than the margin; other rivals than by scores alone."""
    groups = 3 if INTERPRETED else 12
    inputs = embeddings((groups,), n, 256, dtype, signal=3.0)
    mask, relevance = torch.rand(groups, n) < 0.8, relevance_of(True, groups, n, dtype=dtype)
    relevance[:, -2:] = 1  # of those that are near to the query
    weights = {"margin": 0.2, "rank_penalty": 0.02, "w_margin": 2.0, "w_rank": 0.6}
    options = {"mask": mask, "relevance": relevance, "backend": backend} | weights
    weight = torch.linspace(-1, 1, groups, dtype=reference.compute_dtype(dtype))
    result, *gradients = ranking_reward_and_grad(*inputs, weight=weight, **options)
    scores = result.scores[:, 1:].double()
    rivals = scores - 0.2 * relevance.double()
    assert (rivals.argmax(-1) != scores.argmax(-1)).any()
    expected = result.scores[:, 0].double() - rivals.amax(-1) - 0.2
    assert (expected > 0).all()
    error = (result.margin_reward.double() - expected).abs()
    assert (error <= 2 * tolerances.REWARD[result.scores.dtype]).all()
    truths = truth_gradients(inputs, result.scores, mask, weight, relevance, **weights)
    check_gradients(gradients, truths, inputs, dtype)


@every_level
@pytest.mark.parametrize("rank_temperature", [0.0, 0.05])
def test_a_relevance_of_1_is_a_positives(backend, rank_temperature):
    """Nothing is left to punish, and there is no margin to keep."""
    inputs = embeddings((5,), 12, 40, torch.float32)
    options = {"rank_temperature": rank_temperature, "backend": backend}
    ones = {"relevance": torch.ones(12)} | options
    found = flat(ranking_reward_and_grad(*inputs, margin=0.2, rank_penalty=3.0, **ones))
    unpunished = flat(ranking_reward_and_grad(*inputs, margin=0.2, rank_penalty=0.0, **ones))
    for a, b in zip(found, unpunished, strict=True):
        assert torch.equal(a, b)
    without_margin = ranking_reward(*inputs, margin=0.0, **options).margin_reward
    torch.testing.assert_close(found[1], without_margin, rtol=0, atol=3e-7)


@every_level
@each_dtype
@each_weights
def test_places_of_an_index_have_their_own(backend, dtype, weights):
    """A row that is named twice may be relevant in one place and not in the other."""
    query, positive, _ = embeddings((4,), 0, 21, dtype)
    bank = (embeddings((), 7, 21, dtype, seed=1)[2] + 0.3 * query[0]).to(dtype)
    index = torch.randint(-1, 7, (4, 9))
    index[0, :2] = 3
    relevance = relevance_of(True, 4, 9)
    relevance[0, :2] = torch.tensor([0.0, 1.0])
    options = {"relevance": relevance, "backend": backend} | weights
    named = flat(ranking_reward_and_grad(query, positive, bank, negative_index=index, **options))
    placed = {"mask": index >= 0} | options
    expected = ranking_reward_and_grad(query, positive, bank[index.clamp(min=0)], **placed)
    *found, of_bank = named
    *right, of_places = flat(expected)
    for a, b in zip(found, right, strict=True):
        assert same_bits(a, b)
    total = torch.zeros(bank.shape, dtype=torch.float64)
    total.index_add_(0, index[index >= 0], of_places[index >= 0].double())
    rounding = 9 * 4 * tolerances.half_ulp(of_places.double().abs().amax(), dtype)
    assert ((of_bank.double() - total).abs() <= rounding + 1e-5).all()


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_dtype_and_shape_is_its_value_in_every_group(backend, dtype):
    """Rounded once to the reward's dtype; it may be the one that has the groups."""
    query, positive, negatives = embeddings((3,), 6, 20, dtype)
    for given in DTYPES:
        relevance = relevance_of(True, 6, dtype=given)
        wide = relevance.float().expand(3, 6).contiguous()
        options = {"backend": backend} | SOFT_RANKS
        expected = flat(
            ranking_reward_and_grad(query, positive, negatives, relevance=wide, **options)
        )
        for shape in ((6,), (1, 6), (3, 6)):
            view = relevance.expand(shape)
            found = ranking_reward_and_grad(query, positive, negatives, relevance=view, **options)
            for a, b in zip(flat(found), expected, strict=True):
                assert same_bits(a, b)
    grades = relevance_of(True, 5, 1, 6)
    shared = ranking_reward(query, positive, negatives, relevance=grades, **options)
    assert shared.reward.shape == (5, 3)
    for i in range(5):
        alone = ranking_reward(query, positive, negatives, relevance=grades[i], **options)
        for a, b in zip(shared, alone, strict=True):
            assert same_bits(a[i], b)


@every_level
@each_dtype
@pytest.mark.parametrize("of_bank", [False, True])
def test_what_is_no_relevance_spoils_its_group_alone(backend, dtype, of_bank):
    """As a device sees it that nobody waits for: in a launcher's arguments."""
    query, positive, negatives = embeddings((7,), 5, 24, dtype)
    mask, index = torch.ones(7, 5, dtype=torch.bool), None
    mask[-1, 2] = False
    if of_bank:
        negatives, index = negatives.flatten(0, 1), torch.arange(35).view(7, 5)
        mask, index = None, torch.where(mask, index, -1)
    good = relevance_of(True, 7, 5, dtype=reference.compute_dtype(dtype))
    bad = good.clone()
    bad[range(len(NONE)), 2], bad[-1, 2] = torch.tensor(NONE).to(bad), math.nan
    launch = LAUNCHERS["ranking_reward_and_grad"][backend]
    for weights in (OPEN_HINGE, SOFT_RANKS):
        given = Groups(query, positive, negatives, mask, index)
        rest = (None, Weights(**weights), reference.ALL)
        right, found = (launch(given._replace(relevance=x), *rest) for x in (good, bad))
        spoilt = torch.arange(7) < len(NONE)
        for i, (a, b) in enumerate(zip(found, right, strict=True)):
            a, b = (x.view(7, 5, 24) if of_bank and i == 7 else x for x in (a, b))
            assert same_bits(a[~spoilt], b[~spoilt])
            if i in (3, 4):  # rank and scores
                assert same_bits(a, b)
            else:
                assert a[spoilt].isnan().all()


@of_scores
@pytest.mark.parametrize("weights", [OPEN_HINGE, SOFT_RANKS], ids=["hard", "soft"])
def test_what_is_no_relevance_of_scores(backend, weights):
    scores, mask = torch.randn(7, 6), torch.ones(7, 5, dtype=torch.bool)
    mask[-1, 2] = False
    relevance = relevance_of(True, 7, 5)
    relevance[range(len(NONE)), 2], relevance[-1, 2] = torch.tensor(NONE), math.nan
    given = (scores, mask, relevance)
    values = LAUNCHERS["reward_from_scores"][backend](*given, Weights(**weights))
    launch = LAUNCHERS["reward_from_scores_backward"][backend]
    (gradient,) = launch(*given, torch.ones(7), Weights(**weights))
    spoilt = torch.arange(7) < len(NONE)
    for value in values[:3]:
        assert torch.equal(value.isnan(), spoilt)
    assert torch.equal(gradient.isnan().all(-1), spoilt)
    assert torch.equal(gradient.isnan().any(-1), spoilt)
    plain = reward_from_scores(scores, mask=mask, backend=backend, **weights)
    assert same_bits(values[3], plain.rank)
    assert same_bits(values[4], plain.scores)


@of_scores
@each_dtype
def test_a_relevance_of_0_of_scores_is_none_at_all(backend, dtype):
    scores, mask = torch.randn(4, 3, 9).to(dtype), torch.rand(3, 8) < 0.8
    for weights in (WEIGHTS, OPEN_HINGE, SOFT_RANKS):
        found = []
        for relevance in (None, torch.zeros(4, 1, 8)):
            leaf = scores.clone().requires_grad_()
            given = {"mask": mask, "relevance": relevance, "backend": backend}
            result = reward_from_scores(leaf, **given, **weights)
            result.reward.sum().backward()
            found.append([*(x.detach() for x in result), leaf.grad])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@of_scores
def test_scores_that_several_grades_share(backend):
    """Its leading dimensions broadcast; the gradient is the sum."""
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    relevance = relevance_of(True, 4, 1, 4, dtype=torch.float64)
    options = {"backend": backend} | SOFT_RANKS
    result = reward_from_scores(scores, relevance=relevance, **options)
    assert result.scores.shape == (4, 3, 5)
    (gradient,) = torch.autograd.grad(result.reward.sum(), scores)
    each = [reward_from_scores(scores, relevance=x, **options).reward for x in relevance]
    torch.testing.assert_close(result.reward, torch.stack(each), rtol=0, atol=0)
    (expected,) = torch.autograd.grad(torch.stack(each).sum(), scores)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)


@every_level
def test_it_is_a_constant(backend):
    query, positive, negatives = embeddings((3,), 4, 6, torch.float32)
    relevance = relevance_of(True, 3, 4).requires_grad_()
    options = {"relevance": relevance, "backend": backend}
    assert not ranking_reward(query, positive, negatives, **options).reward.requires_grad
    leaf = query.clone().requires_grad_()
    loss = RankingRewardLoss(backend=backend)(leaf, positive, negatives, relevance=relevance)
    loss.backward()
    assert relevance.grad is None
    expected = ranking_reward_and_grad(query, positive, negatives, **options)[1]
    torch.testing.assert_close(leaf.grad, -expected / 3, rtol=0, atol=1e-7)

    def reward(x):
        return ranking_reward(query, positive, negatives, relevance=x, backend=backend).reward.sum()

    assert (torch.func.grad(reward)(relevance.detach()) == 0).all()
