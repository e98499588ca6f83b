"""Negatives named in a bank, and gradients that nobody asked for, on every backend."""

import itertools
import math
import shutil

import pytest
import torch

from elva_kernels import (
    RankingRewardLoss,
    info_nce,
    ranking_reward,
    ranking_reward_and_grad,
    reference,
)
from elva_kernels.backends import choice
from elva_kernels.backends.launcher import Groups
from elva_kernels.backends.segments import occurrences
from elva_kernels.backends.table import LAUNCHERS
from tests import tolerances
from tests.kernels.cases import (
    DTYPES,
    EVERY_LEVEL,
    OPEN_HINGE,
    SOFT_RANKS,
    WEIGHTS,
    check_gradients,
    embeddings,
    layouts,
    relevance_of,
    same_bits,
    truth_gradients,
)

pytestmark = [
    pytest.mark.parametrize("backend", EVERY_LEVEL, indirect=True),
    pytest.mark.usefixtures("nan_filled_memory"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
NAMES = ("query", "positive", "negatives")
each_wrt = pytest.mark.parametrize(
    "wrt",
    [names for size in range(4) for names in itertools.combinations(NAMES, size)],
    ids=lambda names: "+".join(names) or "none",
)
SHAPES = [((), 3, 5, 9), ((4,), 7, 33, 6), ((2, 3), 20, 64, 300), ((1,), 0, 8, 4), ((0,), 4, 8, 4)]
OPS = torch.ops.elva_kernels


def indexed(leading, n, d, m, dtype, *, hidden=0.2):
    """Query, positive, a bank [m, d] near all queries, and an index with repeats and -1."""
    query, positive, _ = embeddings(leading, 0, d, dtype)
    bank = embeddings((), m, d, dtype, seed=1)[2]
    if query.numel():
        bank = (bank + 0.3 * query.reshape(-1, d)[0]).to(dtype)
    index = torch.randint(0, max(1, m), (*leading, n))
    index[torch.rand(index.shape) < hidden] = -1
    return query, positive, bank, index


def gathered(bank, index):
    """The same negatives in their place, and the mask."""
    return bank[index.clamp(min=0)], index >= 0


def check_bank_gradient(gradient, terms, bank, index, dtype):
    """Each row against the float64 sum of its occurrences' terms, rounded once."""
    rows = index.clamp(min=0).flatten()
    truth = torch.zeros(bank.shape, dtype=torch.float64)
    truth.index_add_(0, rows, terms.reshape(-1, bank.shape[1]))
    count = torch.zeros(len(bank), 1, dtype=torch.float64)
    count.index_add_(0, rows, (index >= 0).double().reshape(-1, 1))
    norm = bank.double().norm(dim=-1, keepdim=True)
    allowed = count * tolerances.GRADIENT[dtype] + tolerances.half_ulp(truth, dtype) * norm
    assert gradient.dtype == dtype
    assert gradient.shape == bank.shape
    assert gradient.is_contiguous()
    assert ((gradient.double() - truth).abs() * norm <= allowed).all()
    assert (gradient[(count == 0).squeeze(-1)] == 0).all()


@each_dtype
@pytest.mark.parametrize(("leading", "n", "d", "m"), SHAPES, ids=str)
def test_values_and_gradients(backend, dtype, leading, n, d, m):
    query, positive, bank, index = indexed(leading, n, d, m, dtype)
    weight = torch.randn(leading, dtype=reference.compute_dtype(dtype))
    negatives, mask = gathered(bank, index)
    for weights in (WEIGHTS, OPEN_HINGE, SOFT_RANKS):
        options = {"backend": backend} | weights
        named = {"negative_index": index} | options
        result, *gradients = ranking_reward_and_grad(query, positive, bank, weight=weight, **named)
        plain = ranking_reward(query, positive, negatives, mask=mask, **options)
        for a, b in zip(result, plain, strict=True):
            assert same_bits(a, b)
        inputs = (query, positive, negatives)
        truths = truth_gradients(inputs, result.scores, mask, weight, **weights)
        check_gradients(gradients[:2], truths[:2], inputs[:2], dtype)
        check_bank_gradient(gradients[2], truths[2], bank, index, dtype)

        leaves = [x.clone().requires_grad_() for x in (query, positive, bank)]
        with_graph = ranking_reward(*leaves, **named)
        with_graph.reward.backward(weight)
        check_gradients([x.grad for x in leaves[:2]], truths[:2], inputs[:2], dtype)
        check_bank_gradient(leaves[2].grad, truths[2], bank, index, dtype)
        for a, b in zip(result, ranking_reward(query, positive, bank, **named), strict=True):
            assert same_bits(a, b)


@each_dtype
def test_a_row_named_many_times(backend, dtype):
    """A sum over hundreds of occurrences, among them several in one group."""
    query, positive, bank, index = indexed((5,), 70, 40, 3, dtype, hidden=0.1)
    index[index == 2] = 0
    weight = torch.randn(5, dtype=reference.compute_dtype(dtype))
    result, *gradients = ranking_reward_and_grad(
        query, positive, bank, negative_index=index, weight=weight, backend=backend, **OPEN_HINGE
    )
    negatives, mask = gathered(bank, index)
    inputs = (query, positive, negatives)
    truths = truth_gradients(inputs, result.scores, mask, weight, **OPEN_HINGE)
    check_bank_gradient(gradients[2], truths[2], bank, index, dtype)
    assert (result.scores[:, 1:][~mask] == -math.inf).all()


@each_dtype
def test_any_layout_gives_the_same_bits(backend, dtype):
    query, positive, bank, index = indexed((2, 3), 11, 37, 9, dtype)
    options = {"backend": backend} | SOFT_RANKS
    expected = ranking_reward_and_grad(query, positive, bank, negative_index=index, **options)
    ways = [layouts(x) for x in (query, positive, bank)]
    for name in ways[0]:
        given = [way[name] for way in ways]
        strange = index.movedim(-1, 0).contiguous().movedim(0, -1)
        actual = ranking_reward_and_grad(*given, negative_index=strange, **options)
        for a, b in zip((*actual[0], *actual[1:]), (*expected[0], *expected[1:]), strict=True):
            assert same_bits(a, b), name
    narrow = ranking_reward(query, positive, bank, negative_index=index.int(), **options)
    assert same_bits(narrow.scores, expected[0].scores)


@each_dtype
def test_the_mask_hides_what_the_index_names(backend, dtype):
    query, positive, bank, index = indexed((4,), 9, 20, 7, dtype)
    mask = torch.rand(4, 9) < 0.6
    options = {"backend": backend} | OPEN_HINGE
    expected = ranking_reward_and_grad(
        query, positive, bank, negative_index=torch.where(mask, index, -1), **options
    )
    anything = torch.where(mask, index, 10**12)  # behind the mask nobody looks
    actual = ranking_reward_and_grad(
        query, positive, bank, negative_index=anything, mask=mask, **options
    )
    for a, b in zip((*actual[0], *actual[1:]), (*expected[0], *expected[1:]), strict=True):
        assert same_bits(a, b)


@each_dtype
def test_an_index_that_all_groups_share(backend, dtype):
    query, positive, bank, index = indexed((3, 2), 8, 20, 9, dtype)
    shared = index[0, :1]
    options = {"backend": backend} | OPEN_HINGE
    expected = ranking_reward_and_grad(
        query, positive, bank, negative_index=shared.expand(3, 2, 8), **options
    )
    actual = ranking_reward_and_grad(query, positive, bank, negative_index=shared, **options)
    for a, b in zip((*actual[0], *actual[1:]), (*expected[0], *expected[1:]), strict=True):
        assert same_bits(a, b)


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_rows_reach_the_groups_that_name_them(backend, dtype, bad):
    query, positive, bank, _ = indexed((4,), 0, 21, 9, dtype)
    index = torch.tensor([[0, 1, 2], [3, 4, -1], [5, 5, 6], [3, 6, 0]])
    options = {"negative_index": index, "backend": backend} | OPEN_HINGE
    clean = ranking_reward_and_grad(query, positive, bank, **options)
    bank[8, 3] = bad  # nobody names it
    unnamed = ranking_reward_and_grad(query, positive, bank, **options)
    for a, b in zip(unnamed[1:], clean[1:], strict=True):
        assert same_bits(a, b)
    bank[1, 7] = bad
    result, *gradients = ranking_reward_and_grad(query, positive, bank, **options)
    assert result.reward.isnan().tolist() == [True, False, False, False]
    assert gradients[0].isnan().all(-1).tolist() == [True, False, False, False]
    assert torch.isnan(gradients[2]).all(-1).nonzero().flatten().tolist() == [0, 1, 2]
    others = [3, 4, 5, 7, 8]
    assert same_bits(gradients[2][others], clean[3][others])
    for actual, expected in zip((*result, *gradients[:2]), (*clean[0], *clean[1:3]), strict=True):
        assert same_bits(actual[1:], expected[1:])


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_reaches_the_rows_that_it_names(backend, dtype, bad):
    query, positive, bank, _ = indexed((3,), 0, 21, 7, dtype)
    index = torch.tensor([[0, 1, -1], [2, 3, 0], [4, 5, 5]])
    mask = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
    query[0, 0] = bad
    _, *gradients = ranking_reward_and_grad(
        query, positive, bank, negative_index=index, mask=mask, backend=backend
    )
    assert gradients[2][0].isnan().all() and gradients[2][1:].isfinite().all()
    assert (gradients[2][[1, 6]] == 0).all()


@each_dtype
def test_a_row_that_does_not_exist_is_not_finite(backend, dtype):
    """As a device sees it that nobody waits for: -2 in a launcher's index."""
    query, positive, bank, index = indexed((3,), 5, 16, 6, dtype, hidden=0)
    index[1, 2] = -2
    weights = reference.Weights(**OPEN_HINGE)
    launch = LAUNCHERS["ranking_reward_and_grad"][backend]
    groups = Groups(query, positive, bank, negative_index=index)
    reward, _, _, _, scores, *gradients = launch(groups, None, weights, (True, True, True))
    assert reward.isnan().tolist() == [False, True, False]
    assert scores[1].isnan().nonzero().flatten().tolist() == [3]
    assert gradients[0].isnan().all(-1).tolist() == [False, True, False]
    named = torch.zeros(6, dtype=torch.bool)
    named[index[1][index[1] >= 0]] = True
    assert torch.equal(gradients[2].isnan().all(-1), named)


@each_dtype
def test_nothing_is_named(backend, dtype):
    query, positive, _, _ = indexed((3,), 2, 6, 4, dtype)
    for m, n in [(0, 2), (0, 0), (4, 2), (4, 0)]:
        bank = torch.full((m, 6), math.nan, dtype=dtype)
        index = torch.full((3, n), -1)
        result, *gradients = ranking_reward_and_grad(
            query, positive, bank, negative_index=index, backend=backend
        )
        assert (result.rank == 1).all()
        assert result.reward.isfinite().all()
        assert gradients[2].shape == (m, 6)
        assert (gradients[2] == 0).all()


@each_dtype
@each_wrt
@pytest.mark.parametrize("named", [False, True])
def test_wrt(backend, dtype, named, wrt):
    """What is not asked for is None; of the rest no bit changes."""
    query, positive, bank, index = indexed((4,), 13, 40, 9, dtype)
    negatives, mask = gathered(bank, index)
    bank[2] *= 2.0**40 if dtype != torch.float16 else 1  # out of the fast path's range
    given = {"negatives": bank, "negative_index": index}
    if not named:
        given = {"negatives": negatives, "mask": mask}
    options = given | {"weight": torch.randn(4), "backend": backend} | SOFT_RANKS
    expected = ranking_reward_and_grad(query, positive, **options)
    actual = ranking_reward_and_grad(query, positive, **options, wrt=wrt)
    for a, b in zip(actual[0], expected[0], strict=True):
        assert same_bits(a, b)
    for name, a, b in zip(NAMES, actual[1:], expected[1:], strict=True):
        assert (a is None) if name not in wrt else same_bits(a, b)


def spied(monkeypatch, backend, op):
    """What launchers of `op` are asked to differentiate by, from now on."""
    asked = []
    launch = LAUNCHERS[op][backend]

    def spy(*given):
        asked.append(tuple(given[-1]))
        return launch(*given)

    monkeypatch.setitem(LAUNCHERS[op], backend, spy)
    choice.launcher.cache_clear()
    return asked


@each_wrt
def test_autograd_asks_for_what_requires_a_gradient(backend, monkeypatch, wrt):
    asked = spied(monkeypatch, backend, "ranking_reward_backward")
    query, positive, bank, index = indexed((4,), 5, 16, 30, torch.float32)
    leaves = dict(zip(NAMES, (query, positive, bank), strict=True))
    for name in wrt:
        leaves[name].requires_grad_()
    result = ranking_reward(**leaves, negative_index=index, backend=backend)
    expected = ranking_reward_and_grad(
        query, positive, bank, negative_index=index, backend=backend
    )[1:]
    if wrt:
        result.reward.sum().backward()
        assert asked == [tuple(name in wrt for name in leaves)]
    assert result.reward.requires_grad == bool(wrt)
    for (name, leaf), gradient in zip(leaves.items(), expected, strict=True):
        assert (leaf.grad is None) == (name not in wrt)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-7)
    monkeypatch.undo()
    choice.launcher.cache_clear()


@pytest.mark.parametrize("weights", [OPEN_HINGE, SOFT_RANKS], ids=["hard", "soft"])
def test_gradcheck(backend, weights):
    query, positive, bank, index = indexed((3,), 4, 6, 5, torch.float64)
    leaves = [x.requires_grad_() for x in (query, positive, bank)]
    for some in (leaves, [query, positive.detach(), bank.detach()]):
        assert torch.autograd.gradcheck(
            lambda *x: ranking_reward(*x, negative_index=index, backend=backend, **weights).reward,
            some,
        )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.thorough)], ids=str
)
def test_opcheck(backend, dtype):
    query, positive, bank, index = indexed((3,), 5, 8, 6, dtype)
    reward = reference.compute_dtype(dtype)
    upstream = torch.randn(3, dtype=reward)
    inputs = (query, positive, bank, None, index, relevance_of(True, 3, 5, dtype=reward))
    weights = tuple(reference.Weights(**WEIGHTS))
    saved = OPS.ranking_reward_saved(*inputs, weights, backend)[-1]
    for wrt in ((True, True, True), (True, False, False), (False, False, False)):
        rest = (weights, wrt, backend)
        torch.library.opcheck(
            OPS.ranking_reward_backward.default, (*inputs, saved, upstream, *rest)
        )
        torch.library.opcheck(OPS.ranking_reward_and_grad.default, (*inputs, None, *rest))
    torch.library.opcheck(OPS.ranking_reward.default, (*inputs, weights, backend))
    torch.library.opcheck(OPS.ranking_reward_saved.default, (*inputs, weights, backend))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiles_without_a_graph_break(backend):
    def loss(query, positive, bank, index):
        module = RankingRewardLoss(backend=backend)
        values = ranking_reward_and_grad(
            query, positive, bank, negative_index=index, wrt=("query",), backend=backend
        )
        return module(query * 2, positive, bank, negative_index=index), values

    query, positive, bank, index = indexed((3,), 4, 6, 5, torch.float32)
    leaves = [[x.clone().requires_grad_() for x in (query, bank)] for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for run, (q, b) in zip((loss, compiled), leaves, strict=True):
        value, (result, grad_query, *others) = run(q, positive, b, index)
        value.backward()
        assert others == [None, None]
        found.append((value.detach(), *result, grad_query))
    for a, b in zip(*found, strict=True):
        assert same_bits(a, b)
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-7)


