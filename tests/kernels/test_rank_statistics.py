"""The contract of the in-batch statistics, on every backend; what every in-batch op refuses."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elva_kernels import (
    in_batch_ranking_reward,
    rank_statistics,
    reference,
)
from tests import tolerances
from tests.kernels.cases import (
    BACKENDS,
    BATCH_SHAPES,
    DTYPES,
    EVERY_LEVEL,
    INTERPRETED,
    batch,
    computing,
    cosines,
    every_score,
    exact_negatives,
    lattice,
    layouts,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
every_level = pytest.mark.parametrize(
    "backend", computing("rank_statistics", EVERY_LEVEL), indirect=True
)
every_backend = pytest.mark.parametrize("backend", computing("rank_statistics", BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
OPS = torch.ops.elva_kernels
# B, M, D: a copy stands at every place in turn, so that M calls are made.
COPIED = [(1, 9, 48), (3, 35, 67)] if INTERPRETED else [(1, 67, 48), (13, 131, 257), (50, 70, 9)]


def check(found, scores, negative, target, k, temperature):
    """Every field is what `scores` and `negative` say, exactly; the logsumexp up to rounding."""
    for i, t in enumerate(target.tolist()):
        own = scores[i, t]
        live = [(-scores[i, j].item(), j) for j in negative[i].nonzero().flatten().tolist()]
        live.sort()
        assert found.n_greater[i] == sum(-s > own for s, _ in live)
        assert found.n_equal[i] == sum(-s == own for s, _ in live)
        assert found.rank[i] == 1 + found.n_greater[i] + found.n_equal[i]
        assert found.target_score[i] == own
        first = (live + [(math.inf, -1)] * scores.shape[1])[: min(k, scores.shape[1])]
        assert found.topk_scores[i].tolist() == [-s for s, _ in first]
        assert found.topk_index[i].tolist() == [j for _, j in first]
        hardest = live[0] if live else (math.inf, -1)
        assert (-found.hardest_score[i].item(), found.hardest_index[i].item()) == hardest
        logits = torch.tensor([own.item(), *(-s for s, _ in live)], dtype=torch.float64)
        exact = (logits / temperature).logsumexp(0)
        error = abs(found.logsumexp[i].double() - exact)
        assert error <= 4 * torch.finfo(scores.dtype).eps * (
            1 / temperature + math.log(1 + len(live))
        )


@every_level
@each_dtype
@pytest.mark.parametrize(("b", "m", "d"), BATCH_SHAPES)
def test_values(backend, dtype, b, m, d):
    query, candidates = batch(b, m, d, dtype)
    ids = torch.randint(0, max(1, m // 2), (m,))
    for target, given_ids, max_score, k in [
        (None, None, None, 3),
        (torch.randint(0, max(m, 1), (b,)), None, 0.3, m),
        (torch.randint(0, max(m, 1), (b,)).int(), ids, None, 1),
        (torch.randint(0, max(m, 1), (b,)), ids.int(), 0.1, m + 5),
    ]:
        rows = torch.arange(b) if target is None else target.long()
        found = rank_statistics(
            query,
            candidates,
            target,
            k=k,
            temperature=0.05,
            candidate_ids=given_ids,
            max_score=max_score,
            backend=backend,
        )
        scores = every_score(query, candidates, rows, backend)
        assert (
            (scores.double() - cosines(query, candidates)).abs() <= tolerances.BATCH[dtype]
        ).all()
        check(found, scores, exact_negatives(scores, rows, given_ids, max_score), rows, k, 0.05)
        assert not any(x.requires_grad or not x.is_contiguous() for x in found)
        assert found.rank.dtype == found.n_greater.dtype == found.n_equal.dtype == torch.int32
        assert found.topk_index.dtype == found.hardest_index.dtype == torch.int64


@every_level
@each_dtype
@pytest.mark.parametrize("d", [4, 64, 256, 1024])
def test_lattice_is_exact(backend, dtype, d):
    query, candidates = lattice(9, 70, d, dtype)
    candidates[69] = candidates[3]
    exact = (query.double() @ candidates.double().T / d).to(torch.float64)
    target = torch.randint(0, 70, (9,))
    target[0] = 3
    found = rank_statistics(query, candidates, target, k=70, temperature=1.0, backend=backend)
    exact = exact.to(found.target_score.dtype)
    check(found, exact, exact_negatives(exact, target), target, 70, 1.0)


@every_level
@each_dtype
@pytest.mark.parametrize(("b", "m", "d"), COPIED)
def test_a_copy_of_the_positive_ties_wherever_it_stands(backend, dtype, b, m, d):
    query, candidates = batch(b, m, d, dtype)
    for at in range(m):
        copied = candidates.clone()
        t = (at * 7 + 3) % m
        copied[at] = copied[t]
        found = rank_statistics(query, copied, torch.full((b,), t), backend=backend)
        assert (found.n_equal == (at != t)).all()
    collapsed = candidates[:1].expand(m, d)
    found = rank_statistics(query, collapsed, torch.full((b,), m // 2), k=m, backend=backend)
    assert (found.n_equal == m - 1).all()
    assert (found.rank == m).all()  # the worst rank, not the best
    order = [j for j in range(m) if j != m // 2]
    assert (found.topk_index[:, :-1] == torch.tensor(order)).all()


@every_level
@each_dtype
def test_bits_depend_on_the_two_rows_alone(backend, dtype):
    b, m, d = (9, 35, 70) if INTERPRETED else (40, 90, 300)
    query, candidates = batch(b, m, d, dtype)
    target = torch.randint(0, m, (b,))
    scores = every_score(query, candidates, target, backend)
    order = torch.randperm(m)
    place = order.argsort()
    permuted = every_score(query, candidates[order], place[target], backend)
    assert same_bits(permuted, scores[:, order])
    for i in (0, b // 3, b - 1):
        assert same_bits(
            every_score(query[i : i + 1], candidates, target[i : i + 1], backend)[0], scores[i]
        )
    t = target[7].item()
    alone = rank_statistics(query[7:8], candidates[t : t + 1], backend=backend)
    assert same_bits(alone.target_score, scores[7, t : t + 1])
    scaled = [
        x * torch.exp2(torch.randint(0, 5, (len(x), 1))).to(dtype) for x in (query, candidates)
    ]
    assert same_bits(every_score(*scaled, target, backend), scores)
    signs = (torch.randint(0, 2, (d,)) * 2 - 1).to(dtype)
    assert same_bits(every_score(query * signs, candidates * signs, target, backend), scores)


@every_backend
@each_dtype
def test_rows_of_any_magnitude(backend, dtype):
    info = torch.finfo(dtype)
    for low, high in [(info.smallest_normal * info.eps, info.max), (info.tiny, info.max / 2)]:
        ones = torch.ones(1, 32, dtype=dtype)
        query = torch.cat([ones * low, ones * high, ones])
        candidates = torch.cat([ones * high, ones * low, -ones * high])
        scores = every_score(query, candidates, torch.arange(3), backend)
        exact = torch.tensor([1.0, 1.0, -1.0], dtype=scores.dtype).expand(3, 3)
        assert ((scores - exact).abs() <= tolerances.BATCH[dtype]).all()
        assert (scores.abs() <= 1).all()


@every_level
@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_and_zero_rows(backend, dtype, bad):
    query, candidates = batch(6, 40, 24, dtype)
    clean = rank_statistics(query, candidates, k=40, temperature=0.1, backend=backend)
    query[1, 3] = bad
    candidates[2, 5] = bad  # the positive of query 2
    candidates[30, 0] = bad  # nobody's
    candidates[4] = 0
    query[5] = 0
    found = rank_statistics(query, candidates, k=40, temperature=0.1, backend=backend)
    assert found.target_score.isnan().tolist() == [False, True, True, False, False, False]
    assert found.logsumexp.isnan().tolist() == [False, True, True, False, False, False]
    assert (found.rank[1:3] == 40).all()
    assert found.n_equal[1:3].tolist() == [39, 1]
    assert found.target_score[4:].tolist() == [0, 0]
    assert found.n_equal[5] == 37  # a zero query scores 0 with every finite candidate
    assert not found.topk_scores.isnan().any()
    assert found.hardest_index[1] == -1
    assert found.hardest_score[1] == -math.inf
    for i in (0, 3):
        gone = {2, 4, 30, -1}
        before = [j for j in clean.topk_index[i].tolist() if j not in gone]
        assert [j for j in found.topk_index[i].tolist() if j not in (4, -1)] == before
        assert same_bits(found.target_score[i], clean.target_score[i])


@every_backend
@each_dtype
def test_layouts(backend, dtype):
    query, candidates = batch(7, 21, 37, dtype)
    target, ids = torch.randint(0, 21, (7,)), torch.randint(0, 9, (21,))
    options = {"k": 5, "temperature": 0.07, "backend": backend}
    expected = rank_statistics(query, candidates, target, candidate_ids=ids, **options)
    spread = torch.stack([target, target * 0 + 99], dim=1)[:, 0]
    for q, c in zip(layouts(query).values(), layouts(candidates).values(), strict=True):
        kept = [x.clone() for x in (q, c)]
        found = rank_statistics(q, c, spread, candidate_ids=ids, **options)
        for a, b in zip(found, expected, strict=True):
            assert same_bits(a, b)
        assert all(same_bits(a, b) for a, b in zip((q, c), kept, strict=True))
    wide = rank_statistics(query[:1].expand(7, 37), candidates, target, **options)
    single = rank_statistics(query[:1], candidates, target[3:4], **options)
    assert same_bits(wide.topk_scores[3], single.topk_scores[0])


Q, C = torch.randn(3, 8), torch.randn(5, 8)
ERRORS = [
    ({"query": Q[0]}, ValueError, "query must have shape [B, D], got shape [8]"),
    ({"query": Q[None]}, ValueError, "query must have shape [B, D], got shape [1, 3, 8]; use"),
    ({"candidates": C.half()}, TypeError, "candidates must have query's dtype torch.float32"),
    ({"candidates": C[:, :4]}, ValueError, "candidates must have query's D = 8, got shape [5, 4]"),
    ({"candidates": C.to("meta")}, ValueError, "candidates must be on the first tensor's device"),
    ({"query": Q[:, :0], "candidates": C[:, :0]}, ValueError, "query must have D >= 1"),
    ({"candidates": C[:2]}, ValueError, "target must be given where queries (3) outnumber"),
    ({"target": [0, 1, 2]}, TypeError, "target must be a tensor [B] or [B, P], got list"),
    ({"target": torch.zeros(3)}, TypeError, "target must hold integers, got torch.float32"),
    ({"target": torch.zeros(2).long()}, ValueError, "target must have shape [B] or [B, P] with"),
    ({"target": torch.zeros(3, 0).long()}, ValueError, "with B = 3 and P >= 1, got shape [3, 0]"),
    (
        {"target": torch.tensor([0, 5, 1])},
        ValueError,
        "of candidates, in [0, 5), got 5 at [1]; give",
    ),
    ({"target": torch.tensor([0, -1, 1])}, ValueError, "of candidates, in [0, 5), got -1 at [1];"),
    (
        {"target": torch.tensor([[0, 1], [-1, 2], [-2, 0]])},
        ValueError,
        "target must hold indices of candidates, in [0, 5) or -1 for none, got -2 at [2, 0];",
    ),
    ({"excluded": [[0, 1]]}, TypeError, "excluded must be a tensor [E, 2], got list"),
    ({"excluded": torch.zeros(3).long()}, ValueError, "excluded must have shape [E, 2], a query"),
    ({"excluded": torch.zeros(3, 2)}, TypeError, "excluded must hold integers, got torch.float32"),
    (
        {"excluded": torch.tensor([[0, 1], [3, 0]])},
        ValueError,
        "excluded must hold pairs of a query and a candidate, the queries in [0, 3), got [3, 0]",
    ),
    ({"excluded": torch.tensor([[1, 5]])}, ValueError, "the candidates in [0, 5), got [1, 5]"),
    (
        {"excluded": torch.tensor([[0, 1], [2, 2]])},
        ValueError,
        "excluded must name no positive, got [2, 2]; drop the pair",
    ),
    ({"candidate_ids": torch.zeros(3).long()}, ValueError, "candidate_ids must have shape [M] ="),
    ({"max_score": math.nan}, ValueError, "max_score must be finite, got nan"),
    ({"max_score": "1"}, TypeError, "max_score must be a number, got str '1'"),
    ({"backend": "gpu"}, ValueError, "backend must be one of auto, cpu"),
    ({"query": Q / 0, "check_finite": True}, ValueError, "query must be finite, got NaN or inf"),
]


@pytest.mark.parametrize("op", [rank_statistics, in_batch_ranking_reward])
@pytest.mark.parametrize(("change", "error", "text"), ERRORS, ids=lambda x: str(x)[:40])
def test_errors(op, change, error, text):
    with pytest.raises(error) as caught:
        op(**({"query": Q, "candidates": C} | change))
    message = str(caught.value)
    assert message.startswith(f"{op.__name__}: ")
    assert text in message
    assert "\n" not in message


def test_errors_of_their_own():
    for change, error, text in [
        ({"k": -1}, ValueError, "rank_statistics: k must be at least 0, got -1"),
        ({"k": 2.0}, TypeError, "rank_statistics: k must be an int, got float 2.0"),
        ({"temperature": 0}, ValueError, "rank_statistics: temperature must be at least 1e-06"),
    ]:
        with pytest.raises(error) as caught:
            rank_statistics(Q, C, **change)
        assert str(caught.value).startswith(text)
    with pytest.raises(ValueError, match="in_batch_ranking_reward: head must be at least 1, got 0"):
        in_batch_ranking_reward(Q, C, head=0)
    with pytest.raises(ValueError, match="target must hold indices of candidates, in \\[0, 0\\)"):
        rank_statistics(Q, C[:0], torch.zeros(3).long())


@every_backend
def test_many_heads_take_more_than_what_memory_is_kept_of(backend):
    query, candidates = batch(1400, 1400, 4, torch.float32)
    found = rank_statistics(query, candidates, k=100, backend=backend)
    assert found.topk_index.nbytes > 2**20
    scores = cosines(query, candidates).fill_diagonal_(-2)
    torch.testing.assert_close(
        found.topk_scores.double(), scores.topk(100).values, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        scores.gather(1, found.topk_index), found.topk_scores.double(), rtol=0, atol=1e-6
    )


def test_chunks_of_the_reference_change_nothing(monkeypatch):
    query, candidates = batch(9, 30, 16, torch.float32)
    expected = rank_statistics(query, candidates, k=4, temperature=0.1, backend="reference")
    monkeypatch.setattr("elva_kernels.reference.in_batch._CHUNK", 64)
    found = rank_statistics(query, candidates, k=4, temperature=0.1, backend="reference")
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(DTYPES))
    b, m, d = draw(st.integers(0, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = [torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (b, m)]
    if draw(st.booleans()):
        rows = [x.sign() for x in rows]  # ties
    tensors = [x.to(dtype) for x in rows]
    for x in tensors:
        for _ in range(draw(st.integers(0, 2))):
            if x.numel():
                value = draw(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 6e4, 1e-7]))
                x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    target = torch.randint(0, m, (b,), generator=generator)
    excluded = None
    if draw(st.booleans()):
        target = torch.randint(-1, m, (b, draw(st.integers(1, 7))), generator=generator)
        pairs = torch.randint(
            0, b * m or 1, (draw(st.integers(0, 9)) * (b > 0),), generator=generator
        )
        pairs = torch.stack([pairs // m, pairs % m], dim=1)
        excluded = pairs[(target[pairs[:, 0]] != pairs[:, 1:]).all(1)]
    ids = torch.randint(0, 5, (m,), generator=generator) if draw(st.booleans()) else None
    max_score = draw(st.sampled_from([None, 0.0, 0.5, 1.0, -2.0]))
    return *tensors, target, {"excluded": excluded, "candidate_ids": ids, "max_score": max_score}


@every_level
@given(case=cases(), k=st.integers(0, 45))
@settings(
    max_examples=5 if INTERPRETED else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_batch_agrees_with_its_own_scores(backend, case, k):
    query, candidates, target, options = case
    found = rank_statistics(
        query, candidates, target, k=k, temperature=0.2, backend=backend, **options
    )
    dtype = found.target_score.dtype
    m = len(candidates)
    # The scores one by one: each candidate as the only one beside itself.
    pairs = [(i, j) for i in range(len(query)) for j in range(m)]
    if not pairs:
        assert len(found.rank) == len(query)
        return
    scores = every_score_one_by_one(query, candidates, backend).to(dtype)
    targets = target if target.dim() == 2 else target.unsqueeze(1)
    again = reference.statistics_of_scores(
        scores,
        reference.Batch(targets, **options),
        k=k,
        temperature=torch.tensor(0.2, dtype=torch.float64),
    )
    for a, b in zip(found[:8], again[:8], strict=True):
        assert same_bits(a, b.reshape(a.shape))
    torch.testing.assert_close(
        found.logsumexp, again.logsumexp, rtol=1e-6, atol=1e-6, equal_nan=True
    )


def every_score_one_by_one(query, candidates, backend):
    columns = [
        rank_statistics(
            query, candidates[j : j + 1], torch.zeros(len(query)).long(), backend=backend
        )
        for j in range(len(candidates))
    ]
    return torch.stack([x.target_score for x in columns], dim=1)
