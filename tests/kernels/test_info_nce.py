"""The contract of InfoNCE, on every backend."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elva_kernels import info_nce, rank_statistics
from tests.kernels.cases import (
    BACKENDS,
    BATCH_SHAPES,
    DTYPES,
    EVERY_LEVEL,
    INTERPRETED,
    LOSS,
    batch,
    check_loss_gradients,
    computing,
    cosines,
    exact_negatives,
    layouts,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
every_level = pytest.mark.parametrize("backend", computing("info_nce", EVERY_LEVEL), indirect=True)
every_backend = pytest.mark.parametrize("backend", computing("info_nce", BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
OPS = torch.ops.elva_kernels


def truth(query, candidates, target, temperature, symmetric=False, ids=None, max_score=None):
    """[B] in float64, by the definition: torch's cross entropy over the target and its negatives.

    Differentiable. The scores near `max_score` decide alike in every backend if none is closer
    than rounding, which random inputs see to.
    """
    scores = cosines(query, candidates)
    negative = exact_negatives(scores.detach(), target, ids, max_score)
    losses = []
    for i, t in enumerate(target.tolist()):
        own = scores[i, t].unsqueeze(0)
        loss = cross_entropy(own, scores[i][negative[i]], temperature)
        if symmetric:
            twin = cross_entropy(own, scores[:, t][negative[:, t]], temperature)
            loss = (loss + twin) / 2
        losses.append(loss)
    return torch.stack(losses) if losses else scores.new_empty(0)


def cross_entropy(own, others, temperature):
    logits = torch.cat([own, others]) / temperature
    return torch.nn.functional.cross_entropy(logits, torch.tensor(0))


def exact_leaves(*tensors):
    return [x.detach().double().clone().requires_grad_() for x in tensors]


def check(query, candidates, target, temperature, weight, backend, **options):
    """Losses and all gradients against the truth, one loss a query."""
    dtype = query.dtype
    rows = torch.arange(len(query)) if target is None else target
    heat = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    leaves = [x.clone().requires_grad_() for x in (query, candidates)]
    call = {"temperature": heat, "reduction": "none", "backend": backend}
    names = {"ids": "candidate_ids"}
    given = {names.get(name, name): value for name, value in options.items()}
    loss = info_nce(*leaves, target, **call, **given)
    exact_inputs = exact_leaves(query, candidates, heat)
    exact = truth(*exact_inputs[:2], rows, exact_inputs[2], **options)
    assert loss.shape == (len(query),)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (loss.double() - exact).abs()
    assert (error <= LOSS[dtype] * (1 / temperature + exact.abs())).all()
    gradients = torch.autograd.grad(loss, (*leaves, heat), weight.to(loss.dtype))
    if len(query) == 0:
        assert all((x == 0).all() for x in gradients)
        return
    truths = torch.autograd.grad(exact, exact_inputs, weight.double())
    check_loss_gradients(gradients, truths, exact_inputs[:2], weight, temperature, dtype)


@every_level
@each_dtype
@pytest.mark.parametrize(("b", "m", "d"), BATCH_SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_and_gradients(backend, dtype, b, m, d, symmetric):
    query, candidates = batch(b, m, d, dtype)
    ids = torch.randint(0, max(1, m // 2), (m,))
    weight = torch.randn(b)
    free = torch.randint(0, max(m, 1), (b,))
    for target, temperature, given_ids, max_score in [
        (None, 0.05, None, None),
        (free, 1.0, None, 0.3),
        (free, 0.3, ids, None),
        (free, 0.1, ids, 0.1),
    ]:
        options = {"symmetric": symmetric, "ids": given_ids, "max_score": max_score}
        check(query, candidates, target, temperature, weight, backend, **options)


@every_backend
@each_dtype
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_are_those_of_the_losses(backend, dtype, symmetric, reduction):
    query, candidates = batch(20, 33, 48, dtype)
    heat = torch.tensor(0.07, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (query, candidates, heat)]
    options = {"temperature": heat, "symmetric": symmetric, "backend": backend}
    each = info_nce(query, candidates, reduction="none", **options)
    loss = info_nce(query, candidates, reduction=reduction, **options)
    torch.testing.assert_close(loss, getattr(each, reduction)(), rtol=1e-6, atol=0)
    with torch.no_grad():
        assert same_bits(info_nce(query, candidates, reduction=reduction, **options), loss.detach())
    actual = torch.autograd.grad(3 * loss, leaves)
    expected = torch.autograd.grad(3 * getattr(each, reduction)(), leaves)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=2e-6)


@every_backend
@each_dtype
def test_symmetric_is_two_calls(backend, dtype):
    query, candidates = (x.requires_grad_() for x in batch(23, 40, 24, dtype))
    target, ids = torch.randint(0, 40, (23,)), torch.randint(0, 20, (40,))
    for given_ids in (None, ids):
        options = {"temperature": 0.1, "max_score": 0.6, "reduction": "none", "backend": backend}
        both = info_nce(
            query, candidates, target, symmetric=True, candidate_ids=given_ids, **options
        )
        names = torch.arange(40) if given_ids is None else given_ids
        there = info_nce(query, candidates, target, candidate_ids=given_ids, **options)
        back = info_nce(candidates[target], query, candidate_ids=names[target], **options)
        torch.testing.assert_close(both, (there + back) / 2, rtol=1e-6, atol=1e-6)
        weight = torch.randn(23, dtype=both.dtype)
        actual = torch.autograd.grad(both, (query, candidates), weight)
        expected = torch.autograd.grad((there + back) / 2, (query, candidates), weight)
        eps = torch.finfo(dtype).eps
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=max(8 * eps, 1e-12))


@every_level
@each_dtype
def test_statistics_are_those_of_rank_statistics(backend, dtype):
    query, candidates = batch(17, 50, 24, dtype)
    candidates[25:] = candidates[:25]
    query.requires_grad_()
    target, ids = torch.randint(0, 50, (17,)), torch.randint(0, 20, (50,))
    options = {"temperature": 0.1, "candidate_ids": ids, "max_score": 0.5, "backend": backend}
    expected = rank_statistics(query, candidates, target, **options)
    assert (expected.n_equal > 0).any()
    for symmetric in (False, True):
        for reduction in ("none", "mean"):
            loss, found = info_nce(
                query,
                candidates,
                target,
                symmetric=symmetric,
                reduction=reduction,
                return_statistics=True,
                **options,
            )
            for a, b in zip(found, expected, strict=True):
                assert not a.requires_grad
                assert same_bits(a, b)
            if reduction == "none" and not symmetric:
                exact = found.logsumexp - found.target_score / 0.1
                torch.testing.assert_close(loss.detach(), exact, rtol=1e-5, atol=2e-5)


@every_level
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_its_own_pair_alone(backend, symmetric, bad):
    def run(query, candidates, target, reduction="none"):
        leaves = [x.clone().requires_grad_() for x in (query, candidates)]
        heat = torch.tensor(0.2, requires_grad=True)
        loss = info_nce(
            *leaves,
            target,
            temperature=heat,
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
        )
        loss.sum().backward()
        return loss.detach(), *(x.grad for x in (*leaves, heat))

    query, candidates = batch(6, 30, 16, torch.float32)
    kept = torch.tensor([0, 3, 4, 5])
    query[1, 0] = candidates[2, 0] = candidates[20, 0] = bad
    loss, grad_query, grad_candidates, grad_heat = run(query, candidates, None)
    assert loss.isnan().tolist() == [False, True, True, False, False, False]
    assert grad_query.isnan().all(1).tolist() == loss.isnan().tolist()
    assert grad_candidates.isnan().all(1).nonzero().flatten().tolist() == [2, 20]
    assert grad_heat.isfinite()
    summed = run(query, candidates, None, "sum")
    assert summed[0].isnan()
    torch.testing.assert_close(summed[2], grad_candidates, rtol=0, atol=1e-6, equal_nan=True)
    if not symmetric:  # query 2, whose candidate is bad, is there for the others' candidates
        part = run(query[kept], candidates, kept)
        assert same_bits(part[0], loss[kept])
        for a, b in zip(part[2:], (grad_candidates, grad_heat), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@every_backend
@each_dtype
def test_zero_rows_have_no_gradient(backend, dtype):
    query, candidates = batch(5, 9, 16, dtype)
    query[2] = candidates[1] = candidates[7] = 0
    query.requires_grad_()
    candidates.requires_grad_()
    loss = info_nce(query, candidates, symmetric=True, reduction="none", backend=backend)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert (query.grad[2] == 0).all()
    assert (candidates.grad[[1, 7]] == 0).all()
    assert query.grad[0].abs().sum() > 0


@every_backend
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.01, 1e6])
def test_temperatures_far_out(backend, temperature):
    """No overflow, and the hardest negative is what is left of a cold sum."""
    query, candidates = (x.requires_grad_() for x in batch(9, 30, 64, torch.float32))
    loss, found = info_nce(
        query,
        candidates,
        temperature=temperature,
        reduction="none",
        return_statistics=True,
        backend=backend,
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert query.grad.isfinite().all()
    if temperature <= 1e-3:
        gap = (found.hardest_score - found.target_score).double().clamp(min=0) / temperature
        assert ((loss.detach().double() - gap).abs() <= math.log(30) + 1e-6 * gap).all()
    if temperature == 1e6:
        torch.testing.assert_close(loss.detach(), torch.full((9,), math.log(30)), rtol=0, atol=1e-5)


@every_backend
def test_a_temperature_that_is_no_temperature_gives_nan(backend):
    query, candidates = batch(4, 6, 8, torch.float32)
    for value in (0.0, -0.1, math.nan):
        loss = info_nce(query, candidates, temperature=torch.tensor(value), backend=backend)
        assert loss.isnan()


@every_backend
@each_dtype
def test_layouts(backend, dtype):
    query, candidates = batch(7, 21, 37, dtype)
    target = torch.randint(0, 21, (7,))
    weight = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def run(q, c):
        q, c = q.detach().requires_grad_(), c.detach().requires_grad_()
        loss = info_nce(q, c, target, symmetric=True, reduction="none", backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (q, c), weight.expand(7))

    expected = run(query, candidates)
    for q, c in zip(layouts(query).values(), layouts(candidates).values(), strict=True):
        for a, b in zip(run(q, c), expected, strict=True):
            assert same_bits(a, b)


@every_backend
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(x, marks=pytest.mark.thorough)
                               for x in DTYPES if x != torch.float32)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("symmetric", [False, True])
def test_workspace_changes_no_loss(backend, dtype, symmetric):
    query, candidates = (x.requires_grad_() for x in batch(500, 1100, 8, dtype))
    results = []
    for workspace_mb in (1, 2, 256):
        loss = info_nce(
            query,
            candidates,
            temperature=1.0,
            symmetric=symmetric,
            workspace_mb=workspace_mb,
            reduction="none",
            backend=backend,
        )
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (query, candidates))))
    for loss, *gradients in results[1:]:
        if symmetric:
            torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        else:
            assert same_bits(loss, results[0][0])
        for a, b in zip(gradients, results[0][1:], strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@every_level
def test_any_number_of_threads_gives_the_same_bits(backend):
    query, candidates = (x.requires_grad_() for x in batch(300, 700, 40, torch.float32))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = info_nce(query, candidates, symmetric=True, workspace_mb=1, backend=backend)
            found = rank_statistics(query, candidates, k=9, temperature=0.1, backend=backend)
            results.append((loss.detach(), *torch.autograd.grad(loss, (query, candidates)), *found))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert same_bits(a, b)


@every_level
@given(
    b=st.integers(1, 12),
    m=st.integers(1, 40),
    d=st.integers(1, 24),
    temperature=st.floats(0.03, 3.0),
    symmetric=st.booleans(),
    with_ids=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(
    max_examples=5 if INTERPRETED else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_batch(backend, b, m, d, temperature, symmetric, with_ids, seed):
    generator = torch.Generator().manual_seed(seed)
    query, candidates = batch(b, m, d, torch.float64, seed=seed)
    target = torch.randint(0, m, (b,), generator=generator)
    ids = torch.randint(0, 6, (m,), generator=generator) if with_ids else None
    weight = torch.rand(b, generator=generator, dtype=torch.float64)
    options = {"symmetric": symmetric, "ids": ids}
    check(query, candidates, target, temperature, weight, backend, **options)
