"""The grouped reward among torch's own machinery, on every backend: gradients, compile, modes."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from elva_kernels import (
    RankingRewardLoss,
    ranking_reward,
    ranking_reward_and_grad,
    reference,
    reward_from_scores,
)
from elva_kernels.backends.table import LAUNCHERS
from tests.kernels.cases import (
    BACKENDS,
    OPEN_HINGE,
    SOFT_RANKS,
    each_compiler,
    embeddings,
    relevance_of,
    same_bits,
)

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
SCALARS = (0.1, 0.01, 0.4, 0.6)
OPS = torch.ops.elva_kernels
# The first and the last hold every value: the rest is thorough.
OPCHECKED = [*itertools.product((torch.bfloat16, torch.float64), (False, True), (0.0, 0.05))]


def leaves(*leading, n=4, d=6, dtype=torch.float64):
    return [x.requires_grad_() for x in embeddings(leading, n, d, dtype)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weights", [OPEN_HINGE, SOFT_RANKS], ids=["hard", "soft"])
@pytest.mark.parametrize("graded", [False, True])
def test_gradcheck(backend, weights, masked, graded):
    mask = torch.rand(3, 4) < 0.6 if masked else None
    relevance = relevance_of(graded, 3, 4, dtype=torch.float64)
    options = {"mask": mask, "relevance": relevance, "backend": backend} | weights

    def reward(*inputs):
        return ranking_reward(*inputs, **options).reward

    assert torch.autograd.gradcheck(reward, leaves(3))
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: reward_from_scores(s, **options).reward, [scores])


@pytest.mark.parametrize("weights", [OPEN_HINGE, SOFT_RANKS], ids=["hard", "soft"])
def test_gradcheck_of_shared_tensors(backend, weights):
    query, positive, _ = leaves(2, 3)
    negatives = leaves(n=4)[2]
    shared = [query, positive.detach()[:1].requires_grad_(), negatives]
    assert torch.autograd.gradcheck(
        lambda *x: ranking_reward(*x, backend=backend, **weights).reward, shared
    )


@pytest.mark.parametrize(
    ("dtype", "shared", "rank_temperature"),
    [
        OPCHECKED[0],
        *(pytest.param(*x, marks=pytest.mark.thorough) for x in OPCHECKED[1:-1]),
        OPCHECKED[-1],
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_opcheck(backend, dtype, shared, rank_temperature):
    query, positive, negatives = embeddings((3,), 5, 8, dtype)
    negatives = negatives[0] if shared else negatives
    mask = torch.rand(3, 5) < 0.7
    relevance = relevance_of(True, 3, 5, dtype=reference.compute_dtype(dtype))
    inputs = (query, positive, negatives, mask, None, relevance)
    plain = (query, positive, negatives, None, None, None)
    reward = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.randn(3, dtype=reward)
    weights = (*SCALARS, rank_temperature)
    rest, wrt = (weights, backend), (weights, (True, True, True), backend)
    saved = OPS.ranking_reward_saved(*inputs, *rest)[-1]
    assert saved.shape == (3, 2 * 5 + 3)
    scores = torch.randn(3, 6).to(dtype)
    calls = [
        (OPS.ranking_reward.default, (*inputs, *rest)),
        (OPS.ranking_reward_saved.default, (*inputs, *rest)),
        (OPS.ranking_reward_backward.default, (*inputs, saved, upstream, *wrt)),
        (OPS.ranking_reward_and_grad.default, (*inputs, upstream, *wrt)),
        (OPS.ranking_reward_and_grad.default, (*plain, None, *wrt)),
        (OPS.reward_from_scores.default, (scores, mask, relevance, *rest)),
        (OPS.reward_from_scores_backward.default, (scores, None, relevance, upstream, *rest)),
        (OPS.reward_from_scores_backward.default, (scores, mask, None, upstream, *rest)),
    ]
    for op, arguments in calls:
        if backend in LAUNCHERS[op.name().split("::")[1]]:
            torch.library.opcheck(op, arguments)


@each_compiler
def test_compiles_without_a_graph_break(backend, compiler):
    def loss(query, positive, negatives, mask, relevance):
        options = {"mask": mask, "relevance": relevance, "backend": backend}
        result = ranking_reward(query * 2, positive, negatives, **options)
        return -(result.reward * result.rank).mean(), result

    inputs, compiled_inputs = leaves(3, dtype=torch.float32), leaves(3, dtype=torch.float32)
    given = torch.rand(3, 4) < 0.8, relevance_of(True, 4, dtype=torch.float64)
    expected, result = loss(*inputs, *given)
    expected.backward()
    torch._dynamo.reset()
    actual, compiled_result = torch.compile(loss, fullgraph=True, backend=compiler)(
        *compiled_inputs, *given
    )
    actual.backward()
    for a, b in zip(compiled_result, result, strict=True):
        assert same_bits(a.detach(), b.detach())
    for a, b in zip(compiled_inputs, inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-7)


def test_compiles_value_and_grad_scores_and_the_loss(backend):
    relevance = relevance_of(True, 1, 4)

    def everything(query, positive, negatives, scores):
        values, *gradients = ranking_reward_and_grad(query, positive, negatives, backend=backend)
        loss = RankingRewardLoss(backend=backend)(query, positive, negatives, relevance=relevance)
        grades = relevance[0, torch.tensor([0, 1, 2, 3, 0])]
        reward = reward_from_scores(scores, relevance=grades, backend=backend).reward
        return values.reward, gradients, reward, loss

    inputs = [x.detach() for x in leaves(3, dtype=torch.float32)]
    scores, eager_scores = (torch.linspace(0, 1, 6).requires_grad_() for _ in range(2))
    expected = everything(*inputs, eager_scores)
    torch._dynamo.reset()
    actual = torch.compile(everything, fullgraph=True, backend="aot_eager")(*inputs, scores)
    assert same_bits(actual[0], expected[0])
    for a, b in zip(actual[1], expected[1], strict=True):
        assert same_bits(a, b)
    actual[2].backward()
    expected[2].backward()
    assert same_bits(scores.grad, eager_scores.grad)
    torch.testing.assert_close(actual[3], expected[3], rtol=0, atol=1e-7)


def test_compiles_with_dynamic_shapes_and_weights(backend):
    compiled = torch.compile(
        lambda *x, margin: ranking_reward(*x, margin=margin, backend=backend).reward,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for groups, n, margin in [(3, 4, 0.1), (5, 7, 0.1), (2, 9, -0.5)]:
        inputs = embeddings((groups,), n, 8, torch.float32)
        expected = ranking_reward(*inputs, margin=margin, backend=backend).reward
        assert same_bits(compiled(*inputs, margin=margin), expected)


def test_second_derivative_is_refused(backend):
    inputs = leaves(3)
    reward = ranking_reward(*inputs, backend=backend).reward
    (grad,) = torch.autograd.grad(reward.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^ranking_reward: .* must be differentiated once"):
        (grad.sum() + inputs[0].sum()).backward()
    scores = torch.randn(5, requires_grad=True)
    reward = reward_from_scores(scores, backend=backend).reward
    (grad,) = torch.autograd.grad(reward, scores, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^reward_from_scores: .* must be differentiated once"):
        grad.sum().backward()


def test_forward_mode_is_refused_and_never_silently_zero(backend):
    inputs = [x.detach() for x in leaves(3)]

    def reward(query):
        return ranking_reward(query, *inputs[1:], backend=backend).reward

    with pytest.raises(RuntimeError, match=r"^ranking_reward: .* in reverse mode"):
        torch.func.jvp(reward, (inputs[0],), (inputs[0],))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(5), torch.ones(5))
        with pytest.raises(RuntimeError, match=r"^reward_from_scores: .* in reverse mode"):
            reward_from_scores(dual, backend=backend)


def test_modes(backend):
    inputs = leaves(3, dtype=torch.float32)
    expected, *gradients = ranking_reward_and_grad(*inputs, backend=backend)
    assert not any(x.requires_grad for x in (*expected, *gradients))
    with torch.no_grad():
        assert not ranking_reward(*inputs, backend=backend).reward.requires_grad
    with torch.inference_mode():
        made_there = [x.clone() for x in inputs]
        for given in (inputs, made_there):
            actual, *actual_gradients = ranking_reward_and_grad(*given, backend=backend)
            assert same_bits(actual.reward, expected.reward)
            for a, b in zip(actual_gradients, gradients, strict=True):
                assert same_bits(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        result = ranking_reward(*inputs, backend=backend)
        assert result.reward.dtype == result.scores.dtype == torch.float32
        assert same_bits(result.scores, expected.scores)
        result.reward.sum().backward()
    torch.testing.assert_close(inputs[0].grad, gradients[0], rtol=0, atol=1e-7)


def test_parameters_and_frozen_candidates(backend):
    query, positive, negatives = embeddings((3,), 4, 6, torch.float32)
    parameter = torch.nn.Parameter(query)
    ranking_reward(parameter, positive, negatives, backend=backend).reward.sum().backward()
    expected = ranking_reward_and_grad(query, positive, negatives, backend=backend)[1]
    torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-7)


def test_tensor_changed_in_place_before_backward_is_noticed(backend):
    query, positive, negatives = leaves(3)
    base = query * 1
    reward = ranking_reward(base, positive, negatives, backend=backend).reward
    with torch.no_grad():
        base.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        reward.sum().backward()


def test_weight_of_another_dtype(backend):
    query, positive, negatives = leaves(3)
    weight = torch.rand(3, dtype=torch.bfloat16, requires_grad=True)
    gradients = ranking_reward_and_grad(query, positive, negatives, weight=weight, backend=backend)[
        1:
    ]
    doubled = ranking_reward_and_grad(
        query, positive, negatives, weight=weight.double() * 2, backend=backend
    )[1:]
    for a, b in zip(doubled, gradients, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-13, atol=1e-300)


def test_fake_tensors(backend):
    with FakeTensorMode():
        inputs = (torch.empty(3, 6), torch.empty(3, 6), torch.empty(3, 4, 6))
        result, *gradients = ranking_reward_and_grad(*inputs, backend=backend)
        assert result.scores.shape == (3, 5)
        assert gradients[2].shape == (3, 4, 6)


def test_module(backend):
    module = RankingRewardLoss(margin=0.2, backend=backend)
    inputs = leaves(3)
    mask = torch.rand(3, 4) < 0.7
    loss = module(*inputs, mask)
    expected = ranking_reward(*inputs, mask=mask, margin=0.2, backend=backend).reward
    assert loss == -expected.mean()
    loss.backward()
    assert inputs[0].grad.isfinite().all()
    assert "margin=0.2" in repr(module)


def test_large_offsets(backend):
    """Strides beyond 2^31 elements; the memory between the rows is never touched."""
    base = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    query, positive, negatives = embeddings((2,), 3, 16, torch.bfloat16)
    far = base.as_strided((2, 3, 16), (2**31, 16, 1))
    far.copy_(negatives)
    result, *gradients = ranking_reward_and_grad(query, positive, far, backend=backend)
    expected, *expected_gradients = ranking_reward_and_grad(
        query, positive, negatives, backend=backend
    )
    assert same_bits(result.scores, expected.scores)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert same_bits(a, b)
