"""The contract of the grouped reward, on every backend: numbers, ranks, special values, layouts."""

import math

import pytest
import torch

from elva_kernels import RankingReward, ranking_reward, ranking_reward_and_grad, reference
from elva_kernels.reference import Weights
from tests import tolerances
from tests.kernels.cases import (
    DTYPES,
    EVERY_LEVEL,
    INTERPRETED,
    OPEN_HINGE,
    SHAPES,
    SOFT_RANKS,
    WEIGHTS,
    check_gradients,
    embeddings,
    exact,
    layouts,
    relevance_of,
    same_bits,
    truth_gradients,
    truth_scores,
)

pytestmark = [
    pytest.mark.parametrize("backend", EVERY_LEVEL, indirect=True),
    pytest.mark.usefixtures("nan_filled_memory"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_ranks = pytest.mark.parametrize("weights", [WEIGHTS, SOFT_RANKS], ids=["hard", "soft"])
each_grade = pytest.mark.parametrize("graded", [False, True])
each_shape = pytest.mark.parametrize(("leading", "n", "d"), SHAPES, ids=str)


def rank_of(scores):
    """The rank that a user recomputes from the returned scores; masked ones are -inf."""
    key = scores.nan_to_num(nan=-math.inf, posinf=-math.inf)
    return (1 + (key[..., 1:] >= key[..., :1]).sum(-1)).int()


def check_reward_of_scores(result, mask, relevance=None, **weights):
    """The rewards are the formula's on the returned scores, in float64, up to rounding."""
    dtype = result.scores.dtype
    scores = torch.where(result.scores.isfinite(), result.scores, 0).double()
    right = reference.reward_from_scores(scores, mask, Weights(**weights), exact(relevance))
    penalty = weights["rank_penalty"] * (math.lgamma(scores.shape[-1] + 1) + scores.shape[-1])
    if relevance is not None:  # its weights in (4g)
        penalty += sum(1 / (1 + math.log(k)) for k in range(1, scores.shape[-1]))
    allowed = tolerances.REWARD[dtype] * (2 + abs(weights["margin"]) + penalty)
    assert torch.equal(result.rank, right.rank)
    for name in ("margin_reward", "rank_reward", "reward"):
        actual, expected = getattr(result, name), getattr(right, name)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=allowed)


@each_dtype
@each_shape
@pytest.mark.parametrize("masked", [False, True])
@each_grade
def test_values_and_gradients(backend, dtype, leading, n, d, masked, graded):
    inputs = embeddings(leading, n, d, dtype)
    mask = torch.rand(*leading, n) < 0.7 if masked else None
    relevance = relevance_of(graded, *leading, n, dtype=dtype)
    weight = torch.randn(leading, dtype=reference.compute_dtype(dtype))
    for weights in (WEIGHTS, OPEN_HINGE, SOFT_RANKS):
        options = {"mask": mask, "relevance": relevance, "backend": backend} | weights
        result, *gradients = ranking_reward_and_grad(*inputs, weight=weight, **options)
        live = torch.ones(*leading, n, dtype=torch.bool) if mask is None else mask
        error = (result.scores.double() - truth_scores(*inputs)).abs()
        assert (error[..., 0] <= tolerances.SCORE[dtype]).all()
        assert (error[..., 1:][live] <= tolerances.SCORE[dtype]).all()
        assert (result.scores[..., 1:][~live] == -math.inf).all()
        assert torch.equal(result.rank, rank_of(result.scores))
        check_reward_of_scores(result, mask, relevance, **weights)
        truths = truth_gradients(inputs, result.scores, mask, weight, relevance, **weights)
        check_gradients(gradients, truths, inputs, dtype)
        assert (gradients[2][~live] == 0).all()

        leaves = [x.clone().requires_grad_() for x in inputs]
        with_graph = ranking_reward(*leaves, **options)
        with_graph.reward.backward(weight)
        check_gradients([x.grad for x in leaves], truths, inputs, dtype)
        alone = ranking_reward(*inputs, **options)
        for a, b, c in zip(result, with_graph, alone, strict=True):
            assert same_bits(a, b.detach())
            assert same_bits(a, c)
        assert [x.requires_grad for x in with_graph] == [True, False, False, False, False]


@each_dtype
@pytest.mark.parametrize(("n", "d"), [(100, 1536), (7, 8192), (33, 1000)])
def test_error_is_at_most_twice_the_baselines(backend, dtype, n, d):
    inputs = embeddings((2,), n, d, dtype)
    truth = truth_scores(*inputs)
    scores = ranking_reward(*inputs, backend=backend).scores
    baseline = reference.cosine_scores(*inputs, None)
    error, baseline_error = ((x.double() - truth).abs().max() for x in (scores, baseline))
    assert error <= 2 * baseline_error + tolerances.BASELINE_SLACK[dtype]
    assert error <= tolerances.SCORE[dtype]


@each_dtype
def test_rank_lies_in_the_interval_of_the_exact_scores(backend, dtype):
    groups = 2 if INTERPRETED else 64
    query, positive, negatives = embeddings((groups,), 100, 48, dtype, signal=0.3)
    result = ranking_reward(query, positive, negatives, backend=backend)
    truth = truth_scores(query, positive, negatives)
    least = 1 + (truth[..., 1:] > truth[..., :1] + tolerances.RANK_GAP).sum(-1)
    most = 1 + (truth[..., 1:] >= truth[..., :1] - tolerances.RANK_GAP).sum(-1)
    assert ((least <= result.rank) & (result.rank <= most)).all()


@each_dtype
@pytest.mark.parametrize("d", [4, 64, 256, 1024])
def test_lattice_is_exact(backend, dtype, d):
    """Entries +-1 and D = 4^m: every score is a binary fraction, so scores and ranks are exact."""
    signs = [torch.randint(0, 2, shape) * 2 - 1 for shape in [(8, d), (8, d), (8, 60, d)]]
    negatives = torch.cat([signs[2], signs[1].unsqueeze(-2)], dim=-2)  # a tie with the positive
    exact = torch.einsum(
        "bd,bnd->bn", signs[0], torch.cat([signs[1].unsqueeze(-2), negatives], dim=-2)
    )
    inputs = [x.to(dtype) for x in (signs[0], signs[1], negatives)]
    for weights in (WEIGHTS, SOFT_RANKS):
        result = ranking_reward(*inputs, backend=backend, **weights)
        assert torch.equal(result.scores, (exact / d).to(result.scores.dtype))
        assert torch.equal(result.rank, (1 + (exact[:, 1:] >= exact[:, :1]).sum(-1)).int())
        check_reward_of_scores(result, None, **weights)


@each_dtype
@pytest.mark.parametrize("d", [3, 48, 257])
def test_copies_of_the_positive_tie_and_win(backend, dtype, d):
    query, positive, negatives = embeddings((3,), 40, d, dtype)
    for copies in (1, 17, 40):
        at = torch.randperm(40)[:copies]
        negatives[:, at] = positive.unsqueeze(1)
        inputs = (query, positive, negatives)
        result = ranking_reward(*inputs, backend=backend)
        assert (result.scores[:, 1 + at] == result.scores[:, :1]).all()
        assert (result.rank >= 1 + copies).all()
        with_graph = ranking_reward(query.clone().requires_grad_(), *inputs[1:], backend=backend)
        assert torch.equal(with_graph.rank, result.rank)
        with_gradients = ranking_reward_and_grad(*inputs, backend=backend)[0]
        assert torch.equal(with_gradients.rank, result.rank)
    assert (result.rank == 41).all()  # collapsed: the worst rank, not the best


@each_dtype
def test_magnitudes(backend, dtype):
    """Rows of any finite magnitude; a power of two leaves every bit of the scores."""
    inputs = embeddings((2,), 9, 40, dtype)
    scores = ranking_reward(*inputs, backend=backend).scores
    info = torch.finfo(dtype)
    steps = [-6, 3] if dtype == torch.float16 else [-100, -40, -3, 5, 60, 100]
    if dtype == torch.float64:
        steps += [-900, 900]
    for step in steps:
        factors = (2.0**step, 2.0**-step, 2.0**step)
        scaled = [x * factor for x, factor in zip(inputs, factors, strict=True)]
        restored = [x / factor for x, factor in zip(scaled, factors, strict=True)]
        if all(torch.equal(x, y) for x, y in zip(inputs, restored, strict=True)):
            assert same_bits(ranking_reward(*scaled, backend=backend).scores, scores)
    extremes = [info.max, info.smallest_normal, info.smallest_normal * info.eps]
    rows = torch.stack([torch.full((24,), x, dtype=dtype) for x in extremes])
    for query in rows:
        for positive in rows:
            result = ranking_reward(query, positive, -rows, backend=backend)
            expected = torch.tensor([1.0, -1.0, -1.0, -1.0]).to(result.scores)
            torch.testing.assert_close(
                result.scores, expected, rtol=0, atol=tolerances.SCORE[dtype]
            )
            assert (result.scores.abs() <= 1).all()


@each_dtype
@pytest.mark.parametrize("weights", [OPEN_HINGE, SOFT_RANKS], ids=["hard", "soft"])
@each_grade
def test_zero_rows_score_zero_and_get_no_gradient(backend, dtype, weights, graded):
    query, positive, negatives = embeddings((4,), 6, 19, dtype)
    query[0], positive[1], negatives[2, 3] = 0, 0, 0
    negatives[3] = -0.0
    inputs, relevance = (query, positive, negatives), relevance_of(graded, 4, 6)
    options = {"relevance": relevance, "backend": backend} | weights
    result, *gradients = ranking_reward_and_grad(*inputs, **options)
    assert (result.scores[0] == 0).all()
    assert result.scores[1, 0] == 0
    assert result.scores[2, 4] == 0
    assert (result.scores[3, 1:] == 0).all()
    assert result.rank[0] == 7
    for gradient, rows in zip(gradients, inputs, strict=True):
        zero = (rows == 0).all(-1)
        assert (gradient[zero] == 0).all()
        assert gradient.isfinite().all()
    weight = torch.ones(4, dtype=torch.float64)
    truths = truth_gradients(inputs, result.scores, None, weight, relevance, **weights)
    check_gradients(gradients, truths, inputs, dtype)


@each_dtype
@each_ranks
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["query", "positive", "negatives"])
@each_grade
def test_non_finite_row_stays_in_its_group(backend, dtype, weights, bad, place, graded):
    inputs = dict(
        zip(("query", "positive", "negatives"), embeddings((5,), 7, 21, dtype), strict=True)
    )
    inputs["negatives"][2, 5] = 0  # NaN reaches the gradient of a zero row too
    options = {"relevance": relevance_of(graded, 5, 7), "backend": backend} | weights
    clean, *clean_gradients = ranking_reward_and_grad(**inputs, **options)
    row = inputs[place][2] if place != "negatives" else inputs[place][2, 3]
    row[11] = bad
    result, *gradients = ranking_reward_and_grad(**inputs, **options)
    others = [0, 1, 3, 4]
    for actual, expected in zip((*result, *gradients), (*clean, *clean_gradients), strict=True):
        assert same_bits(actual[others], expected[others])
    for value in (*result[:3], *gradients):
        assert torch.isnan(value[2]).all()
    assert torch.equal(result.rank, rank_of(result.scores))
    if place == "negatives":
        assert result.rank[2] == 1 + (result.scores[2, 1:] >= result.scores[2, 0]).sum()
        assert torch.isnan(result.scores[2]).nonzero().tolist() == [[4]]
    else:
        assert result.rank[2] == 8


