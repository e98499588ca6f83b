"""The ops among torch.func's transforms, on every backend: each is a plain loop to the last bit."""

import itertools

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from elva_kernels import (
    InfoNCELoss,
    RankingRewardLoss,
    group_advantages,
    in_batch_ranking_reward,
    in_batch_ranking_reward_and_grad,
    info_nce,
    info_nce_and_grad,
    rank_statistics,
    ranking_reward,
    ranking_reward_and_grad,
    reward_from_scores,
    topk,
)
from elva_kernels.backends import choice
from tests.kernels.cases import (
    BACKENDS,
    DTYPES,
    ON_FIBERS,
    OPEN_HINGE,
    SOFT_RANKS,
    batch,
    computing,
    embeddings,
    relevance_of,
    same_bits,
)
from tests.kernels.transforms import (
    check_gradient_of_a_batch,
    check_gradients_of_members,
    check_loop,
    eager_gradients,
)

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.filterwarnings("error::UserWarning"),  # torch's, where it has to loop itself
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
EXACT = torch.float32 if ON_FIBERS else torch.float64
MEMBERS, M = 3, 5  # of a batch, and rows of a bank


def members(make, count=MEMBERS):
    """What `make(seed)` gives for each member, stacked."""
    return tuple(torch.stack(x) for x in zip(*map(make, range(count)), strict=True))


@pytest.fixture
def launches(monkeypatch):
    """The ops that are launched, in order."""
    names, launcher = [], choice.launcher

    def counted(op, *rest):
        names.append(op)
        return launcher(op, *rest)

    monkeypatch.setattr("elva_kernels.registered.reward.launcher", counted)
    return names


# Of query, positive and negatives: leading dimensions of a member's; they broadcast.
LEADING = {
    "a group": ((), (), ()),
    "groups": ((2,), (2,), (2,)),
    "shared rows": ((2,), (), ()),
    "ragged": ((), (2,), (1, 2)),
}
IN_DIMS = [(0, 0, 0), (-1, 0, 1), (0, None, None), (None, None, 0), (None, 0, None)]


def given(leading, in_dims, dtype, n=4, d=6):
    """Inputs of `MEMBERS` members, or of all of them, with the members where `in_dims` says."""
    inputs = []
    for i, dim in enumerate(in_dims):
        whole = () if dim is None else (MEMBERS,)
        x = embeddings((*whole, *leading[i]), n, d, dtype, seed=i)[i]
        inputs.append(x if dim is None else x.movedim(0, dim))
    return inputs


def weighted(result):
    """A scalar to which each group contributes differently."""
    reward = result.reward
    return (reward * torch.arange(1, 1 + reward.numel()).view(reward.shape)).sum()


@every_backend
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("leading", LEADING)
def test_groups(backend, leading, in_dims):
    inputs = given(LEADING[leading], in_dims, torch.float32)

    def values(*x):
        return tuple(ranking_reward(*x, **OPEN_HINGE, backend=backend))

    def loss(*x):
        return weighted(ranking_reward(*x, **OPEN_HINGE, backend=backend))

    def at_once(*x):
        result, *gradients = ranking_reward_and_grad(*x, **OPEN_HINGE, backend=backend)
        return *result, *gradients

    check_loop(values, in_dims, *inputs)
    check_loop(at_once, in_dims, *inputs)
    check_gradients_of_members(loss, (0, 1, 2), in_dims, *inputs)
    check_gradients_of_members(loss, (0,), in_dims, *inputs)
    check_gradient_of_a_batch(loss, in_dims, *inputs, rtol=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_every_dtype_with_masks_and_soft_ranks(backend, dtype):
    in_dims = (0, None, 0, 1)
    inputs = given(LEADING["shared rows"], in_dims[:3], dtype)
    mask = torch.rand(2, MEMBERS, 4) < 0.7

    def loss(*x):
        return weighted(ranking_reward(*x[:3], mask=x[3], **SOFT_RANKS, backend=backend))

    check_gradients_of_members(loss, (0, 1, 2), in_dims, *inputs, mask)
    scores = torch.randn(MEMBERS, 5).to(dtype)

    def of_scores(x, live):
        return weighted(reward_from_scores(x, mask=live, **SOFT_RANKS, backend=backend))

    check_gradients_of_members(of_scores, (0,), (0, 1), scores, mask)
    check_gradients_of_members(of_scores, (0,), (None, 1), scores[0], mask)
    rtol = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-6)
    check_gradient_of_a_batch(of_scores, (None, 1), scores[0], mask, rtol=rtol)
    check_loop(
        lambda *x: tuple(reward_from_scores(x[0], mask=x[1], backend=backend)),
        (None, 1),
        scores[0],
        mask,
    )


