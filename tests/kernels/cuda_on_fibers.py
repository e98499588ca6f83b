"""What the host has to show of the CUDA kernels beside the contract suite; see `test_cuda`."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from elva_kernels import (
    BackendUnavailable,
    info_nce,
    rank_statistics,
    reference,
)
from elva_kernels.backends import choice, cuda, steps, table
from elva_kernels.backends.admission import reward as admission_reward
from elva_kernels.backends.boundary import DTYPE_CODES
from elva_kernels.backends.cuda import in_batch as cuda_in_batch
from elva_kernels.backends.cuda import launch as cuda_launch
from elva_kernels.backends.cuda import products as cuda_products
from elva_kernels.backends.cuda import topk as cuda_topk
from elva_kernels.backends.cuda.products import float_product
from elva_kernels.backends.cuda.select import Best, Factors
from elva_kernels.backends.gpu.topk import best_of
from elva_kernels.backends.launcher import Groups
from elva_kernels.reference import Weights
from tests import tolerances
from tests.kernels.cases import (
    OPEN_HINGE,
    SOFT_RANKS,
    batch,
    check_gradients,
    embeddings,
    same_bits,
)
from tests.kernels.score_rows import (
    ScoreRows,
    check_results,
    on_fibers,
    on_fibers_in_products,
)

# N, D: what one, two, four and eight blocks hold in half a multiprocessor's memory, and more.
CLUSTERS = {
    "one": (3, 64),
    "one, ragged over warps": (37, 264),
    "two": (37, 2048),
    "four": (100, 1536),
    "eight": (100, 3584),
    "no room": (100, 12288),
    "more candidates than threads": (300, 8),
}
ORDERS = ["forwards", "reversed", "3"]  # of the fibers in a round; a number seeds a shuffle
LAUNCHERS = {op: row["cuda"] for op, row in table.LAUNCHERS.items() if "cuda" in row}


@pytest.fixture(autouse=True, params=ORDERS)
def order(request, monkeypatch):
    monkeypatch.setenv("ELVA_HOST_ORDER", request.param)


def launch(op, *inputs, relevance=None, **weights):
    """A launcher of the grouped reward, of negatives in their place and of all gradients."""
    query, positive, negatives, mask, *rest = inputs
    wrt = (reference.ALL,) if op in ("ranking_reward_and_grad", "ranking_reward_backward") else ()
    groups = Groups(query, positive, negatives, mask, None, relevance)
    return LAUNCHERS[op](groups, *rest, Weights(**weights), *wrt)


def grades(n, groups=3):
    """A relevance of each negative: of some 0 or 1."""
    return torch.rand(groups, n).mul(1.4).sub(0.2).clamp(0, 1)


def truth(inputs, mask, weight, relevance=None, **weights):
    exact = [x.double() for x in inputs]
    weight, relevance = (None if x is None else x.double() for x in (weight, relevance))
    return reference.ranking_reward_and_grad(
        *exact, mask, weight, Weights(**weights), relevance=relevance
    )


def check(found, inputs, mask, weight, relevance=None, **weights):
    right, *gradients = truth(inputs, mask, weight, relevance, **weights)
    reward, _, _, rank, scores, *ours = found
    live = torch.isfinite(right.scores)
    torch.testing.assert_close(scores[live].double(), right.scores[live], rtol=0, atol=1e-6)
    assert (scores.isneginf() == right.scores.isneginf()).all()
    exact = reference.reward_from_scores(
        scores.double(), mask, Weights(**weights), None if relevance is None else relevance.double()
    )
    assert torch.equal(rank, exact.rank)
    torch.testing.assert_close(reward.double(), exact.reward, rtol=2e-6, atol=2e-6, equal_nan=True)
    check_gradients(ours, gradients, inputs, inputs[0].dtype)


@pytest.mark.parametrize("shape", CLUSTERS)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("weights", [OPEN_HINGE, SOFT_RANKS], ids=["hard", "soft"])
@pytest.mark.parametrize("graded", [False, True])
def test_value_and_grad_of_every_cluster(shape, dtype, weights, graded):
    n, d = CLUSTERS[shape]
    inputs = embeddings((3,), n, d, dtype)
    mask = torch.rand(3, n) < 0.8
    inputs[2][~mask] = torch.nan  # never read
    weight = torch.tensor([0.7, -3.0, 0.0])
    weights = weights | {"relevance": grades(n).masked_fill(~mask, torch.nan) if graded else None}
    found = launch("ranking_reward_and_grad", *inputs, mask, weight, **weights)
    cleaned = (*inputs[:2], inputs[2].nan_to_num(0.0))
    check(found, cleaned, mask, weight, **weights)


@pytest.mark.parametrize("shape", CLUSTERS)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("weights", [OPEN_HINGE, SOFT_RANKS], ids=["hard", "soft"])
@pytest.mark.parametrize("capability", ["8", "9"])
def test_no_relevance_is_that_of_zero(shape, dtype, weights, capability, monkeypatch):
    """To the bit, by both ways: the kernels are two."""
    monkeypatch.setenv("ELVA_HOST_CAPABILITY", capability)
    n, d = CLUSTERS[shape]
    inputs = (*embeddings((3,), n, d, dtype), torch.rand(3, n) < 0.8, None)
    zeros = launch("ranking_reward_and_grad", *inputs, relevance=torch.zeros(3, n), **weights)
    none = launch("ranking_reward_and_grad", *inputs, **weights)
    for a, b in zip(zeros, none, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("capability", ["8", "9"])
@pytest.mark.parametrize("bad", [1.5, -0.1, torch.nan])
def test_a_relevance_out_of_range_makes_its_group_nan(bad, capability, monkeypatch):
    """A live one, the group's reward and its gradients; its rank and scores stay."""
    monkeypatch.setenv("ELVA_HOST_CAPABILITY", capability)
    for n, d in CLUSTERS.values():
        inputs = (*embeddings((3,), n, d, torch.float16), torch.ones(3, n, dtype=torch.bool), None)
        inputs[3][0, n - 1] = False
        relevance = grades(n)
        right = launch("ranking_reward_and_grad", *inputs, relevance=relevance, **SOFT_RANKS)
        relevance[0, n - 1] = relevance[1, n - 2] = bad
        found = launch("ranking_reward_and_grad", *inputs, relevance=relevance, **SOFT_RANKS)
        for place, (a, b) in enumerate(zip(found, right, strict=True)):
            whole = [0, 1, 2] if place in (3, 4) else [0, 2]
            assert same_bits(a[whole], b[whole])
            assert place in (3, 4) or a[1].isnan().all()


