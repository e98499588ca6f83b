"""What must not matter to the in-batch ops, and what follows from what: on every backend."""

import math

import pytest
import torch

from elva_kernels import (
    in_batch_ranking_reward,
    in_batch_ranking_reward_and_grad,
    info_nce,
    info_nce_and_grad,
    rank_statistics,
)
from tests.kernels.cases import (
    BACKENDS,
    DTYPES,
    EVERY_LEVEL,
    OPEN_HINGE,
    computing,
    layouts,
    same_bits,
)
from tests.kernels.positives import TEMPERATURE, Case, same_ids, several

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
every_level = pytest.mark.parametrize("backend", computing("info_nce", EVERY_LEVEL), indirect=True)
every_backend = pytest.mark.parametrize("backend", computing("info_nce", BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
in_chunks = pytest.mark.parametrize(
    "backend",
    [x for x in computing("info_nce", EVERY_LEVEL) if x.values[0] != "reference"],
    indirect=True,
)
PER_POSITIVE = ("rank", "n_greater", "n_equal", "target_score")


def heat(dtype=torch.float64):
    return torch.tensor(TEMPERATURE, dtype=dtype)


def statistics(case, backend, k=4):
    options = case.options | {"temperature": heat(), "k": k, "backend": backend}
    return rank_statistics(*case[:3], **options)._asdict()


def rewards(case, backend, **more):
    """Of a head of 4, and the gradients."""
    options = case.options | {"head": 4, "backend": backend} | OPEN_HINGE | more
    result, *gradients = in_batch_ranking_reward_and_grad(*case[:3], **options)
    named = result._asdict()
    return named | dict(zip(("grad_query", "grad_candidates"), gradients, strict=True))


def losses(case, backend, symmetric=True, **more):
    """One loss a query, and the gradients of their sum."""
    options = case.options | {"temperature": heat(), "reduction": "none", "backend": backend}
    found = info_nce_and_grad(*case[:3], symmetric=symmetric, **options | more)
    names = ("loss", "grad_query", "grad_candidates", "grad_temperature")
    return dict(zip(names, found, strict=True))


def everything(case, backend):
    """Every result of every op."""
    for op in (statistics, rewards, losses):
        for name, result in op(case, backend).items():
            yield f"{op.__name__}.{name}", result
    for name, result in losses(case, backend, symmetric=False).items():
        yield f"one way.{name}", result


def check_same(case, other, backend, *, squeezed=False):
    results = zip(everything(case, backend), everything(other, backend), strict=True)
    for (name, a), (_, b) in results:
        if squeezed and name.split(".")[1] in PER_POSITIVE:
            a = a.squeeze(1)
        assert same_bits(a, b), name


@every_level
@each_dtype
def test_one_positive_in_a_row_is_one_positive(backend, dtype):
    case = several(7, 19, 24, 1, dtype)
    case.target.clamp_(min=0)
    pairs = case.options["excluded"]
    pairs = pairs[(case.target[pairs[:, 0]] != pairs[:, 1:]).all(1)]
    case = case.but(excluded=pairs)
    check_same(case, case._replace(target=case.target[:, 0]), backend, squeezed=True)


@every_level
@each_dtype
@pytest.mark.parametrize("m", [12, 16, 33])
def test_a_candidate_that_is_nobodys_negative_changes_no_bit(backend, dtype, m):
    case = several(6, m, 24, 3, dtype, given=("excluded", "max_score"))
    everyone = torch.tensor([[i, m] for i in (5, 2, 0, 1, 4, 3)])
    more = Case(
        case.query,
        torch.cat([case.candidates, case.candidates[:1]]),
        case.target,
        case.options | {"excluded": torch.cat([everyone, case.options["excluded"]])},
    )
    found = zip(everything(case, backend), everything(more, backend), strict=True)
    for (name, a), (_, b) in found:
        if name.endswith("grad_candidates"):
            assert (b[m] == 0).all()
            b = b[:m]
        if backend == "reference" and a.dtype == torch.float64:
            # torch adds in an order that the number of candidates decides.
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
        else:
            assert same_bits(a, b), name


def one_by_one(case):
    """Each query once for each of its positives, with the other positives left out."""
    b, p = case.target.shape
    row, other = case.options["excluded"].unbind(1)
    place = torch.arange(p)
    old = torch.stack([(row.unsqueeze(1) * p + place).flatten(), other.repeat_interleave(p)], 1)
    again = torch.arange(b * p).repeat_interleave(p)
    rivals = case.target.repeat_interleave(p, dim=0).flatten()
    ids = same_ids(case)
    of_ids = torch.stack(
        [(ids[:, :1] * p + place).flatten(), ids[:, 1].repeat_interleave(p)], dim=1
    )
    pairs = torch.cat([old, torch.stack([again, rivals], dim=1), of_ids])
    target = case.target.reshape(b * p, 1)
    pairs = pairs[(pairs[:, 1] >= 0) & (target[pairs[:, 0], 0] != pairs[:, 1])]
    query = case.query.repeat_interleave(p, dim=0)
    options = case.options | {"excluded": pairs, "candidate_ids": None}
    return Case(query, case.candidates, target, options)


@every_level
@each_dtype
@pytest.mark.parametrize("p", [2, 5])
def test_several_positives_are_one_query_for_each(backend, dtype, p):
    case = several(5, 23, 24, p, dtype)
    apart = one_by_one(case)
    together, each = (statistics(x, backend) for x in (case, apart))
    for name in PER_POSITIVE:
        assert same_bits(together[name].reshape(-1, 1), each[name]), name
    for name in ("hardest_score", "hardest_index", "topk_scores", "topk_index"):
        assert same_bits(together[name].repeat_interleave(p, dim=0), each[name]), name
    there = case.target >= 0
    slack = 1e-12 if dtype == torch.float64 else 1e-6
    for op, names in ((losses, ("loss",)), (rewards, ("reward", "margin_reward", "rank_reward"))):
        more = {"symmetric": False} if op is losses else {}
        whole, parts = (op(x, backend, **more) for x in (case, apart))
        for name in names:
            values = parts[name].reshape(-1, p)
            mean = (values * there).sum(1) / there.sum(1).clamp(min=1)
            torch.testing.assert_close(whole[name], mean, rtol=slack, atol=slack)


@every_backend
@each_dtype
def test_the_order_of_positives_is_that_of_their_results(backend, dtype):
    case = several(5, 23, 24, 5, dtype)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = case._replace(target=case.target[:, order])
    slack = 1e-12 if dtype == torch.float64 else 1e-6
    for op in (statistics, rewards, losses):
        a, b = (op(x, backend) for x in (case, permuted))
        for name, result in a.items():
            if name in PER_POSITIVE:
                assert same_bits(result[:, order], b[name]), name
            elif name == "scores":
                whole = torch.cat([order, torch.arange(5, result.shape[1])])
                assert same_bits(result[:, whole], b[name])
            elif name.startswith("grad"):
                eps = torch.finfo(result.dtype).eps
                torch.testing.assert_close(result, b[name], rtol=4 * eps, atol=4 * slack)
            else:
                torch.testing.assert_close(result, b[name], rtol=slack, atol=slack)


def spread(x):
    """The same values, every third element of memory that holds others."""
    held = torch.full((*x.shape[:-1], 3 * x.shape[-1]), 99, dtype=x.dtype)
    held[..., ::3] = x
    return held[..., ::3]


@every_backend
@each_dtype
def test_the_form_of_pairs_and_indices_says_nothing(backend, dtype):
    case = several(6, 19, 24, 3, dtype)
    pairs, ids = case.options["excluded"], case.options["candidate_ids"]
    forms = [
        pairs[torch.randperm(len(pairs))],
        torch.cat([pairs.flip(0), pairs[3:], pairs]),
        pairs[pairs[:, 0].argsort()].int(),
        pairs.T.contiguous().T,
        spread(pairs.to(torch.int16)),
        pairs.to(torch.uint8),
    ]
    targets = [case.target.int(), spread(case.target), case.target.T.contiguous().T] * 2
    names = [ids.int(), spread(ids), ids.to(torch.int8), -ids, ids * 2**40, ids]
    for excluded, target, candidate_ids in zip(forms, targets, names, strict=True):
        kept = excluded.clone()
        other = case._replace(target=target).but(excluded=excluded, candidate_ids=candidate_ids)
        check_same(case, other, backend)
        assert torch.equal(excluded, kept)
    rows = zip(layouts(case.query).values(), layouts(case.candidates).values(), strict=True)
    for query, candidates in rows:
        check_same(case, case._replace(query=query, candidates=candidates), backend)


@every_level
@each_dtype
def test_ids_are_pairs(backend, dtype):
    case = several(7, 19, 24, 3, dtype)
    pairs = same_ids(case)
    assert len(pairs) > 0
    both = torch.cat([case.options["excluded"], pairs])
    check_same(case, case.but(excluded=both, candidate_ids=None), backend)
    check_same(case, case.but(excluded=both), backend)
    nobody = case.but(excluded=torch.zeros(0, 2).long(), candidate_ids=torch.arange(19))
    check_same(nobody, case.but(excluded=None, candidate_ids=None), backend)


@every_backend
@each_dtype
@pytest.mark.parametrize("p", [1, 3])
def test_gradients_that_nobody_wants_change_no_bit(backend, dtype, p):
    case = several(6, 19, 24, p, dtype)
    for op in (losses, rewards):
        both = op(case, backend)
        for wrt in (["query"], ("candidates",), set()):
            some = op(case, backend, wrt=wrt)
            assert some.keys() == both.keys()
            for name, result in some.items():
                side = name.removeprefix("grad_")
                if side in ("query", "candidates") and side not in wrt:
                    assert result is None
                else:
                    assert same_bits(result, both[name]), name
    number = losses(case, backend, temperature=TEMPERATURE)
    assert number["grad_temperature"] is None
    assert same_bits(number["grad_query"], losses(case, backend)["grad_query"])


@every_backend
@each_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_value_and_gradients_in_one_call_are_autograds(backend, dtype, symmetric):
    case = several(6, 19, 24, 3, dtype)
    for frozen in ((), (0,), (1,)):
        for reduction in ("mean", "sum", "none"):
            leaves = [*case.leaves, heat(torch.float32).requires_grad_()]
            for i in frozen:
                leaves[i].requires_grad_(False)
            more = {"reduction": reduction, "symmetric": symmetric}
            options = case.options | {"temperature": leaves[2], "backend": backend} | more
            loss = info_nce(*leaves[:2], case.target, **options)
            loss.sum().backward()
            found = losses(case, backend, temperature=leaves[2].detach(), **more)
            assert same_bits(found["loss"], loss.detach())
            for x, name in zip(leaves, [*found][1:], strict=True):
                assert x.grad is None if not x.requires_grad else same_bits(x.grad, found[name])


@every_backend
@each_dtype
def test_reward_and_gradients_in_one_call_are_autograds(backend, dtype):
    case = several(6, 19, 24, 3, dtype)
    options = case.options | {"head": 4, "backend": backend} | OPEN_HINGE
    for weight in (None, torch.randn(6), torch.tensor([0.5]), torch.tensor(2.0)):
        leaves = case.leaves
        result = in_batch_ranking_reward(*leaves, case.target, **options)
        scale = 1.0 if weight is None else weight.to(result.reward.dtype)
        (result.reward * scale).sum().backward()
        found = rewards(case, backend, weight=weight if weight is None else scale)
        for name, value in result._asdict().items():
            assert same_bits(found[name], value.detach()), name
        assert same_bits(found["grad_query"], leaves[0].grad)
        assert same_bits(found["grad_candidates"], leaves[1].grad)


@every_backend
@each_dtype
def test_a_query_without_a_positive_does_not_count(backend, dtype):
    case = several(6, 19, 24, 3, dtype)
    case.target[3] = -1  # as the last
    assert ((case.target < 0).all(1).tolist()) == [False, False, False, True, False, True]
    kept = torch.tensor([0, 1, 2, 4])
    row, column = case.options["excluded"].unbind(1)
    place = torch.tensor([0, 1, 2, -1, 3, -1])[row]
    pairs = torch.stack([place, column], dim=1)[place >= 0]
    few = Case(case.query[kept], case.candidates, case.target[kept], case.options)
    few = few.but(excluded=pairs)
    for name in PER_POSITIVE:
        found = statistics(case, backend)[name]
        assert same_bits(found[kept], statistics(few, backend)[name])
        assert (found[[3, 5]] == (-math.inf if name == "target_score" else 0)).all()
    for op, more in ((losses, {"symmetric": False}), (losses, {}), (rewards, {})):
        whole, part = (op(x, backend, **more) for x in (case, few))
        for name in ("loss",) if op is losses else ("reward", "margin_reward", "rank_reward"):
            torch.testing.assert_close(whole[name][kept], part[name], rtol=1e-6, atol=1e-7)
            assert same_bits(whole[name][kept], part[name]) or (op is losses and not more), name
            assert (whole[name][[3, 5]] == 0).all(), name
        assert (whole["grad_query"][[3, 5]] == 0).all()
        eps = torch.finfo(dtype).eps
        for name, rows in (("grad_query", kept), ("grad_candidates", slice(None))):
            torch.testing.assert_close(whole[name][rows], part[name], rtol=eps, atol=eps)
    for symmetric in (False, True):
        both = [losses(x, backend, symmetric=symmetric, reduction="mean") for x in (case, few)]
        torch.testing.assert_close(both[0]["loss"], both[1]["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(both[0]["grad_query"][kept], both[1]["grad_query"])


@every_backend
@each_dtype
def test_no_query_with_a_positive(backend, dtype):
    """The mean over none is NaN, and nothing has a gradient."""
    case = several(4, 9, 24, 3, dtype)
    case.target.fill_(-1)
    for symmetric in (False, True):
        for reduction, value in (("mean", math.nan), ("sum", 0.0), ("none", 0.0)):
            leaves = case.leaves
            loss = info_nce(
                *leaves,
                case.target,
                symmetric=symmetric,
                reduction=reduction,
                backend=backend,
                **case.options,
            )
            assert same_bits(loss.detach(), torch.full_like(loss, value).detach())
            found = losses(case, backend, symmetric=symmetric, reduction=reduction)
            assert same_bits(found["loss"], loss.detach())
            assert not any(found[name].any() for name in [*found][1:])
            if reduction != "mean":
                loss.sum().backward()
                assert not any(x.grad.any() for x in leaves)
    found = rewards(case, backend)
    assert not any(found[name].any() for name in ("reward", "grad_query", "grad_candidates"))


@in_chunks
def test_chunks_and_threads_change_no_bit(backend):
    """Of the statistics and one direction's losses; the gradients' sums are of other chunks."""
    case = several(200, 1400, 4, 2, torch.float32, given=("excluded", "max_score"))
    before, results = torch.get_num_threads(), []
    try:
        for threads, workspace_mb in ((1, 1), (3, 1), (2, 256)):
            torch.set_num_threads(threads)
            found = losses(case, backend, symmetric=False, workspace_mb=workspace_mb)
            results.append((found, statistics(case, backend), workspace_mb))
    finally:
        torch.set_num_threads(before)
    for found, counts, workspace_mb in results[1:]:
        for name, value in counts.items():
            assert same_bits(value, results[0][1][name]), name
        assert same_bits(found["loss"], results[0][0]["loss"])
        for name in ("grad_query", "grad_candidates"):
            if workspace_mb == 1:
                assert same_bits(found[name], results[0][0][name])
            torch.testing.assert_close(found[name], results[0][0][name], rtol=1e-5, atol=2e-6)