@every_backend
@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None, 0), (None, None, None, 1, 0), (None, 0, None, None, -1)]
)
@pytest.mark.parametrize("of_bank", [False, True])
def test_a_relevance_a_member(backend, in_dims, of_bank):
    """Or one of all; beside a mask, and in the places of an index."""
    query, positive, negatives = given(LEADING["shared rows"], in_dims[:3], torch.float32)
    live = torch.rand(2, 4) < 0.7
    if in_dims[3] is not None:
        live = torch.rand(2, MEMBERS, 4) < 0.7
    relevance = relevance_of(True, 2, 4)
    if in_dims[4] is not None:
        relevance = relevance_of(True, MEMBERS, 2, 4).movedim(0, in_dims[4])
    index = torch.tensor([[0, 3, 3, 1], [2, 2, 0, -1]])
    options = {"backend": backend} | SOFT_RANKS
    options |= {"negative_index": index} if of_bank else {}

    def reward(q, p, n, m, g):
        return ranking_reward(q, p, n, mask=m, relevance=g, **options)

    def at_once(q, p, n, m, g):
        result, *gradients = ranking_reward_and_grad(q, p, n, mask=m, relevance=g, **options)
        return *result, *gradients

    arguments = (query, positive, negatives, live, relevance)
    check_loop(lambda *x: tuple(reward(*x)), in_dims, *arguments)
    check_loop(at_once, in_dims, *arguments)
    for argnums in ((0, 1, 2), (0,)):
        check_gradients_of_members(lambda *x: weighted(reward(*x)), argnums, in_dims, *arguments)


@pytest.mark.parametrize("backend", computing("reward_from_scores", BACKENDS))
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, -1), (None, 1)])
def test_a_relevance_of_scores_a_member(backend, in_dims):
    scores = torch.randn(MEMBERS, 2, 5)
    scores = scores[0] if in_dims[0] is None else scores.movedim(0, in_dims[0])
    relevance = relevance_of(True, MEMBERS, 2, 4)
    relevance = relevance[0] if in_dims[1] is None else relevance.movedim(0, in_dims[1])

    def reward(s, g):
        return reward_from_scores(s, relevance=g, **SOFT_RANKS, backend=backend)

    check_loop(lambda *x: tuple(reward(*x)), in_dims, scores, relevance)
    check_gradients_of_members(lambda *x: weighted(reward(*x)), (0,), in_dims, scores, relevance)


@every_backend
@pytest.mark.parametrize("bank_dim", [None, 0, 1])
@pytest.mark.parametrize("index_dim", [None, 0, -1])
@pytest.mark.parametrize("query_dim", [None, 1])
def test_banks(backend, query_dim, bank_dim, index_dim):
    """Of members a bank each, or one of all, and indices of 2 groups' 4 negatives, some of none."""
    in_dims = (query_dim, None, bank_dim, index_dim)
    if in_dims == (None,) * 4:
        return
    query, positive, bank = given(
        ((2,), (), ()), (query_dim, None, bank_dim), torch.float32, n=M, d=6
    )
    index = torch.randint(-1, M, (2, 4) if index_dim is None else (MEMBERS, 2, 4))
    if index_dim is not None:
        index = index.movedim(0, index_dim)

    def reward(q, p, n, i):
        return ranking_reward(q, p, n, negative_index=i, **OPEN_HINGE, backend=backend)

    def at_once(q, p, n, i):
        result, *gradients = ranking_reward_and_grad(
            q, p, n, negative_index=i, **OPEN_HINGE, backend=backend
        )
        return *result, *gradients

    arguments = (query, positive, bank, index)
    check_loop(lambda *x: tuple(reward(*x)), in_dims, *arguments)
    check_loop(at_once, in_dims, *arguments)
    for argnums in ((0, 1, 2), (0, 1)):
        check_gradients_of_members(lambda *x: weighted(reward(*x)), argnums, in_dims, *arguments)
    check_gradient_of_a_batch(lambda *x: weighted(reward(*x)), in_dims, *arguments, rtol=1e-5)