@each_dtype
@pytest.mark.parametrize("weights", [OPEN_HINGE, SOFT_RANKS], ids=["hard", "soft"])
@pytest.mark.parametrize("n", [1, 5, 70])
@each_grade
def test_masked_rows_are_never_read(backend, dtype, weights, n, graded):
    query, positive, negatives = embeddings((6,), n, 27, dtype)
    mask = torch.rand(6, n) < 0.5
    mask[0], mask[1] = False, True
    relevance = relevance_of(graded, 6, n)
    arguments = {"mask": mask, "relevance": relevance, "backend": backend} | weights
    expected = ranking_reward_and_grad(query, positive, negatives, **arguments)
    for hidden in (math.nan, math.inf, 0.0):
        negatives[~mask] = hidden
        if graded:
            relevance[~mask] = hidden
        actual = ranking_reward_and_grad(query, positive, negatives, **arguments)
        for a, b in zip((*actual[0], *actual[1:]), (*expected[0], *expected[1:]), strict=True):
            assert same_bits(a, b)
    result, grad_query, _, grad_negatives = expected
    assert (grad_negatives[~mask] == 0).all()
    assert (result.rank[0], result.margin_reward[0]) == (1, 0)
    assert torch.equal(result.scores[..., 1:] == -math.inf, ~mask)
    for group in range(6):  # hiding a row is leaving it out
        left = negatives[group][mask[group]]
        grades = relevance[group][mask[group]] if graded else None
        alone, grad_alone, _, _ = ranking_reward_and_grad(
            query[group], positive[group], left, relevance=grades, backend=backend, **weights
        )
        live = torch.cat([torch.ones(1, dtype=torch.bool), mask[group]])
        assert same_bits(alone.scores, result.scores[group][live])
        assert alone.rank == result.rank[group]
        torch.testing.assert_close(alone.reward, result.reward[group], rtol=0, atol=1e-6)
        torch.testing.assert_close(grad_alone, grad_query[group], rtol=1e-2, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [1, 9, 70])
