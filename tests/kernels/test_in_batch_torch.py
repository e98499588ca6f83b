"""Several positives and left-out candidates among torch's own machinery, on every backend."""

import shutil

import pytest
import torch

from elva_kernels import (
    in_batch_ranking_reward,
    in_batch_ranking_reward_and_grad,
    info_nce,
    info_nce_and_grad,
    rank_statistics,
)
from elva_kernels.registered import in_batch as registered
from tests.kernels.cases import BACKENDS, OPEN_HINGE, batch, computing, same_bits
from tests.kernels.positives import Case

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
every_backend = pytest.mark.parametrize("backend", computing("info_nce", BACKENDS))
OPS = torch.ops.elva_kernels
# Everything at once: three positives, one twice, one left out, ids, pairs, a limit.
TARGET = torch.tensor([[3, 0, 5], [0, 0, -1], [6, 2, -1], [-1, -1, -1], [1, 3, 4]])
EVERYTHING = {
    "excluded": torch.tensor([[4, 0], [0, 2], [3, 3], [0, 2], [1, 6]]),
    "candidate_ids": torch.tensor([0, 1, 2, 3, 4, 4, 6, 1]),
    "max_score": 0.6,
}


def rows(dtype=torch.float64):
    """Without ties, where a reward would jump."""
    return batch(5, 8, 6, dtype)


def case(dtype=torch.float64):
    return Case(*rows(dtype), TARGET, EVERYTHING)


@every_backend
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_the_loss(backend, symmetric, reduction):
    heat = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def loss(query, candidates, temperature):
        return info_nce(
            query,
            candidates,
            TARGET,
            temperature=temperature,
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
            **EVERYTHING,
        )

    leaves = [*case().leaves, heat]
    assert torch.autograd.gradcheck(loss, leaves)
    (grad,) = torch.autograd.grad(loss(*leaves).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^info_nce: the loss must be differentiated once"):
        grad.sum().backward()


@every_backend
@pytest.mark.parametrize("head", [2, None])
def test_gradcheck_of_the_reward(backend, head):
    def reward(query, candidates):
        options = {"head": head, "backend": backend} | EVERYTHING | OPEN_HINGE
        return in_batch_ranking_reward(query, candidates, TARGET, **options).reward

    leaves = case().leaves
    assert torch.autograd.gradcheck(reward, leaves)
    (grad,) = torch.autograd.grad(reward(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^in_batch_ranking_reward: .* differentiated once"):
        grad.sum().backward()


@every_backend
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.thorough)],
    ids=lambda d: str(d)[6:],
)
def test_opcheck(backend, dtype):
    pairs = (*rows(dtype), TARGET, EVERYTHING["excluded"], EVERYTHING["candidate_ids"])
    heat = torch.tensor(0.1)
    torch.library.opcheck(OPS.rank_statistics.default, (*pairs, heat, 0.6, 3, backend))
    scalars = (3, tuple(OPEN_HINGE.values()), "in_batch_ranking_reward", backend)
    torch.library.opcheck(OPS.in_batch_ranking_reward.default, (*pairs, 0.6, *scalars))
    *_, rank, scores, index = registered.in_batch_ranking_reward(*pairs, 0.6, *scalars)
    upstream = torch.randn(5, dtype=scores.dtype)
    for wrt in ([True, True], [False, True], [True, False]):
        saved = (*pairs[:2], index, scores, rank, upstream, *scalars[:2], wrt, backend)
        torch.library.opcheck(OPS.in_batch_ranking_reward_backward.default, saved)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@every_backend
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_compiles_without_a_graph_break(backend, dynamic):
    def total(query, candidates, temperature, target, excluded, ids):
        options = {"excluded": excluded, "candidate_ids": ids, "backend": backend}
        result = in_batch_ranking_reward(query * 2, candidates, target, head=4, **options)
        found = rank_statistics(query, candidates, target, k=2, temperature=0.1, **options)
        loss = info_nce(
            query,
            candidates,
            target,
            temperature=temperature,
            symmetric=True,
            max_score=0.6,
            **options,
        )
        return loss - (result.reward * (found.rank * result.rank).sum(1)).mean(), found

    heat = torch.tensor(0.2)
    more = (TARGET, EVERYTHING["excluded"], EVERYTHING["candidate_ids"])
    both = [[*case(torch.float32).leaves, heat.clone().requires_grad_()] for _ in range(2)]
    expected, found = total(*both[0], *more)
    expected.backward()
    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual, compiled_found = compiled(*both[1], *more)
    actual.backward()
    for a, b in zip(compiled_found, found, strict=True):
        assert same_bits(a, b)
    assert same_bits(actual.detach(), expected.detach())
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@every_backend
def test_values_and_gradients_in_one_call_compile(backend):
    def both(query, candidates, temperature, weight):
        options = {"backend": backend} | EVERYTHING
        loss = info_nce_and_grad(
            query, candidates, TARGET, temperature=temperature, wrt=("query",), **options
        )
        reward = in_batch_ranking_reward_and_grad(
            query, candidates, TARGET, weight=weight, wrt=("candidates",), **options
        )
        return *loss, *reward[0], *reward[1:]

    arguments = (*rows(torch.float32), torch.tensor(0.2), torch.randn(5))
    expected = both(*arguments)
    torch._dynamo.reset()
    actual = torch.compile(both, fullgraph=True, backend="aot_eager")(*arguments)
    assert [x is None for x in actual] == [x is None for x in expected]
    assert [x is None for x in expected] == [*[False] * 2, True, *[False] * 6, True, False]
    for a, b in zip(actual, expected, strict=True):
        assert a is None or same_bits(a, b)