@every_backend
def test_a_batch_of_banks_in_a_batch_of_indices(backend):
    """Either one outside; each of the rows in its own bank."""
    query, positive, _ = embeddings((), 1, 6, EXACT)
    banks, index = torch.randn(2, M, 6, dtype=EXACT), torch.randint(-1, M, (3, 4))

    def loss(bank, i):
        return weighted(
            ranking_reward(query, positive, bank, negative_index=i, **OPEN_HINGE, backend=backend)
        )

    for f, tail in ((loss, ()), (grad(loss), (M, 6))):
        expected = torch.stack([f(b, i) for b, i in itertools.product(banks, index)])
        expected = expected.view(2, 3, *tail)
        inner = vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(banks, index)
        assert same_bits(inner, expected)
        outer = vmap(vmap(f, in_dims=(0, None)), in_dims=(None, 0))(banks, index)
        assert same_bits(outer.transpose(0, 1), expected)


def test_an_index_out_of_a_members_bank_is_named():
    query, positive, _ = embeddings((), 1, 6, torch.float32)
    banks, index = torch.randn(2, M, 6), torch.tensor([[0, 1], [2, M]])
    with pytest.raises(ValueError, match=rf"in \[0, {M}\), or -1 for none, got {M} at \[1, 1\]"):
        vmap(lambda b, i: ranking_reward(query, positive, b, negative_index=i).reward)(banks, index)


@every_backend
def test_a_batch_of_groups_is_one_launch(backend, launches):
    query, positive, negatives = given(LEADING["groups"], (0, 0, 0), torch.float32)

    def loss(q, p, n):
        return ranking_reward(q, p, n, backend=backend).reward.sum()

    vmap(loss)(query, positive, negatives)
    assert launches == ["ranking_reward"]
    launches.clear()
    vmap(grad(loss), in_dims=(0, 0, None))(query, positive, negatives[0])
    assert launches == ["ranking_reward_saved", "ranking_reward_backward"]
    launches.clear()
    vmap(vmap(grad(loss, argnums=2), in_dims=(0, None, 0)))(
        query[:2].unsqueeze(1), positive[:2], negatives[:2].unsqueeze(1)
    )
    assert launches == ["ranking_reward_saved", "ranking_reward_backward"]


@every_backend
def test_jacobians(backend):
    """Row i of a Jacobian is the gradient of result i; without a graph of the gradients too."""
    query, positive, negatives = given(LEADING["shared rows"], (None,) * 3, EXACT)
    scores = torch.randn(3, 5, dtype=EXACT)
    candidates, target = batch(4, 6, 5, EXACT)[1], torch.tensor([1, 0, 3])

    def each(q):
        return info_nce(q, candidates, target, reduction="none", symmetric=True, backend=backend)

    for f, x in [
        (lambda q: ranking_reward(q, positive, negatives, backend=backend).reward, query),
        (lambda n: ranking_reward(query, positive, n, backend=backend).reward, negatives),
        (lambda s: reward_from_scores(s, backend=backend).reward, scores),
        (lambda q: in_batch_ranking_reward(q, candidates, target, backend=backend).reward, scores),
        (each, scores),
        (lambda q: info_nce(q, candidates, target, backend=backend).view(1), scores),
    ]:
        expected = torch.stack(
            [eager_gradients(lambda y, f=f, i=i: f(y)[i], (0,))(x)[0] for i in range(len(f(x)))]
        )
        assert same_bits(jacrev(f)(x), expected)
        with torch.no_grad():
            assert same_bits(jacrev(f)(x), expected)
        pulled, pull = vjp(f, x)
        torch.testing.assert_close(pull(torch.ones_like(pulled))[0], expected.sum(0))


IN_BATCH = {
    "mean": lambda q, c, t, **o: info_nce(q, c, t, **o),
    "sum, both ways": lambda q, c, t, **o: info_nce(q, c, t, reduction="sum", symmetric=True, **o),
    "none": lambda q, c, t, **o: info_nce(q, c, t, reduction="none", max_score=0.9, **o).sum(),
    "reward": lambda q, c, t, **o: weighted(in_batch_ranking_reward(q, c, t, head=2, **o)),
}