def test_masked_rows_have_no_gradient_beside_a_query_that_is_not_finite(backend, dtype, bad, n):
    query, positive, negatives = embeddings((4,), n, 27, dtype)
    mask = torch.rand(4, n) < 0.5
    mask[0], mask[1] = False, True
    query[:3, 0] = bad
    _, *gradients = ranking_reward_and_grad(query, positive, negatives, mask=mask, backend=backend)
    assert (gradients[2][~mask] == 0).all()
    assert gradients[2][:3][mask[:3]].isnan().all() and gradients[2][3].isfinite().all()
    for gradient in gradients[:2]:
        assert gradient[:3].isnan().all() and gradient[3].isfinite().all()


@each_dtype
@pytest.mark.parametrize("n", [3, 40])
def test_terms_beyond_the_range_cancel_in_the_gradient_of_a_tiny_query(backend, dtype, n):
    """It is that of the query in range over the power of two, infinite where that is beyond."""
    steps = {torch.float16: -14, torch.float64: -1022}
    info = torch.finfo(dtype)
    for seed in range(3):
        query, *rows = embeddings((3,), n, 24, dtype, seed=seed)
        inside = 0
        for shift in (0, -3, -6):  # no bit is lost where it is subnormal
            factor = 2.0 ** (steps.get(dtype, -126) + shift)
            near = ranking_reward_and_grad(query.sign(), *rows, backend=backend, **OPEN_HINGE)
            far = ranking_reward_and_grad(
                query.sign() * factor, *rows, backend=backend, **OPEN_HINGE
            )
            for a, b in zip(near[0], far[0], strict=True):
                assert same_bits(a, b)
            expected = near[1].double()
            bound = tolerances.GRADIENT[dtype] + 2 * tolerances.half_ulp(expected, dtype)
            low, high = ((expected + side * bound) / factor for side in (-1, 1))
            low, high = (x.clamp(-info.max, info.max) for x in (low, high))
            found = far[1].double().clamp(-info.max, info.max)
            assert ((found >= low) & (found <= high)).all()
            inside += (found.abs() < info.max).sum()
        assert inside