@every_backend
def test_modes(backend):
    """Neither inference mode nor autocast changes a bit."""
    leaves = case(torch.float32).leaves
    options = {"symmetric": True, "backend": backend} | EVERYTHING
    expected = info_nce(*leaves, TARGET, **options)
    gradients = torch.autograd.grad(expected, leaves)
    with torch.inference_mode():
        loss, *found, _ = info_nce_and_grad(*leaves, TARGET, **options)
        assert same_bits(loss, expected.detach())
        assert all(same_bits(a, b) for a, b in zip(found, gradients, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(*leaves, TARGET, **options)
        assert same_bits(loss.detach(), expected.detach())
        for a, b in zip(torch.autograd.grad(loss, leaves), gradients, strict=True):
            assert same_bits(a, b)


Q, C = torch.randn(3, 8), torch.randn(5, 8)
WRONG = [
    ({"target": torch.tensor([[0, 1], [2, 5], [1, 1]])}, ValueError, "got 5 at [1, 1]; give each"),
    (
        {"target": torch.tensor([[0, 1], [2, 3], [-2, 9]])},
        ValueError,
        "got -2 at [2, 0]; give each",
    ),
    ({"target": torch.zeros(3, 1, 1).long()}, ValueError, "target must have shape [B] or [B, P]"),
    ({"target": torch.ones(3, 2).bool()}, TypeError, "target must hold integers, got torch.bool"),
    ({"excluded": torch.tensor([[2, 1], [-1, 0]])}, ValueError, "queries in [0, 3), got [-1, 0]"),
    (
        {"excluded": torch.tensor([[2, 1], [0, -1]])},
        ValueError,
        "candidates in [0, 5), got [0, -1]",
    ),
    (
        {"target": TARGET[:3].clamp(max=4), "excluded": torch.tensor([[1, 3], [2, 2]])},
        ValueError,
        "excluded must name no positive, got [2, 2]; drop the pair, or the candidate from the",
    ),
    (
        {"excluded": torch.zeros(2, 3).long()},
        ValueError,
        "excluded must have shape [E, 2], a query",
    ),
    ({"candidate_ids": torch.zeros(5)}, TypeError, "candidate_ids must hold integers, got torch.f"),
    (
        {"candidate_ids": torch.zeros(5, 1).long()},
        ValueError,
        "candidate_ids must have shape [M] =",
    ),
    ({"max_score": float("inf")}, ValueError, "max_score must be finite, got inf"),
]
GRADIENTS = [
    ({"wrt": "query"}, TypeError, "wrt must be a tuple of names, got str 'query'; use ('query',)"),
    ({"wrt": None}, TypeError, "wrt must be a tuple of names, got None"),
    (
        {"wrt": ("query", "positive")},
        ValueError,
        "wrt must name some of query, candidates, got 'po",
    ),
]
EVERY_OP = [
    rank_statistics,
    in_batch_ranking_reward,
    in_batch_ranking_reward_and_grad,
    info_nce,
    info_nce_and_grad,
]


@pytest.mark.parametrize("op", EVERY_OP)
def test_errors(op):
    wrong = WRONG + (GRADIENTS if op.__name__.endswith("_and_grad") else [])
    for change, error, text in wrong:
        with pytest.raises(error) as caught:
            op(**({"query": Q, "candidates": C} | change))
        message = str(caught.value)
        # What only values show is found by the op that computes both the value and the gradient.
        assert message.split(": ")[0] in (op.__name__, op.__name__.removesuffix("_and_grad"))
        assert text in message
        assert "\n" not in message


def test_errors_of_a_weight():
    for weight, error, text in [
        (torch.ones(2), ValueError, "weight must "),
        (torch.ones(3).long(), TypeError, "weight must "),
        (torch.ones(3, device="meta"), ValueError, "weight must be on "),
    ]:
        with pytest.raises(error) as caught:
            in_batch_ranking_reward_and_grad(Q, C, weight=weight)
        assert str(caught.value).startswith(f"in_batch_ranking_reward_and_grad: {text}")