@pytest.mark.parametrize("capability", ["8", "9"])
@pytest.mark.parametrize(("hardest", "grade"), [(9, 0.25), (35, 0.0)])
def test_of_equal_rivals_the_first_is_the_hardest(hardest, grade, capability, monkeypatch):
    """Two copies of a row in 40, equal or not in what is left of their margins."""
    monkeypatch.setenv("ELVA_HOST_CAPABILITY", capability)
    query, positive, _ = embeddings((1,), 0, 16, torch.float32)
    negatives = (query * torch.tensor([1.0, -1.0]).repeat(8)).unsqueeze(1).repeat(1, 40, 1)
    negatives[:, [9, 35]] = positive.unsqueeze(1)
    relevance = torch.zeros(1, 40)
    relevance[0, 9], relevance[0, 35] = grade, 0.25
    inputs, weights = (query, positive, negatives, None, None), OPEN_HINGE | {"w_rank": 0.0}
    found = launch("ranking_reward_and_grad", *inputs, relevance=relevance, **weights)
    named = found[7][0].abs().amax(-1).nonzero()
    assert named.tolist() == [[hardest]]


def bank_of(n, d, dtype, rows=7):
    """Query, positive, a bank and the rows of it that three groups name, among them none."""
    query, positive, _ = embeddings((3,), 0, d, dtype)
    bank = (embeddings((), rows, d, dtype, seed=1)[2] + 0.3 * query[0]).to(dtype)
    index = torch.randint(0, rows, (3, n))
    index[torch.rand(index.shape) < 0.2] = -1
    return query, positive, bank, index


def run_indexed(query, positive, bank, index, wrt=reference.ALL, relevance=None, **weights):
    weight = torch.tensor([0.7, -3.0, 0.0])
    groups = Groups(query, positive, bank, None, index, relevance)
    return LAUNCHERS["ranking_reward_and_grad"](groups, weight, Weights(**weights), wrt)


@pytest.mark.parametrize("shape", CLUSTERS)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("capability", ["8", "9"])
def test_rows_of_a_bank_are_those_in_their_place(shape, dtype, capability, monkeypatch):
    """To the bit, by the cluster's copies and by two passes; the bank's sum to its rounding."""
    monkeypatch.setenv("ELVA_HOST_CAPABILITY", capability)
    n, d = CLUSTERS[shape]
    query, positive, bank, index = bank_of(n, d, dtype)
    mask, weight = index >= 0, torch.tensor([0.7, -3.0, 0.0])
    weights = OPEN_HINGE | {"relevance": grades(n).masked_fill(~mask, torch.nan)}
    found = run_indexed(query, positive, bank, index, **weights)
    placed = (query, positive, bank[index.clamp(min=0)], mask, weight)
    expected = launch("ranking_reward_and_grad", *placed, **weights)
    for a, b in zip(found[:7], expected[:7], strict=True):
        assert same_bits(a, b)
    right = truth(placed[:3], mask, weight, **weights)[3]
    total = torch.zeros(bank.shape, dtype=torch.float64)
    total.index_add_(0, index[mask], right[mask])
    norm = bank.double().norm(dim=-1, keepdim=True)
    named = index[mask].bincount(minlength=len(bank)).unsqueeze(-1)
    allowed = named * tolerances.GRADIENT[dtype] + tolerances.half_ulp(total, dtype) * norm
    assert ((found[7].double() - total).abs() * norm <= allowed).all()


@pytest.mark.parametrize("capability", ["8", "9"])
@pytest.mark.parametrize("indexed", [False, True])
def test_wanted_gradients_of_every_cluster_keep_their_bits(indexed, capability, monkeypatch):
    monkeypatch.setenv("ELVA_HOST_CAPABILITY", capability)
    for n, d in CLUSTERS.values():
        query, positive, bank, index = bank_of(n, d, torch.bfloat16)
        if not indexed:
            bank, index = bank[index.clamp(min=0)], None
        expected = run_indexed(query, positive, bank, index, **SOFT_RANKS)
        for wrt in itertools.product([False, True], repeat=3):
            found = run_indexed(query, positive, bank, index, wrt, **SOFT_RANKS)
            for a, b in zip(found[:5], expected[:5], strict=True):
                assert same_bits(a, b)
            for a, b, wanted in zip(found[5:], expected[5:], wrt, strict=True):
                assert same_bits(a, b) if wanted else a is None