@each_dtype
@each_ranks
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@each_grade
def test_any_layout_gives_the_same_bits(backend, dtype, weights, leading, graded):
    inputs = embeddings(leading, 11, 37, dtype)
    mask = torch.rand(*leading, 11) < 0.8
    weight = torch.randn(leading).to(reference.compute_dtype(dtype))
    relevance = relevance_of(graded, *leading, 11, dtype=dtype)
    grades = layouts(relevance) if graded else {}
    options = {"backend": backend} | weights
    plain = options | {"mask": mask, "relevance": relevance}
    expected = ranking_reward_and_grad(*inputs, weight=weight, **plain)
    ways = [layouts(x) for x in inputs]
    live = mask.movedim(-1, 0).contiguous().movedim(0, -1)
    for name in ways[0]:
        given = [way[name] for way in ways]
        copies = [x.clone() for x in given]
        strange = options | {"mask": live, "relevance": grades.get(name)}
        actual = ranking_reward_and_grad(*given, weight=weight, **strange)
        for a, b in zip((*actual[0], *actual[1:]), (*expected[0], *expected[1:]), strict=True):
            assert same_bits(a, b), name
            assert a.is_contiguous()
        leaves = [x.detach().requires_grad_() for x in given]
        ranking_reward(*leaves, **strange).reward.backward(weight)
        scores = expected[0].scores
        truths = truth_gradients(inputs, scores, mask, weight, relevance, **weights)
        check_gradients([x.grad for x in leaves], truths, inputs, dtype)
        assert all(same_bits(x, y) for x, y in zip(given, copies, strict=True)), "input written"


@each_dtype
@each_ranks
@each_grade
def test_shared_tensors_and_their_gradients(backend, dtype, weights, graded):
    """Leading dimensions broadcast; a shared tensor's gradient is the sum over its groups."""
    query, positive, _ = embeddings((4, 3), 0, 29, dtype)
    negatives = embeddings((), 8, 29, dtype, seed=1)[2]
    mask = torch.rand(3, 8) < 0.8
    relevance = relevance_of(graded, 4, 1, 8, dtype=dtype)
    options = {"mask": mask, "relevance": relevance, "backend": backend} | weights
    shared = (query, positive[:, :1], negatives)
    whole = (
        query,
        positive[:, :1].expand(4, 3, 29).clone(),
        negatives.expand(4, 3, 8, 29).clone(),
    )
    grades = relevance.expand(4, 3, 8).contiguous() if graded else None
    expected = ranking_reward(
        *whole, **options | {"mask": mask.expand(4, 3, 8), "relevance": grades}
    )
    weight = torch.randn(3, dtype=reference.compute_dtype(dtype))
    result, *gradients = ranking_reward_and_grad(*shared, weight=weight, **options)
    leaves = [x.clone().requires_grad_() for x in shared]
    ranking_reward(*leaves, **options).reward.backward(weight.expand(4, 3))
    for a, b in zip(result, expected, strict=True):
        assert same_bits(a, b)
    truths = truth_gradients(shared, expected.scores, mask, weight, relevance, **weights)
    for found in (gradients, [x.grad for x in leaves]):
        for gradient, truth, rows in zip(found, truths, shared, strict=True):
            groups = result.rank.numel() // (rows.shape[:-1].numel() or 1) + 1
            norm = rows.double().norm(dim=-1, keepdim=True)
            allowed = groups * tolerances.GRADIENT[dtype]
            allowed = (
                allowed + tolerances.half_ulp(truth, dtype) * norm
            )  # summed, then rounded once
            assert gradient.shape == rows.shape
            assert ((gradient.double() - truth).abs() * norm <= allowed).all()