@every_backend
@pytest.mark.parametrize("op", IN_BATCH)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (-1, None, 0), (None, 1, None), (None, None, 0)])
def test_batches(backend, op, in_dims):
    dtype = torch.bfloat16 if in_dims[0] == 0 else torch.float32
    query, candidates = members(lambda i: batch(3, 6, 5, dtype, seed=i))
    target = torch.tensor([[[0, -1], [1, 4], [2, 2]], [[3, 1], [-1, -1], [5, 0]], [[0, 1]] * 3])
    stacked = (query, candidates, target)
    arguments = [
        x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(stacked, in_dims, strict=True)
    ]

    def loss(q, c, t):
        return IN_BATCH[op](q, c, t, backend=backend)

    check_loop(lambda *x: (loss(*x),), in_dims, *arguments)
    check_gradients_of_members(loss, (0, 1), in_dims, *arguments)
    check_gradients_of_members(loss, (1,), in_dims, *arguments)
    check_gradient_of_a_batch(
        loss, in_dims, *arguments, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5
    )


@every_backend
def test_a_temperature_a_member(backend):
    query, candidates = batch(3, 6, 5, EXACT)
    heat = torch.tensor([0.1, 0.5, 2.0])

    def loss(q, t):
        return info_nce(q, candidates, temperature=t, backend=backend)

    check_gradients_of_members(loss, (0, 1), (None, 0), query, heat)


@every_backend
def test_what_has_no_gradient(backend):
    """Statistics, search, advantages and gradients in one call; their arguments may be followed."""
    query, candidates = members(lambda i: batch(3, 6, 5, torch.float32, seed=i))
    pairs = torch.tensor([[[0, 3], [2, 1]], [[1, 2], [0, 5]], [[2, 0], [2, 5]]])
    ids = torch.randint(0, 4, (6, MEMBERS))
    ids[:3] = torch.arange(4, 7)[:, None]

    def statistics(q, c, e, i):
        found = rank_statistics(
            q, c, k=2, excluded=e, candidate_ids=i, temperature=0.1, backend=backend
        )
        _, *gradients = in_batch_ranking_reward_and_grad(q, c, excluded=e, backend=backend)
        loss, *more, _ = info_nce_and_grad(q, c, candidate_ids=i, backend=backend)
        return *found, *gradients, loss, *more

    in_dims = (0, 0, 0, 1)
    check_loop(statistics, in_dims, query, candidates, pairs, ids)
    assert same_bits(
        grad(lambda q: (vmap(lambda x: topk(x, candidates[0], 2).scores)(q) + q[..., :2]).sum())(
            query
        ),
        torch.zeros_like(query).index_fill(-1, torch.arange(2), 1),
    )
    for in_dims in ((0, 0), (0, None), (None, 0), (1, None)):
        arguments = [
            x[0] if dim is None else x.movedim(0, dim)
            for x, dim in zip((query, candidates), in_dims, strict=True)
        ]
        check_loop(lambda *x: tuple(topk(*x, 4, backend=backend)), in_dims, *arguments)
    reward = torch.randn(2, 6, MEMBERS)
    for scale in ("std", "batch", "none"):
        check_loop(lambda x, s=scale: (group_advantages(x, scale=s),), (2,), reward)


@every_backend
@pytest.mark.parametrize("loss", [InfoNCELoss(learnable_temperature=True), RankingRewardLoss()])
def test_gradients_of_samples_through_an_encoder(backend, loss):
    """The norms that differentially private training clips: of each sample, by functional_call."""
    loss.backend = backend
    encoder = torch.nn.Linear(6, 4)
    model = torch.nn.ModuleDict({"encoder": encoder, "loss": loss})
    grouped = isinstance(loss, RankingRewardLoss)
    query, positive, negatives = embeddings((MEMBERS, 3), 4, 6, torch.float32)
    samples = (query, positive, negatives) if grouped else (query, negatives.flatten(1, 2))

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, *inputs):
            return loss(*(encoder(x) for x in inputs))

    whole = Whole()
    parameters = dict(whole.named_parameters())
    detached = {name: x.detach() for name, x in parameters.items()}
    found = vmap(
        grad(lambda p, *x: functional_call(whole, p, x)), in_dims=(None, *(0 for _ in samples))
    )(detached, *samples)
    assert len(found) == (2 if grouped else 3)
    for i in range(MEMBERS):
        expected = torch.autograd.grad(whole(*(x[i] for x in samples)), [*parameters.values()])
        for (name, a), b in zip(found.items(), expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-6, msg=name)