@pytest.mark.parametrize("shape", CLUSTERS)
@pytest.mark.parametrize("graded", [False, True])
def test_less_memory_changes_no_bit(shape, graded, monkeypatch):
    """A GPU whose blocks have 99 KB takes two passes where a cluster's would need more."""
    inputs = embeddings((3,), *CLUSTERS[shape], torch.bfloat16)
    weights = OPEN_HINGE | {"relevance": grades(len(inputs[2][0])) if graded else None}
    expected = launch("ranking_reward_and_grad", *inputs, None, None, **weights)
    monkeypatch.setenv("ELVA_HOST_SHARED_KB", "99")
    with ThreadPoolExecutor(1) as fresh:  # a thread remembers what its device holds
        found = fresh.submit(
            launch, "ranking_reward_and_grad", *inputs, None, None, **weights
        ).result()
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("shape", CLUSTERS)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
def test_negatives_side_by_side_are_those_under_a_full_mask(shape, dtype):
    """To the bit: they come in one box, the others a row at a time; five groups on two clusters."""
    n, d = CLUSTERS[shape]
    inputs = embeddings((5,), n, d, dtype)
    full = torch.ones(5, n, dtype=torch.bool)
    boxed = launch("ranking_reward_and_grad", *inputs, None, None, **OPEN_HINGE)
    by_rows = launch("ranking_reward_and_grad", *inputs, full, None, **OPEN_HINGE)
    for a, b in zip(boxed, by_rows, strict=True):
        assert same_bits(a, b)
    check(boxed, inputs, full, None, **OPEN_HINGE)


@pytest.mark.parametrize("capability", ["8", "9"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
def test_passes_its_self_test_at_the_sizes_of_a_gpu(dtype, soft, capability, monkeypatch):
    """Twelve groups on two clusters."""
    monkeypatch.setenv("ELVA_HOST_CAPABILITY", capability)
    monkeypatch.setattr(admission_reward, "_DENSE_ON_CPU", (4, *admission_reward._DENSE[1:]))
    for op in ("ranking_reward_backward", "ranking_reward_and_grad"):
        admission_reward.TRIALS[op](LAUNCHERS.get, dtype, torch.device("cpu"), soft)


def sanitized_cases():
    yield from [((2,), 5, 48), ((3,), 0, 8), ((1,), 40, 2048), ((2,), 9, 33), ((1,), 3, 1)]


@pytest.mark.parametrize("case", sanitized_cases(), ids=str)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("graded", [False, True])
def test_sanitized(case, dtype, graded):
    """Both ways to the gradients, far and near rows; run under AddressSanitizer too."""
    leading, n, d = case
    weights = SOFT_RANKS | {"relevance": grades(n, *leading) if graded else None}
    for scale in (1.0, 2.0**-80 if dtype != torch.float16 else 2.0**-12):
        inputs = tuple((x * scale).to(dtype) for x in embeddings(leading, n, d, torch.float32))
        mask = torch.rand(*leading, n) < 0.7
        found = launch("ranking_reward_and_grad", *inputs, mask, None, **weights)
        check(found, inputs, mask, None, **weights)
        *values, saved = launch("ranking_reward_saved", *inputs, mask, **weights)
        upstream = torch.ones(leading)
        operands = (*inputs, mask, saved, upstream)
        gradients = launch("ranking_reward_backward", *operands, **weights)
        check((*values, *gradients), inputs, mask, None, **weights)
        for a, b in zip(values[:4], found[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [0, 9, 40])
@pytest.mark.parametrize("d", [33, 48, 2048])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
def test_sanitized_bank(n, d, dtype):
    """Rows that do not exist, a row that is not finite; the last row ends its memory."""
    query, positive, bank, index = bank_of(n, d, dtype)
    bank[2, 0] = torch.nan
    index[index == 2] = 3
    index[0, :1], index[2, 1:2], index[2, 3:4] = 6, -2, 10**12
    relevance = grades(n)
    found = run_indexed(query, positive, bank, index, relevance=relevance, **OPEN_HINGE)
    assert found[0].isnan().tolist() == [False, False, n > 1]
    saved = LAUNCHERS["ranking_reward_saved"]
    given = Groups(query, positive, bank, None, index, relevance)
    *values, coefficients = saved(given, Weights(**OPEN_HINGE))
    weight = torch.tensor([0.7, -3.0, 0.0])
    rest = (coefficients, weight, Weights(**OPEN_HINGE), reference.ALL)
    again = LAUNCHERS["ranking_reward_backward"](given, *rest)
    for a, b in zip((*values, *again), found, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 33), (35, 300, 264)], ids=str)
def test_sanitized_search(shape, dtype):
    """Ragged tiles of rows, queries and columns; a row far out, one not finite."""
    q, p, d = shape
    query, corpus = torch.randn(q, d).to(dtype), torch.randn(p, d).to(dtype)
    if p > 1:
        corpus[1] *= 2.0**-12 if dtype == torch.float16 else 2.0**-70
        corpus[p // 2, 0] = torch.nan
    for metric in ("cosine", "dot"):
        scores, index = LAUNCHERS["topk"](query, corpus, 10, metric=metric)
        right = reference.topk(query.double(), corpus.double(), 10, metric=metric)
        norms = query.double().norm(dim=1, keepdim=True) * corpus.double().nan_to_num().norm(dim=1)
        allowed = 1e-5 * (1.0 if metric == "cosine" else norms.gather(1, index))
        same = scores.double() == right.scores  # -inf is
        assert (same | ((scores.double() - right.scores).abs() <= allowed)).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 300, 33), (35, 70, 528)], ids=str)