def test_compiles_where_one_tensor_stands_in_two_places(backend):
    """As in a batch whose rows are positives and the bank: Dynamo takes no tensor twice."""
    _, _, rows, index = indexed((6,), 4, 5, 6, torch.float32)

    def loss(query, rows):
        found = ranking_reward(query, rows, rows, negative_index=index, backend=backend)
        return found.reward.mean() + info_nce(rows, rows, symmetric=True, backend=backend)

    leaves = [[x.clone().requires_grad_() for x in (rows.flip(0), rows)] for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    losses = [run(*x) for run, x in zip((loss, compiled), leaves, strict=True)]
    assert same_bits(*losses)
    for x in losses:
        x.backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("place", ["query", "positive", "negatives"])
@pytest.mark.parametrize("beside", [1.0, 2.0**40], ids=["small", "large"])  # the size of other rows
def test_terms_of_a_shared_row_are_summed_before_they_are_scaled(backend, dtype, place, beside):
    """A tiny row's gradient is that of the same row in range, divided by the power of two.

    Each group's own term overflows where their sum, of opposite signs, does not.
    """
    steps = {torch.float16: -14, torch.float64: -1022}
    factor = 2.0 ** steps.get(dtype, -126)
    query, positive, negatives = embeddings((2,), 3, 16, dtype)
    inputs = {"query": query, "positive": positive, "negatives": negatives}
    for name, x in inputs.items():
        if name != place:  # two groups that are nearly one
            x[1] = x[0] * (1 + torch.finfo(dtype).eps * torch.randint(-1, 2, x[1].shape).to(dtype))
            inputs[name] = x * (1.0 if dtype == torch.float16 else beside)
    row = inputs[place][0].clone()
    options = {"weight": torch.tensor([1.0, -1.0]), "backend": backend} | OPEN_HINGE
    for scaled in (row.sign(), row.sign() * 2.0**-6):  # no bit is lost where it is subnormal
        near = ranking_reward_and_grad(**inputs | {place: scaled}, **options)
        far = ranking_reward_and_grad(**inputs | {place: scaled * factor}, **options)
        leaf = (scaled * factor).requires_grad_()
        reward = ranking_reward(**inputs | {place: leaf}, backend=backend, **OPEN_HINGE).reward
        reward.backward(options["weight"].to(reward.dtype))
        for a, b in zip(near[0], far[0], strict=True):
            assert same_bits(a, b)
        i = 1 + list(inputs).index(place)
        norm = scaled.double().norm(dim=-1, keepdim=True)
        info = torch.finfo(dtype)
        for found in (far[i], leaf.grad):
            expected = near[i].double() / factor
            allowed = 4 * (tolerances.GRADIENT[dtype] / norm + info.eps * near[i].double().abs())
            inside = expected.abs() + allowed / factor < info.max
            assert not found.isnan().any()
            assert inside.any()
            error = (found.double() * factor - near[i].double()).abs()
            assert (error <= allowed)[inside].all()


@each_dtype
@pytest.mark.parametrize("size", [1.0, 2.0**60])  # of the queries
def test_terms_of_a_tiny_row_of_a_bank_are_summed_before_they_are_rounded(backend, dtype, size):
    steps = {torch.float16: -14, torch.float64: -1022}
    factor, size = 2.0 ** steps.get(dtype, -126), 1.0 if dtype == torch.float16 else size
    query, positive, bank = embeddings((2,), 5, 16, dtype)
    query[1], positive[1] = query[0] * (1 + torch.finfo(dtype).eps), positive[0]
    query, bank = query * size, bank[0]
    index = torch.tensor([[0, 1, 2], [0, 1, 2]])
    options = {"weight": torch.tensor([1.0, -1.0]), "negative_index": index, "backend": backend}
    bank[0] = bank[0].sign()
    near = ranking_reward_and_grad(query, positive, bank, **options, **OPEN_HINGE)
    bank[0] *= factor * 2.0**-6
    far = ranking_reward_and_grad(query, positive, bank, **options, **OPEN_HINGE)
    found, expected = (x[3][0].double() for x in (far, near))
    assert same_bits(near[0].scores, far[0].scores)
    allowed = 4 * (tolerances.GRADIENT[dtype] + torch.finfo(dtype).eps * expected.abs())
    inside = (expected.abs() + allowed) / factor * 64 < torch.finfo(dtype).max
    assert not found.isnan().any() and inside.any()
    assert ((found * factor / 64 - expected).abs() <= allowed)[inside].all()


def test_two_groups_share_a_subnormal_positive(backend):
    """Of opposite weights; in float64 their sum is no number that float32 cannot hold."""
    query, negatives = torch.randn(2, 4), torch.randn(2, 3, 4)
    query[1] = query[0] + 1e-3 * query[1]
    negatives[1] = negatives[0]
    inputs = (query, torch.full((4,), 1e-40), negatives)
    weight = torch.tensor([1.0, -1.0])
    gradient = ranking_reward_and_grad(*inputs, weight=weight, backend=backend)[2]
    exact = [x.double() for x in inputs]
    truth = ranking_reward_and_grad(*exact, weight=weight, backend="reference")[2]
    assert truth.abs().max() < torch.finfo(torch.float32).max
    assert (truth.abs() > 1e35).any()
    allowed = 2 * tolerances.GRADIENT[torch.float32] / exact[1].norm() + 1e-7 * truth.abs()
    assert ((gradient.double() - truth).abs() <= allowed).all()


def test_occurrences_come_in_the_order_of_groups(backend):
    index = torch.tensor([[2, -1, 0], [2, 2, -2]])
    order, first = occurrences(index, 4)
    assert order.tolist() == [5, 1, 2, 0, 3, 4]
    assert first.tolist() == [2, 3, 3, 6, 6]