@each_dtype
@each_ranks
@each_grade
def test_a_groups_bits_depend_on_that_group_alone(backend, dtype, weights, graded):
    inputs = embeddings((13,), 23, 130, dtype)
    mask = torch.rand(13, 23) < 0.8
    relevance = relevance_of(graded, 13, 23)
    options = {"backend": backend} | weights
    whole = ranking_reward_and_grad(*inputs, mask=mask, relevance=relevance, **options)
    for part in (slice(0, 1), slice(3, 8), slice(5, 13)):
        given = {"mask": mask[part], "relevance": relevance[part] if graded else None} | options
        some = ranking_reward_and_grad(*(x[part] for x in inputs), **given)
        for a, b in zip((*some[0], *some[1:]), (*whole[0], *whole[1:]), strict=True):
            assert same_bits(a, b[part])


@each_dtype
@each_ranks
@each_grade
def test_threads_and_repeats_give_the_same_bits(backend, dtype, weights, graded):
    inputs = embeddings((40,), 30, 200, dtype)
    options = {"relevance": relevance_of(graded, 40, 30), "backend": backend} | weights
    threads = torch.get_num_threads()
    expected = ranking_reward_and_grad(*inputs, **options)
    try:
        for n_threads in (1, 2, 3, 8):
            torch.set_num_threads(n_threads)
            for _ in range(3):
                actual = ranking_reward_and_grad(*inputs, **options)
                for a, b in zip(
                    (*actual[0], *actual[1:]), (*expected[0], *expected[1:]), strict=True
                ):
                    assert same_bits(a, b)
    finally:
        torch.set_num_threads(threads)


@each_dtype
@each_ranks
@each_grade
def test_order_of_negatives_does_not_matter(backend, dtype, weights, graded):
    query, positive, negatives = embeddings((3,), 50, 64, dtype)
    order = torch.randperm(50)
    relevance = relevance_of(graded, 3, 50)
    grades = relevance[:, order] if graded else None
    options = {"backend": backend} | weights
    result = ranking_reward(query, positive, negatives, relevance=relevance, **options)
    shuffled = ranking_reward(query, positive, negatives[:, order], relevance=grades, **options)
    assert same_bits(shuffled.scores[:, 1:], result.scores[:, 1 + order])
    assert torch.equal(shuffled.rank, result.rank)
    assert same_bits(shuffled.margin_reward, result.margin_reward)
    check_reward_of_scores(shuffled, None, grades, **weights)


@each_dtype
def test_flipping_a_coordinate_everywhere_changes_no_bit(backend, dtype):
    inputs = embeddings((3,), 20, 45, dtype)
    result, *gradients = ranking_reward_and_grad(*inputs, backend=backend)
    sign = torch.ones(45, dtype=dtype)
    sign[[0, 7, 44]] = -1
    flipped, *flipped_gradients = ranking_reward_and_grad(
        *(x * sign for x in inputs), backend=backend
    )
    for a, b in zip(flipped, result, strict=True):
        assert same_bits(a, b)
    for a, b in zip(flipped_gradients, gradients, strict=True):
        assert torch.equal(a * sign, b)


def test_gradients_of_an_expanded_sum_and_an_unused_input(backend):
    query, positive, negatives = embeddings((4,), 5, 16, torch.float32)
    query.requires_grad_()
    result = ranking_reward(query, positive, negatives, backend=backend)
    result.reward.sum().backward()
    expected = ranking_reward_and_grad(query, positive, negatives, backend=backend)[1]
    torch.testing.assert_close(query.grad, expected, rtol=0, atol=1e-7)
    assert positive.grad is None
    assert isinstance(result, RankingReward)
