"""The contract of the in-batch reward, on every backend; and of the in-batch ops among torch's."""

import math
import shutil

import pytest
import torch

from elva_kernels import in_batch_ranking_reward, rank_statistics, reward_from_scores
from tests.kernels.cases import (
    BACKENDS,
    DTYPES,
    EVERY_LEVEL,
    OPEN_HINGE,
    WEIGHTS,
    batch,
    check_gradients,
    computing,
    cosines,
    every_score,
    exact_negatives,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
every_level = pytest.mark.parametrize(
    "backend", computing("in_batch_ranking_reward", EVERY_LEVEL), indirect=True
)
every_backend = pytest.mark.parametrize("backend", computing("in_batch_ranking_reward", BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
OPS = torch.ops.elva_kernels


def exact_reward(scores, target, negative, head, **weights):
    """The reward of one query at a time, from `reward_from_scores` where it has no head."""
    rewards = []
    for i, t in enumerate(target.tolist()):
        own = torch.cat([scores[i, t : t + 1], scores[i][negative[i]]]).double()
        result = reward_from_scores(own, backend="reference", **weights)
        ranked = own[1:].sort(descending=True).values
        places = torch.arange(1, len(own)) + (own[0] > ranked)
        beyond = places > head
        terms = ranked[beyond] * (places[beyond].double().log() - 1)
        rewards.append(result.reward + weights["w_rank"] * weights["rank_penalty"] * terms.sum())
    return torch.stack(rewards)


@every_level
@each_dtype
@pytest.mark.parametrize("head", [1, 7, None])
@pytest.mark.parametrize(("b", "m"), [(5, 9), (19, 45)])
def test_reward(backend, dtype, head, b, m):
    query, candidates = (x.requires_grad_() for x in batch(b, m, 40, dtype, signal=0.4))
    target, ids = torch.randint(0, m, (b,)), torch.randint(0, 2 * m // 3, (m,))
    for given_ids, max_score in [(None, None), (ids, 0.35)]:
        for weights in (WEIGHTS, OPEN_HINGE):
            options = {"candidate_ids": given_ids, "max_score": max_score, "backend": backend}
            result = in_batch_ranking_reward(
                query, candidates, target, head=head, **options, **weights
            )
            found = rank_statistics(query, candidates, target, k=head or m, **options)
            scores = every_score(query.detach(), candidates.detach(), target, backend)
            negative = exact_negatives(scores, target, given_ids, max_score)
            leaf = scores.double().requires_grad_()
            exact = exact_reward(leaf, target, negative, head or m, **weights)
            torch.testing.assert_close(result.reward.double(), exact, rtol=0, atol=2e-5)
            assert torch.equal(result.rank, found.rank)
            assert same_bits(result.scores[:, 0], found.target_score)
            assert same_bits(result.scores[:, 1:], found.topk_scores)
            weight = torch.randn(b, dtype=result.reward.dtype)
            gradients = torch.autograd.grad(result.reward, (query, candidates), weight)
            (slopes,) = torch.autograd.grad(exact, leaf, weight.double())
            exact_inputs = [x.detach().double().requires_grad_() for x in (query, candidates)]
            truths = torch.autograd.grad(cosines(*exact_inputs), exact_inputs, slopes)
            check_gradients(gradients, truths, [query.detach(), candidates.detach()], dtype)


@every_level
@each_dtype
def test_a_copy_of_the_positive_ties_and_wins(backend, dtype):
    query, candidates = batch(3, 9, 16, dtype)
    candidates[3:6] = candidates[:3]
    found = rank_statistics(query, candidates, backend=backend)
    assert (found.n_equal == 1).all()
    assert torch.equal(in_batch_ranking_reward(query, candidates, backend=backend).rank, found.rank)


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_its_own_pair_alone(backend, bad):
    def run(query, candidates):
        leaves = [x.clone().requires_grad_() for x in (query, candidates)]
        result = in_batch_ranking_reward(*leaves, head=5, backend=backend)
        result.reward.sum().backward()
        return result.reward.detach(), *(x.grad for x in leaves)

    query, candidates = batch(6, 30, 16, torch.float32)
    kept = torch.tensor([0, 3, 4, 5])
    query[1, 0] = candidates[2, 0] = candidates[20, 0] = bad
    reward, grad_query, grad_candidates = run(query, candidates)
    assert reward.isnan().tolist() == [False, True, True, False, False, False]
    assert grad_query.isnan().all(1).tolist() == reward.isnan().tolist()
    assert grad_candidates.isnan().all(1).nonzero().flatten().tolist() == [2, 20]
    assert grad_query[kept].isfinite().all()
    leaves = [x.clone().requires_grad_() for x in (query[kept], candidates)]
    alone = in_batch_ranking_reward(*leaves, kept, head=5, backend=backend)
    alone.reward.sum().backward()
    assert same_bits(alone.reward.detach(), reward[kept])
    torch.testing.assert_close(leaves[1].grad, grad_candidates, rtol=0, atol=1e-7, equal_nan=True)


@every_backend
def test_gradcheck_opcheck_and_once(backend):
    query, candidates = (x.requires_grad_() for x in batch(4, 7, 5, torch.float64))
    target, ids = torch.tensor([3, 0, 0, 6]), torch.tensor([0, 1, 2, 3, 4, 4, 6])

    def reward(q, c):
        return in_batch_ranking_reward(
            q, c, target, head=3, candidate_ids=ids, backend=backend, **OPEN_HINGE
        ).reward

    assert torch.autograd.gradcheck(reward, (query, candidates))
    (grad,) = torch.autograd.grad(reward(query, candidates).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^in_batch_ranking_reward: .* differentiated once"):
        grad.sum().backward()
    q, c = (x.detach() for x in (query, candidates))
    heat = torch.tensor(0.1)
    pairs = (q, c, target, torch.tensor([[0, 2]]), ids)
    torch.library.opcheck(OPS.rank_statistics.default, (*pairs, heat, 0.5, 3, backend))
    torch.library.opcheck(
        OPS.rank_statistics.default, (q, c, None, None, None, None, None, 99, backend)
    )
    scalars = (4, (0.1, 0.01, 0.4, 0.6), "in_batch_ranking_reward", backend)
    results = OPS.in_batch_ranking_reward(*pairs, 0.5, *scalars)
    torch.library.opcheck(OPS.in_batch_ranking_reward.default, (*pairs, 0.5, *scalars))
    upstream = torch.randn(4, dtype=torch.float64)
    for wrt in ([True, True], [False, True], [True, False]):
        head = (results[5], results[4], results[3], upstream, *scalars[:2], wrt, backend)
        torch.library.opcheck(OPS.in_batch_ranking_reward_backward.default, (q, c, *head))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@every_backend
def test_compiles_without_a_graph_break(backend):
    def loss(query, candidates, target):
        result = in_batch_ranking_reward(query * 2, candidates, target, head=4, backend=backend)
        found = rank_statistics(query, candidates, target, k=2, temperature=0.1, backend=backend)
        return -(result.reward * found.rank).mean(), found

    target = torch.tensor([4, 0, 1])
    inputs = [x.requires_grad_() for x in batch(3, 6, 8, torch.float32)]
    compiled_inputs = [x.detach().clone().requires_grad_() for x in inputs]
    expected, found = loss(*inputs, target)
    expected.backward()
    torch._dynamo.reset()
    actual, compiled_found = torch.compile(loss, fullgraph=True, backend="aot_eager")(
        *compiled_inputs, target
    )
    actual.backward()
    for a, b in zip(compiled_found, found, strict=True):
        assert same_bits(a, b)
    for a, b in zip(compiled_inputs, inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-7)