def test_sanitized_codes(shape, masked):
    """Ragged tiles of rows, queries and columns; rows on 16 bytes and not, some not finite."""
    q, p, d = shape
    query, corpus = torch.randn(q, d), torch.randn(p, d)
    if p > 1:
        corpus[1], corpus[p // 2, 0], query[0], query[1, 0] = 0, torch.nan, 0, torch.inf
    asked, codes = reference.fine_codes(query), reference.row_codes(corpus)
    if masked:
        code = torch.cat([codes.code[0, :1], codes.code.flatten()])[1:]
        codes = codes._replace(code=code.view(p, d))
    mask = torch.arange(p) % 3 != 1 if masked else None
    exact = reference.score_bounds(asked, codes)
    exact = exact if mask is None else exact.where(mask, -torch.inf)
    for depth in {1, min(p, 20), p}:
        bounds, index = LAUNCHERS["nearest_codes"](asked, codes, depth, mask=mask, floor=None)
        right = exact.sort(dim=1, descending=True).values[:, :depth]
        torch.testing.assert_close(bounds, right, rtol=0, atol=1e-6)
        there = index >= 0
        own = exact.gather(1, index.clamp(min=0))
        torch.testing.assert_close(own[there], bounds[there], rtol=0, atol=1e-6)
        assert torch.equal(there, bounds > -torch.inf)


HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Three queries are many, and chunks have 192 rows and 64 queries at most."""
    monkeypatch.setattr(cuda_topk, "_SCAN_QUERIES", 2)
    monkeypatch.setattr(cuda_topk, "_WORKSPACE_BYTES", 4 * 200 * 35)
    monkeypatch.setattr(cuda_topk, "_QUERIES", 35)


@pytest.mark.parametrize("dtype", HALVES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 70, 33), (40, 430, 72)], ids=str)
def test_sanitized_search_by_products(shape, dtype, few_at_a_time):
    """Chunks that overlap, rows far out, zero and not finite; copies tie across all chunks."""
    q, p, d = shape
    query, corpus = torch.randn(q, d).to(dtype), torch.randn(p, d).to(dtype)
    if p > 1:
        corpus[::23] = corpus[5]
        corpus[1::29] = corpus[1] * 2.0 ** (-12 if dtype == torch.float16 else -70)
        corpus[p // 2, 0], corpus[p // 3 + 1, 1], corpus[p - 4] = torch.nan, -torch.inf, 0
        corpus[2] = corpus[6] if dtype == torch.float16 else corpus[6] * 2.0**60
        query[1, 0] = torch.inf
        query[2] *= 2.0 ** (-12 if dtype == torch.float16 else -50)
    for metric, k in itertools.product(("cosine", "dot"), (1, 10, 90)):
        scores, index = LAUNCHERS["topk"](query, corpus, k, metric=metric)
        k = min(k, p)
        right = reference.topk(query.double(), corpus.double(), k, metric=metric)
        norms = query.double().norm(dim=1, keepdim=True) * corpus.double().norm(dim=1)
        error = (scores.double() - right.scores).abs()
        allowed = 1e-5 * (1.0 if metric == "cosine" else norms.gather(1, index))
        assert ((scores.double() == right.scores) | (error <= allowed)).all()  # -inf is
        apart = torch.full((q, k), True)
        apart[:, :-1] &= right.scores.diff(dim=1) < -allowed_gap(right.scores)[:, 1:]
        apart[:, 1:] &= right.scores.diff(dim=1) < -allowed_gap(right.scores)[:, 1:]
        apart[:, -1] = False  # the next one is not known
        assert torch.equal(index[apart], right.index[apart])
        copies = (index.unsqueeze(2) == torch.arange(0, p, 23)).any(2)
        for own, places, many in zip(scores, index, copies, strict=True):
            assert (places[many].diff() > 0).all()
            assert len(own[many].unique()) <= 1


def allowed_gap(scores):
    return 1e-4 * scores.abs().nan_to_num(posinf=0.0, neginf=0.0)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_layouts_of_a_search_by_products_give_the_same_bits(metric, few_at_a_time):
    query, corpus = torch.randn(9, 40).bfloat16(), torch.randn(300, 40).bfloat16()
    right = LAUNCHERS["topk"](query, corpus, 50, metric=metric)
    wide = torch.zeros(300, 47, dtype=torch.bfloat16)
    wide[:, 3:43] = corpus
    for other in (
        wide[:, 3:43],
        corpus.T.contiguous().T,
        torch.cat([query[0, :3], corpus.flatten()])[3:].view(300, 40),
    ):
        found = LAUNCHERS["topk"](query, other, 50, metric=metric)
        assert all(same_bits(a, b) for a, b in zip(found, right, strict=True))


def scores_of(kind, rows, columns):
    scores = torch.randn(rows, columns)
    if kind == "few values":
        return scores.round()  # of which some are -0
    if kind == "equal":
        return torch.zeros(rows, columns)
    if kind == "infinite":
        scores[torch.rand(rows, columns) < 0.7] = -torch.inf
        scores[torch.rand(rows, columns) < 0.02] = torch.inf
        return scores
    return {"drawn": scores, "rising": scores.sort(1)[0], "falling": scores.sort(1)[0].flip(1)}[
        kind
    ]


@pytest.mark.parametrize("kind", ["drawn", "few values", "equal", "infinite", "rising", "falling"])
@pytest.mark.parametrize("columns", [1, 7, 1024, 5003, 40001])
def test_sanitized_select(kind, columns):
    """As `best_of`, to the bit: rows that begin anywhere on 16 bytes, in one part and in many."""
    rows = 3 if columns < 10000 else 1
    table = torch.full((rows, columns + 5), torch.inf)
    for offset, k in itertools.product((0, 1, 3), (1, 10, 100, 256)):
        scores = table[:, offset : offset + columns]
        scores.copy_(scores_of(kind, rows, columns))
        kept = min(k, columns)
        expected, places = best_of(scores, kept)
        found = Best("op", torch.empty(rows, kept), torch.empty(rows, kept, dtype=torch.int64))
        found.add(scores, 11)
        assert same_bits(found.scores, expected)
        assert torch.equal(found.index, places + 11)
        # The same in chunks, of which some are smaller than k, and without places for -inf.
        found = Best("op", found.scores, found.index, finite=True)
        step = max(1, columns // 3)
        for first in range(0, columns, step):
            found.add(scores[:, first : first + step], first)
        assert same_bits(found.scores, expected)
        assert torch.equal(found.index, torch.where(expected > -torch.inf, places, -1))


def test_a_selects_factors():
    """A row's that is NaN hides it; a column's that is negative leaves scores as they are."""
    scores = torch.randn(5, 3001)
    row, column = torch.rand(5), torch.rand(3001)
    row[1], row[3], column[8] = 1.0, torch.nan, -1.0
    for first, unit_columns in itertools.product((0, 1), (False, True)):
        limit = torch.inf if unit_columns else 0.5
        if unit_columns:
            column.copy_(column.sign())
        right = (scores * column * row.unsqueeze(1)).clamp(-limit, limit)
        right[3], right[:, 8] = -torch.inf, scores[:, 8]
        found = Best("op", torch.empty(5, 40), torch.empty(5, 40, dtype=torch.int64))
        found.add(scores[:, first:], first, Factors(row, column[first:], limit, unit_columns))
        expected, places = best_of(right[:, first:], 40)
        assert same_bits(found.scores, expected)
        assert torch.equal(found.index, places + first)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
def test_sanitized_batch(dtype):
    """Two chunks' worth of steps, with ids, a limit and rows that are zero or not finite."""
    query, candidates = batch(9, 21, 33, torch.float64)
    candidates[11], candidates[12, 5] = 0, torch.nan
    leaves = [x.to(dtype).requires_grad_() for x in (query, candidates)]
    ids = torch.arange(21) % 17
    for symmetric in (False, True):
        options = {"candidate_ids": ids, "max_score": 0.9, "symmetric": symmetric}
        loss = info_nce(*leaves, **options, backend="cuda")
        exact = [x.detach().double().requires_grad_() for x in leaves]
        right = info_nce(*exact, **options, backend="reference")
        torch.testing.assert_close(loss.double(), right, rtol=0, atol=2e-4)
        gradients = torch.autograd.grad(loss, leaves)
        truths = torch.autograd.grad(right, exact)
        for gradient, truth in zip(gradients, truths, strict=True):
            ulp = torch.finfo(dtype).eps
            torch.testing.assert_close(
                gradient.double(), truth, rtol=ulp, atol=2e-5, equal_nan=True
            )
    found = rank_statistics(*leaves, candidate_ids=ids, k=4, temperature=0.1, backend="cuda")
    again = rank_statistics(*exact, candidate_ids=ids, k=4, temperature=0.1, backend="reference")
    torch.testing.assert_close(found.topk_scores.double(), again.topk_scores, rtol=0, atol=1e-5)
    assert torch.equal(found.rank, again.rank)


@pytest.mark.parametrize("run", [on_fibers, on_fibers_in_products])
@pytest.mark.parametrize("positives", [1, 2, 6, 300])
def test_sanitized_score_rows(positives, run):
    case = ScoreRows(positives)
    check_results(case, *case.run(run))


def test_score_rows_that_take_several_steps_of_a_block():
    """The hardest is the first of the highest, whichever thread has it in whichever step."""
    query = torch.ones(1, 1)
    for places in ([0, 4099], [2051, 3], [5000, 2047, 4095], [1027, 1023], [4999]):
        candidates = torch.full((5001, 1), -1.0)
        candidates[places] = 1
        found = rank_statistics(query, candidates, torch.tensor([6]), temperature=1, backend="cuda")
        assert found.hardest_index == min(places)
        assert found.n_greater == len(places)
        assert found.n_equal == 5001 - 1 - len(places)
        exact = math.log(len(places) * math.e + (5001 - len(places)) / math.e)
        assert math.isclose(found.logsumexp, exact, rel_tol=1e-6)


class SlopeRows:
    """Masked products of rows in fp32, and the slopes that are made of them."""

    m, width, power = 2075, 2080, 30

    def __init__(self):
        self.inverses = [torch.rand(x) / 2**15 + 2.0**-15 for x in (3, self.width)]
        self.inverses[0][1], self.inverses[1][5] = 0, torch.nan
        scores = torch.rand(3, self.width) * 2 - 1
        self.masked = torch.rand(scores.shape) < 0.2
        self.masked[:, 5], self.masked[:, self.m :] = True, True
        scale = self.inverses[0].unsqueeze(1) * self.inverses[1]
        self.products = torch.where(
            self.masked, torch.nan, scores / scale.nan_to_num(1).clamp(1e-10)
        )
        self.peaks, self.factors = torch.ones(3), torch.tensor([0.5, 1.0, 0.3])
        self.column_peaks, self.column_factors = torch.ones(self.width), torch.rand(self.width)

    def exact(self, columns):
        """[3, M] in float64, times both inverses and the power."""
        scale = self.inverses[0].double().unsqueeze(1) * self.inverses[1].double()
        scores = (self.products.double() * scale).clamp(-1, 1)
        slopes = self.factors.double().unsqueeze(1) * (scores - 1).exp()
        if columns:
            slopes += self.column_factors.double() * (scores - 1).exp()
        return torch.where(self.masked, 0.0, slopes * scale * 2.0**self.power)

    def run(self, halves, columns):
        """As they are kept, widened to float64."""
        products, power = self.products.clone(), torch.tensor([self.power], dtype=torch.int32)
        dtype = torch.float16 if halves else torch.float32
        out = products.view(dtype)
        if halves == 2:
            out = torch.full((2, 3, self.width), torch.nan, dtype=dtype)
        one = torch.ones(1, dtype=torch.float64)
        operands = (products, *self.inverses)
        second = (self.column_peaks.data_ptr(), self.column_factors.data_ptr())
        cuda_launch.module().cuda_slope_rows(
            *(0, 0, 3, self.width, *(x.data_ptr() for x in operands), math.inf, one.data_ptr()),
            *(self.peaks.data_ptr(), self.factors.data_ptr(), *(second if columns else (0, 0))),
            *(power.data_ptr(), halves, out.data_ptr(), out.stride(-2)),
        )
        return out.double().sum(0) if halves == 2 else out[:, : self.width].double()


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("halves", [0, 1, 2])
def test_sanitized_slope_rows(halves, columns):
    """Also where slopes take the products' place, in more than a step of a block."""
    case = SlopeRows()
    found, exact = case.run(halves, columns), case.exact(columns)
    allowed = exact.abs() * (2.0**-11 if halves == 1 else 2e-6) + 2.0**-25
    assert ((found - exact).abs() <= allowed).all()


@pytest.mark.parametrize("halves", [0, 1, 2])
def test_sanitized_spread_rows(halves):
    """Of negatives alone; those of none, and those beside a bad row, are left out."""
    case, columns = SlopeRows(), 7
    index = torch.stack([torch.randperm(case.m)[:columns] for _ in range(3)])
    index[0, 3], index[2, 2], index[2, 4:] = -1, 5, torch.tensor([5, -1, case.m - 1])
    index[2, 2] = 7
    slopes, power = torch.randn(3, columns), torch.tensor([case.power], dtype=torch.int32)
    dtype = torch.float16 if halves else torch.float32
    out = torch.full((max(halves, 1), 3, case.width), torch.nan, dtype=dtype)
    cuda_launch.module().cuda_spread_rows(
        *(0, 0, 3, case.m, case.width, columns, 2, index.data_ptr(), slopes.data_ptr()),
        *(x.data_ptr() for x in (*case.inverses, power)),
        *(halves, out.data_ptr(), case.width),
    )
    exact = torch.zeros(3, case.width, dtype=torch.float64)
    for i in range(3):
        for j, slope in zip(index[i, 2:], slopes[i, 2:], strict=True):
            if j >= 0 and j != 5:
                scale = case.inverses[0][i].double() * case.inverses[1][j].double()
                exact[i, j] = slope * scale * 2.0**case.power
    allowed = exact.abs() * (2.0**-11 if halves == 1 else 1e-6) + 2.0**-25
    assert ((out.double().sum(0) - exact).abs() <= allowed).all()


def units_of(dtype, rows):
    """(rows as they are kept, exponents, inverse norms) by the kernel."""
    r, d = rows.shape
    kept = torch.float32 if dtype == torch.float32 else torch.float16
    unit, exponent = torch.full((r, d), torch.nan, dtype=kept), torch.zeros(r, dtype=torch.int32)
    inverse = torch.full((-(-r // 16) * 16,), torch.nan)  # padded
    operands = (unit.data_ptr(), inverse.data_ptr(), exponent.data_ptr())
    where = (rows.data_ptr(), rows.stride())
    cuda_launch.module().cuda_unit_rows(
        *(DTYPE_CODES[dtype], 0, 0, d, r, where, *operands, 0, where, *operands)
    )
    assert (inverse[r:] == 0).all()
    return unit, exponent, inverse[:r]


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("d", [1, 33, 1536, 2048, 2056])
def test_rows_are_kept_near_one_norm(dtype, d):
    """Exactly, whatever their magnitude; strides change no bit."""
    power = 8 if dtype == torch.float16 else 120
    rows = torch.randn(7, d)
    rows[1:4] *= torch.tensor([2.0**-power, 2.0 ** (power - 9), 2.0**-8]).unsqueeze(1)
    rows[4] = 0
    rows = rows.to(dtype)
    rows[5, d // 2], rows[6, d - 1] = torch.inf, torch.nan
    unit, exponent, inverse = units_of(dtype, rows)
    norm = unit[:4].double().norm(dim=1)
    assert ((norm >= 2**14 * (1 - 1e-6)) & (norm <= 2**15 * (1 + 1e-6))).all()
    scaled = unit[:4].double() * 2.0 ** exponent[:4].double().unsqueeze(1)
    assert torch.equal(scaled, rows[:4].double())
    assert ((inverse[:4].double() * norm - 1).abs() <= 1e-6).all()
    assert (unit[4:] == 0).all()
    assert inverse[4] == 0
    assert inverse[5:].isnan().all()
    wide = torch.randn(7, 2 * d + 1).to(dtype)
    wide[:, 1::2] = rows
    for a, b in zip(units_of(dtype, wide[:, 1::2]), (unit, exponent, inverse), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("d", [1536, 3584, 4104])
def test_gradients_of_long_rows(dtype, d):
    """Of one warp and several, held and not; several positives of a query and of a candidate."""
    query, candidates = batch(5, 9, d, dtype)
    target = torch.tensor([[3, 1], [2, 2], [3, -1], [0, 3], [8, 4]])
    weight, options = torch.randn(5), {"target": target, "temperature": 0.2}
    found = loss_gradients(query, candidates, weight, "cuda", **options)
    exact = loss_gradients(query.double(), candidates.double(), weight, "reference", **options)
    for ours, truth, rows in zip(found, exact, (query, candidates), strict=True):
        norm = rows.double().norm(dim=1, keepdim=True)
        allowed = 1e-5 + tolerances.half_ulp(truth, dtype) * norm
        assert ((ours.double() - truth).abs() * norm <= allowed).all()


def loss_gradients(query, candidates, weight, backend, **options):
    """Of sum(weight * loss) on query and candidates."""
    leaves = [x.clone().requires_grad_() for x in (query, candidates)]
    loss = info_nce(*leaves, reduction="none", backend=backend, **options)
    return torch.autograd.grad(loss, leaves, weight.to(loss.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("workspace_mb", [1, 256])
def test_slopes_of_one_half(dtype, symmetric, workspace_mb, monkeypatch):
    """As of a large batch, in chunks too: a slope errs by 2^-11 of it, or less."""
    monkeypatch.setattr(cuda_in_batch, "_TWO_HALVES", 0)
    monkeypatch.setattr(steps, "_LEAST_ROWS", 1)
    query, candidates = batch(300, 1100, 24, dtype)
    options = {"target": torch.arange(300) % 250, "temperature": 0.1, "symmetric": symmetric}
    options |= {"candidate_ids": torch.arange(1100) % 1000}
    weight = torch.randn(300)
    found = loss_gradients(query, candidates, weight, "cuda", workspace_mb=workspace_mb, **options)
    exact = loss_gradients(query.double(), candidates.double(), weight, "reference", **options)
    for ours, truth, rows in zip(found, exact, (query, candidates), strict=True):
        norm = rows.double().norm(dim=1, keepdim=True)
        allowed = 2.0**-12 * weight.abs().max() / 0.1
        allowed = allowed + tolerances.half_ulp(truth, dtype) * norm
        assert ((ours.double() - truth).abs() * norm <= allowed).all()


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("weight", [2.0**-90, 2.0**-10, 2.0**100])
def test_slopes_of_any_weight(weight, halves, monkeypatch):
    """Their power of two follows the weights', and a gradient's the rows'."""
    monkeypatch.setattr(cuda_in_batch, "_TWO_HALVES", 0 if halves == 1 else 2**22)
    query, candidates = batch(6, 11, 40, torch.bfloat16)
    ones, options = torch.ones(6), {"symmetric": True}
    expected = loss_gradients(query, candidates, ones, "cuda", **options)
    found = loss_gradients(query, candidates, ones * weight, "cuda", **options)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b * weight)
    query[1] *= 2.0**20
    candidates[2] *= 2.0**-20
    expected[0][1] *= 2.0**-20
    expected[1][2] *= 2.0**20
    for a, b in zip(
        loss_gradients(query, candidates, ones, "cuda", **options), expected, strict=True
    ):
        assert same_bits(a, b)


# Beyond tiles of 64 and of 128, sums of 64 terms, and the terms that are held at a time.
PRODUCTS = [(1, 1, 1), (3, 0, 5), (7, 15, 66), (65, 130, 64), (1300, 19, 1410)]


def factors(m, k, n):
    return torch.randn(m, k), torch.randn(k, n)


def product(a, b, *, before=None):
    """By the kernel, into rows that are longer than it; what is beyond them stays."""
    (m, _), n = a.shape, b.shape[1]
    wide = torch.full((m, n + 3), 7.0)
    if before is not None:
        wide[:, :n] = before
    float_product(a, b, wide[:, :n], add=before is not None)
    assert (wide[:, n:] == 7).all()
    return wide[:, :n]


def check_product(found, a, b, before=0.0):
    exact = before + a.double() @ b.double()
    size = a.double().abs() @ b.double().abs() + torch.as_tensor(before).abs()
    assert ((found.double() - exact).abs() <= 4e-7 * size).all()


@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_sanitized_product(sizes):
    a, b = factors(*sizes)
    before = torch.randn(sizes[0], sizes[2])
    check_product(product(a, b), a, b)
    check_product(product(a, b, before=before), a, b, before)


def test_a_products_layouts_give_the_same_bits():
    a, b = factors(70, 37, 41)
    right = product(a, b)
    wide = torch.randn(37, 82)
    wide[:, ::2] = b
    for left in (a, a.T.contiguous().T, torch.cat([a, a], dim=1)[:, :37]):
        for other in (b, b.T.contiguous().T, wide[:, ::2]):
            assert torch.equal(product(left, other), right)
    assert torch.equal(product(a[:1].expand(70, -1), b), right[:1].expand(70, -1))


@pytest.mark.parametrize("k", [130, 1536])
def test_an_element_of_a_product_depends_on_its_rows_alone(k):
    """Copies tie wherever they stand, and in a larger matrix of larger tiles."""
    row, column = torch.randn(1, k), torch.randn(k, 1)
    small = product(row.expand(3, -1), column.expand(-1, 200).contiguous())
    assert (small == small[0, 0]).all()
    if k == 130:
        large = product(row.expand(1400, -1), column.expand(-1, 1500))
        assert (large == small[0, 0]).all()


@pytest.mark.parametrize("k", [256, 1536, 8192])
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_long_sums_are_right(k, kind):
    """Where all terms are equal, each rounding errs to the same side."""
    a = torch.randn(4, k) if kind == "random" else torch.full((4, k), 0.7)
    a = torch.nn.functional.normalize(a + 2 * torch.randn(1, k) * (kind == "random"), dim=1)
    found = product(a, a.T)
    assert (found.double() - a.double() @ a.T.double()).abs().max() <= 1e-6


def test_sums_in_float16_reach_no_product(monkeypatch):
    """Where a process lets torch add up in float16, our kernel multiplies."""
    query, candidates = batch(7, 11, 40, torch.float16)
    weight, matmul = torch.ones(7), torch.backends.cuda.matmul
    expected = loss_gradients(query, candidates, weight, "cuda")
    monkeypatch.setattr(cuda_products, "half_product", None)
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    try:
        found = loss_gradients(query, candidates, weight, "cuda")
    finally:
        matmul.allow_fp16_accumulation = before
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-10, atol=1e-5)


def test_no_switch_of_precision_reaches_a_product():
    a, b = factors(9, 40, 11)
    right, matmul = product(a, b), torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = product(a, b)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert found.dtype == torch.float32
    assert torch.equal(found, right)


@pytest.mark.parametrize("b", [137, 1100])
def test_columns_in_parts(b):
    """Of 128 rows each, added eight at a time; chunks add to what is there."""
    query, candidates = batch(b, b, 5, torch.float64)
    leaves = [x.float() for x in (query, candidates)]
    right = info_nce(*(x.double() for x in leaves), symmetric=True, backend="reference")
    for workspace_mb in (1, 256):
        loss = info_nce(*leaves, symmetric=True, workspace_mb=workspace_mb, backend="cuda")
        torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-5)


def test_groups_keep_their_bits_in_any_batch():
    inputs = embeddings((5,), 23, 128, torch.bfloat16)
    together = launch("ranking_reward_and_grad", *inputs, None, None, **OPEN_HINGE)
    for i in range(5):
        alone = launch(
            "ranking_reward_and_grad", *(x[i : i + 1] for x in inputs), None, None, **OPEN_HINGE
        )
        for a, b in zip(alone, together, strict=True):
            assert same_bits(a[0], b[i])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, 2.0**100])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_odd_rows_in_a_cluster(bad, where):
    """Of two groups the second has one; the first keeps its bits."""
    inputs = embeddings((2,), 19, 512, torch.bfloat16)
    before = launch("ranking_reward_and_grad", *inputs, None, None, **OPEN_HINGE)
    row = inputs[where][1] if where < 2 else inputs[2][1, 4]
    row.mul_(0).add_(bad) if bad in (0.0, 2.0**100) else row[3].fill_(bad)
    found = launch("ranking_reward_and_grad", *inputs, None, None, **OPEN_HINGE)
    for a, b in zip(found, before, strict=True):
        assert same_bits(a[0], b[0])
    right, *gradients = truth(inputs, None, None, **OPEN_HINGE)
    torch.testing.assert_close(
        found[0].double(), right.reward, rtol=1e-5, atol=1e-5, equal_nan=True
    )
    for ours, exact in zip(found[5:], gradients, strict=True):
        assert torch.equal(ours.isnan(), exact.isnan())
    if bad in (0.0, 2.0**100):
        check_gradients(found[5:], gradients, inputs, torch.bfloat16)


def test_more_candidates_than_shared_memory_holds():
    inputs = embeddings((2,), 2500, 4, torch.float32)
    found = launch("ranking_reward", *inputs, None, **OPEN_HINGE)
    exact = reference.ranking_reward(*(x.double() for x in inputs), None, Weights(**OPEN_HINGE))
    assert torch.equal(
        found[3], reference.reward_from_scores(found[4], None, Weights(**OPEN_HINGE)).rank
    )
    torch.testing.assert_close(found[0].double(), exact.reward, rtol=1e-5, atol=1e-5)


def test_older_gpus_take_two_passes(monkeypatch):
    """Where there are no clusters; also for rows that are not on 16 bytes."""
    inputs = embeddings((2,), 30, 256, torch.bfloat16)
    clustered = launch("ranking_reward_and_grad", *inputs, None, None, **OPEN_HINGE)
    monkeypatch.setenv("ELVA_HOST_CAPABILITY", "8")
    plain = launch("ranking_reward_and_grad", *inputs, None, None, **OPEN_HINGE)
    check(plain, inputs, None, None, **OPEN_HINGE)
    for a, b in zip(plain[:4], clustered[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_failing_launch_is_one_line(monkeypatch):
    inputs = embeddings((2,), 3, 8, torch.bfloat16)
    monkeypatch.setenv("ELVA_HOST_FAIL", "1")
    with pytest.raises(RuntimeError, match=r"^ranking_reward: .*unspecified launch failure"):
        launch("ranking_reward", *inputs, None, **OPEN_HINGE)


def test_float64_is_another_backends():
    with pytest.raises(BackendUnavailable, match="cuda takes bfloat16, float16, float32"):
        choice.launcher("ranking_reward", "cuda", torch.device("cpu"), torch.float64)
