"""Several positives and candidates that are left out: the numbers, on every backend."""

import math

import pytest
import torch

from elva_kernels import (
    in_batch_ranking_reward,
    info_nce,
    info_nce_and_grad,
    rank_statistics,
    reference,
)
from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Contrast
from tests import tolerances
from tests.kernels import in_batch_oracle as oracle
from tests.kernels.cases import (
    BACKENDS,
    DTYPES,
    EVERY_LEVEL,
    LOSS,
    OPEN_HINGE,
    check_gradients,
    check_loss_gradients,
    computing,
    cosines,
    same_bits,
)
from tests.kernels.positives import SHAPES, TEMPERATURE, Case, own_scores, several

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
every_level = pytest.mark.parametrize("backend", computing("info_nce", EVERY_LEVEL), indirect=True)
every_backend = pytest.mark.parametrize("backend", computing("info_nce", BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_shape = pytest.mark.parametrize(("b", "m", "d", "p"), SHAPES)
LEFT_OUT = [(), ("excluded",), ("candidate_ids", "max_score"), ("excluded", "candidate_ids")]


def check_statistics(found, scores, case, k):
    """Every field is what the backend's own scores say, exactly; the logsumexp up to rounding."""
    rows = scores.tolist()
    for i in range(len(case.query)):
        exact = oracle.statistics(rows, case.asked, i, TEMPERATURE)
        for name in ("n_greater", "n_equal", "rank"):
            assert getattr(found, name)[i].tolist() == getattr(exact, name), (name, i)
        for t, score in zip(case.target[i].tolist(), found.target_score[i], strict=True):
            expected = scores[i, t] if t >= 0 else torch.tensor(-math.inf, dtype=scores.dtype)
            assert same_bits(score, expected)
        first = (exact.order + [-1] * scores.shape[1])[: min(k, scores.shape[1])]
        assert found.topk_index[i].tolist() == first
        first_scores = [rows[i][j] if j >= 0 else -math.inf for j in first]
        assert found.topk_scores[i].tolist() == first_scores
        assert found.hardest_index[i] == (exact.order or [-1])[0]
        assert found.hardest_score[i] == (rows[i][exact.order[0]] if exact.order else -math.inf)
        slack = 4 * torch.finfo(scores.dtype).eps * (1 / TEMPERATURE + math.log(2 + len(first)))
        lse = found.logsumexp[i].item()
        assert same_number(lse, exact.logsumexp) or abs(lse - exact.logsumexp) <= slack


def same_number(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


def statistics_of(case, backend, k):
    return rank_statistics(*case[:3], k=k, temperature=TEMPERATURE, backend=backend, **case.options)


@every_level
@each_dtype
@each_shape
def test_statistics(backend, dtype, b, m, d, p):
    for k, given in zip((3, m, m + 5, 1), LEFT_OUT, strict=True):
        case = several(b, m, d, p, dtype, given=given)
        found = statistics_of(case, backend, k)
        assert found.rank.shape == found.n_equal.shape == found.target_score.shape == (b, p)
        assert found.rank.dtype == found.n_greater.dtype == found.n_equal.dtype == torch.int32
        assert found.hardest_score.shape == found.logsumexp.shape == (b,)
        assert found.topk_scores.shape == found.topk_index.shape == (b, min(k, m))
        assert all(x.is_contiguous() and not x.requires_grad for x in found)
        if m == 0:
            assert (found.rank == 0).all() and (found.target_score == -math.inf).all()
            assert (found.logsumexp == -math.inf).all() and (found.hardest_index == -1).all()
            continue
        scores = own_scores(case, backend)
        off = (scores.double() - cosines(*case[:2])).abs()
        assert (off <= tolerances.BATCH[dtype]).all()
        check_statistics(found, scores, case, k)


def check_losses(case, temperature, symmetric, backend):
    """Losses and all gradients against the reference in float64."""
    weight = torch.randn(len(case.query))
    heat = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    leaves = case.leaves
    loss, found = info_nce(
        *leaves,
        case.target,
        temperature=heat,
        symmetric=symmetric,
        reduction="none",
        return_statistics=True,
        backend=backend,
        **case.options,
    )
    for a, b in zip(found, statistics_of(case, backend, 0), strict=True):
        assert temperature != TEMPERATURE or same_bits(a, b)
    gradients = torch.autograd.grad(loss, (*leaves, heat), weight.to(loss.dtype))
    exact_rows = [x.detach().double() for x in leaves]
    arguments = (*exact_rows, case.batch, heat.detach())
    exact, _ = reference.info_nce(*arguments, symmetric=symmetric)
    truths = reference.info_nce_gradients(*arguments, weight.double(), symmetric=symmetric)
    assert torch.equal(loss.isnan(), exact.isnan())
    good = ~exact.isnan()
    error = (loss.detach().double() - exact).abs()[good]
    assert (error <= LOSS[case.query.dtype] * (1 / temperature + exact[good].abs())).all()
    without = (case.target < 0).all(1)
    assert (loss[without] == 0).all()
    assert (gradients[0][without] == 0).all()
    check_loss_gradients(gradients, truths, exact_rows, weight, temperature, case.query.dtype)


@every_level
@each_dtype
@each_shape
@pytest.mark.parametrize("symmetric", [False, True])
def test_losses_and_gradients(backend, dtype, b, m, d, p, symmetric):
    for temperature, given in zip((0.05, TEMPERATURE, 1.0, 0.1), LEFT_OUT, strict=True):
        case = several(b, m, d, p, dtype, given=given)
        check_losses(case, temperature, symmetric, backend)


def check_rewards(case, head, backend):
    """Rewards and gradients, with ranks and hinge as the backend's own scores decide them."""
    last = len(case.candidates) if head is None else head
    leaves = case.leaves
    options = case.options | {"head": head, "backend": backend} | OPEN_HINGE
    result = in_batch_ranking_reward(*leaves, case.target, **options)
    found = statistics_of(case, backend, last)
    assert torch.equal(result.rank, found.rank)
    scores = torch.cat([found.target_score, found.topk_scores], dim=1)
    assert same_bits(result.scores, scores)
    # -- the values, by the reference on these scores
    weights = reference.Weights(**OPEN_HINGE)
    exact = reference.reward_of_head(scores.double(), found.rank, last, weights)
    places = torch.arange(1, scores.shape[1] + 1).double()
    terms = weights.rank_penalty * (places.log() - 1).abs().sum()
    scale = 1 + 2 * weights.w_margin + weights.w_rank * (1 + terms)
    for name in ("reward", "margin_reward", "rank_reward"):
        values = getattr(result, name).detach().double()
        torch.testing.assert_close(
            values,
            getattr(exact, name),
            rtol=0,
            atol=tolerances.REWARD[scores.dtype] * scale,
            equal_nan=True,
        )
    assert (result.reward[(case.target < 0).all(1)] == 0).all()
    # -- the gradients
    weight = torch.randn(len(case.query), dtype=result.reward.dtype)
    gradients = torch.autograd.grad(result.reward, leaves, weight)
    slopes = reference.head_slopes(scores.double(), found.rank, last, weight.double(), weights)
    index = torch.cat([case.target.long(), found.topk_index], dim=1)
    rows = [x.detach().double() for x in leaves]
    truths = reference.in_batch_gradients(*rows, index, slopes, case.target.shape[1])
    check_gradients(gradients, truths, [x.detach() for x in leaves], case.query.dtype)


@every_level
@each_dtype
@each_shape
def test_rewards_and_gradients(backend, dtype, b, m, d, p):
    for head, given in zip((1, 4, None, 100), LEFT_OUT, strict=True):
        check_rewards(several(b, m, d, p, dtype, given=given), head, backend)


@pytest.mark.parametrize("seed", range(4))
@each_shape
def test_the_reference_says_what_the_loops_say(b, m, d, p, seed):
    """On cosines that they compute themselves."""
    case = several(b, m, d, p, torch.float64, seed=seed, given=LEFT_OUT[seed])
    if m > 4:
        case.query[0, 0] = math.nan if seed % 2 else 0.0
        case.candidates[1] = 0.0
        case.candidates[2, 0] = math.inf
    options = case.options | {"backend": "reference"}
    rows, columns = case.query.tolist(), case.candidates.tolist()
    scores = [[oracle.cosine(q, c) for c in columns] for q in rows]
    found = statistics_of(case, "reference", m)
    losses = {
        symmetric: info_nce(
            *case[:3], temperature=TEMPERATURE, symmetric=symmetric, reduction="none", **options
        )
        for symmetric in (False, True)
    }
    rewards = {
        head: in_batch_ranking_reward(*case[:3], head=head, **options, **OPEN_HINGE).reward
        for head in (1, 3, 100)
    }
    near = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
    for i in range(b):
        exact = oracle.statistics(scores, case.asked, i, TEMPERATURE)
        for name in ("n_greater", "n_equal", "rank"):
            assert getattr(found, name)[i].tolist() == getattr(exact, name)
        assert found.topk_index[i].tolist() == exact.order + [-1] * (m - len(exact.order))
        own = [scores[i][t] if t >= 0 else -math.inf for t in case.target[i].tolist()]
        pairs = [(found.target_score[i].tolist(), own), (found.logsumexp[i], exact.logsumexp)]
        for symmetric, loss in losses.items():
            truth = oracle.info_nce(scores, case.asked, i, TEMPERATURE, symmetric=symmetric)
            pairs.append((loss[i], truth))
        for head, reward in rewards.items():
            pairs.append((reward[i], oracle.reward(scores, case.asked, i, head, **OPEN_HINGE)))
        for a, truth in pairs:
            actual = torch.as_tensor(a, dtype=torch.float64)
            torch.testing.assert_close(actual, torch.tensor(truth, dtype=torch.float64), **near)


def hard(row, kind):
    """The row made hard for arithmetic; its direction stays where it is finite."""
    info = torch.finfo(row.dtype)
    if kind in ("nan", "inf"):
        return torch.where(torch.arange(len(row)) == 1, float(kind), row)
    size = {"zero": 0.0, "huge": info.max / 4, "tiny": 4 * info.tiny}[kind]
    return (row.double() / row.double().abs().max() * size).to(row.dtype)


def hard_cases(dtype, kind):
    """By the place that a hard row takes."""
    case = several(5, 13, 12, 3, dtype, given=("excluded", "max_score"))
    taken = set(case.target.flatten().tolist())
    free = next(j for j in range(13) if j not in taken)
    everyone = torch.tensor([[i, free] for i in (3, 0, 4, 1, 2)])
    for place in ("query", "positive", "excluded", "negative"):
        rows = [x.clone() for x in case[:2]]
        side, at = {"query": (0, 0), "positive": (1, int(case.target[0, 1]))}.get(place, (1, free))
        rows[side][at] = hard(rows[side][at], kind)
        options = case.options
        if place == "excluded":
            options = options | {"excluded": torch.cat([options["excluded"], everyone])}
        yield place, Case(*rows, case.target, options)


@every_level
@each_dtype
@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "huge", "tiny"])
def test_hard_rows(backend, dtype, kind):
    """Each place's results are those of the reference in float64, and spoil nothing else."""
    for place, case in hard_cases(dtype, kind):
        scores = own_scores(case, backend)
        check_statistics(statistics_of(case, backend, 13), scores, case, 13)
        bad = kind in ("nan", "inf")
        at_query, at_pair = bad and place == "query", bad and place in ("query", "positive")
        leaves = case.leaves
        result = in_batch_ranking_reward(
            *leaves, case.target, head=4, backend=backend, **case.options, **OPEN_HINGE
        )
        assert result.reward.isnan().tolist() == spoiled(case, at_query, at_pair)
        check_hard_gradients(case, torch.autograd.grad(result.reward.sum(), leaves), result.reward)
        for symmetric in (False, True):
            check_hard_loss(case, symmetric, backend)


def spoiled(case, at_query, at_pair):
    """Which queries have a pair that is not finite, where query 0 has one if any has."""
    if at_query or not at_pair:
        return [at_query, *[False] * (len(case.query) - 1)]
    return (case.target == case.target[0, 1]).any(1).tolist()


def check_hard_gradients(case, gradients, values):
    """NaN for the queries whose value is, and for bad candidates; nowhere else."""
    assert torch.equal(gradients[0].isnan().all(1), values.isnan())
    assert torch.equal(gradients[0].isnan().any(1), values.isnan())
    bad = ~case.candidates.isfinite().all(1)
    assert torch.equal(gradients[1].isnan().all(1), bad)
    assert torch.equal(gradients[1].isnan().any(1), bad)


def check_hard_loss(case, symmetric, backend):
    loss, *gradients = info_nce_and_grad(
        *case[:3],
        temperature=torch.tensor(TEMPERATURE, dtype=torch.float64),
        symmetric=symmetric,
        reduction="none",
        backend=backend,
        **case.options,
    )
    check_hard_gradients(case, gradients[:2], loss)
    rows = [x.double() for x in case[:2]]
    arguments = (*rows, case.batch, torch.tensor(TEMPERATURE, dtype=torch.float64))
    exact, _ = reference.info_nce(*arguments, symmetric=symmetric)
    weight = torch.ones(len(rows[0]), dtype=torch.float64)
    truths = reference.info_nce_gradients(*arguments, weight, symmetric=symmetric)
    slack = LOSS[case.query.dtype] * (1 / TEMPERATURE + exact.abs())
    assert torch.equal(loss.isnan(), exact.isnan())
    assert not ((loss.double() - exact).abs() > slack).any()
    finite = [torch.where(x.isnan(), 0, x) for x in gradients]
    exactly = [torch.where(x.isnan(), 0, x) for x in truths]
    inputs = [torch.where(x.isfinite(), x, 0) for x in rows]
    check_loss_gradients(finite, exactly, inputs, weight, TEMPERATURE, case.query.dtype)


@every_backend
def test_a_positive_that_does_not_exist_is_a_pair_that_is_not_finite(backend):
    """As a GPU has it, where nobody looks: nothing is read for it, nor for pairs out of range.

    Rows of 16 scores are not padded: behind one lies the next.
    """
    case = several(4, 16, 8, 3, torch.float32, given=())
    clean = case.batch._replace(excluded=torch.tensor([[1, 4], [2, 0]]))
    outside = torch.tensor([[-7, 3], [0, 16], [1, 4], [1, 99], [2, -5], [2, 0], [50, 1]])
    target = torch.tensor([[0, -2, 3], [1, 2, -1], [5, 3, 8], [-2, -2, -1]])
    clean = clean._replace(target=target.clamp(min=-1))
    dirty = clean._replace(target=target, excluded=outside)
    heat = torch.tensor(TEMPERATURE)
    launch = launcher("info_nce", backend, torch.device("cpu"), torch.float32)
    loss, *found = launch(Contrast(*case[:2], dirty, heat, True, 1))
    clean_loss, *clean_found = launch(Contrast(*case[:2], clean, heat, True, 1))
    assert loss.isnan().tolist() == [True, False, False, True]
    assert same_bits(loss[1:3], clean_loss[1:3])
    assert torch.equal(found[3].isnan(), target == -2)
    negatives = torch.tensor([14, 13, 12, 16])  # every candidate is finite
    assert torch.equal(found[1][target == -2], negatives[(target == -2).nonzero()[:, 0]].int())
    assert (found[2][target == -2] == 0).all()
    for a, b in zip(found[:4], clean_found[:4], strict=True):
        assert same_bits(a[target != -2], b[target != -2])