@every_backend
def test_nested_and_empty(backend):
    query, positive, negatives = embeddings((2, 3), 4, 6, torch.float32)

    def reward(*x):
        return ranking_reward(*x, **OPEN_HINGE, backend=backend).reward

    def loss(q, _, c):
        return info_nce(q.unsqueeze(0), c, torch.zeros(1).long(), backend=backend)

    for f, argnums in itertools.product((reward, loss), (None, 0, 2)):
        called = f if argnums is None else grad(f, argnums=argnums)
        once = vmap(called)(*(x.flatten(0, 1) for x in (query, positive, negatives)))
        twice = vmap(vmap(called))(query, positive, negatives)
        assert same_bits(twice.flatten(0, 1), once)
        # The second dimension outside, and a positive that the first shares.
        inner = vmap(called, in_dims=(0, None, 0))
        turned = vmap(inner, in_dims=(1, 0, 1), out_dims=1)(query, positive[0], negatives)
        assert same_bits(turned, vmap(vmap(called))(query, positive[:1].expand(2, 3, 6), negatives))
        none = vmap(called)(*(x[0, :0] for x in (query, positive, negatives)))
        assert none.shape == (0, *once.shape[1:])


@every_backend
def test_check_finite_looks_at_every_member(backend):
    query, positive, negatives = embeddings((MEMBERS, 2), 4, 6, torch.float32)
    negatives[1, 0, 3] = torch.nan

    def loss(*x):
        return ranking_reward(*x, check_finite=True, backend=backend).reward.sum()

    with pytest.raises(ValueError, match=r"^ranking_reward: negatives must be finite, got NaN"):
        vmap(loss)(query, positive, negatives)
    with pytest.raises(ValueError, match=r"^ranking_reward: negatives .* rows \[1, 0, 3\]$"):
        vmap(grad(loss))(query, positive, negatives)
    vmap(grad(loss))(query, positive, negatives.nan_to_num())


@every_backend
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_and_second_derivatives_are_refused(backend):
    """One line each: of the op, never torch's of a class that nobody knows."""
    query, positive, negatives = embeddings((2,), 4, 6, torch.float32)
    for op, result, f in [
        ("ranking_reward", "reward", lambda q: ranking_reward(q, positive, negatives)),
        ("reward_from_scores", "reward", lambda q: reward_from_scores(q)),
        ("in_batch_ranking_reward", "reward", lambda q: in_batch_ranking_reward(q, positive)),
        ("info_nce", "loss", lambda q: (info_nce(q, positive),)),
        ("info_nce", "loss", lambda q: (info_nce(q, positive, reduction="none"),)),
    ]:

        def value(q, f=f):
            return f(q)[0].sum()

        forward = rf"^{op}: the {result} must be differentiated in reverse mode, got a forward-mode"
        for call in (
            lambda v=value: jvp(v, (query,), (query,)),
            lambda v=value: jacfwd(v)(query),
            lambda v=value: hessian(v)(query),
            lambda v=value: jvp(vmap(v), (query[None],), (query[None],)),
        ):
            with pytest.raises(RuntimeError, match=forward):
                call()
        once = rf"^{op}: the {result} must be differentiated once, got a second derivative"
        for call in (
            lambda v=value: grad(lambda q: grad(v)(q).sum())(query),
            lambda v=value: vmap(grad(lambda q: grad(v)(q).sum()))(query[None]),
            lambda v=value: jacfwd(lambda w: grad(lambda q: w * v(q))(query))(torch.ones(())),
        ):
            with pytest.raises(RuntimeError, match=once):
                call()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(query, query)
            with pytest.raises(RuntimeError, match=forward):
                f(dual)


@every_backend
@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_transforms_are_outside_what_is_compiled(backend):
    """Compiled inside, a gradient would be 0: it is called as it is, or with fullgraph refused."""
    scores = torch.randn(MEMBERS, 5)

    def reward(x):
        return reward_from_scores(x, **OPEN_HINGE, backend=backend).reward

    for f in (grad(lambda x: reward(x).sum()), vmap(grad(reward))):
        torch._dynamo.reset()
        assert same_bits(torch.compile(f, backend="aot_eager")(scores), f(scores))
        torch._dynamo.reset()  # it has learnt to call it as it is
        with pytest.raises(RuntimeError, match="must be outside"):
            torch.compile(f, backend="aot_eager", fullgraph=True)(scores)
    outside = torch.compile(reward, backend="aot_eager", fullgraph=True)
    assert same_bits(outside(scores), vmap(reward)(scores))
