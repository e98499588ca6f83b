"""Flat search on every backend and CPU level, against float64 and a stable sort."""

import warnings

import numpy as np
import pytest
import torch

from elva_kernels import TopK, available_backends, topk
from tests.kernels.cases import (
    BACKENDS,
    DTYPES,
    EVERY_LEVEL,
    INTERPRETED,
    each_compiler,
    layouts,
    same_bits,
)

METRICS = ["cosine", "dot"]
# |score - truth| over |q| |c|: the contract's bound for a search; float64 computes in float64.
BOUND = {
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
    torch.float32: 1e-5,
    torch.float64: 1e-13,
}
# Q, P, D: tiles of every size, ragged tails of every vector width, several blocks, nothing.
SHAPES = [
    (1, 1, 1),
    (2, 5, 31),
    (3, 700, 33),
    (4, 259, 64),
    (5, 1030, 96),
    (7, 66, 1537),
    (1, 131, 4100),
    (0, 9, 8),
    (3, 0, 8),
]
if INTERPRETED:
    SHAPES = [(1, 1, 1), (2, 5, 31), (3, 70, 33), (2, 19, 130), (0, 9, 8), (3, 0, 8)]

every_level = pytest.mark.parametrize("backend", EVERY_LEVEL, indirect=True)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_metric = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def many(count):
    """A number of rows, as far as the interpreter bears it."""
    return min(count, 70) if INTERPRETED else count


def rows(n_queries, n_rows, dim, dtype, seed=0):
    """Queries, and rows at all distances from the first of them."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(n_queries, dim, generator=generator, dtype=torch.float64)
    corpus = torch.randn(n_rows, dim, generator=generator, dtype=torch.float64)
    if n_queries > 0:
        corpus += torch.linspace(-0.5, 0.8, n_rows, dtype=torch.float64).unsqueeze(-1) * query[0]
    return query.to(dtype), corpus[torch.randperm(n_rows, generator=generator)].to(dtype)


def exact_scores(query, corpus, metric):
    """[Q, P] in float64, and |q| |c|, which errors are measured by."""
    query, corpus = query.double(), corpus.double()
    norms = query.norm(dim=-1, keepdim=True) * corpus.norm(dim=-1)
    dots = query @ corpus.mT
    if metric == "dot":
        return dots, norms
    return torch.where(norms == 0, 0.0, dots / norms), torch.ones_like(norms)


def ordered(scores, k):
    """Score descending, then index ascending."""
    scores, index = scores.sort(dim=-1, descending=True, stable=True)
    return TopK(scores[:, :k], index[:, :k])


def check(result, query, corpus, k, metric):
    """Scores near the truth, in order, and no row left out that is better beyond the bound."""
    kept = min(k, corpus.shape[0])
    assert result.scores.shape == result.index.shape == (query.shape[0], kept)
    assert result.scores.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    assert result.index.dtype == torch.int64
    assert result.scores.is_contiguous()
    assert result.index.is_contiguous()
    truth, norms = exact_scores(query, corpus, metric)
    bound = BOUND[query.dtype] * norms
    got = truth.gather(-1, result.index)
    error = (result.scores.double() - got).abs()
    assert (error <= bound.gather(-1, result.index)).all()
    best = ordered(truth, kept).scores
    if kept > 0:
        assert ((best - got).abs() <= 2 * bound.amax(-1, keepdim=True)).all()
    above, below = result.scores[:, :-1], result.scores[:, 1:]
    later = result.index[:, :-1] < result.index[:, 1:]
    assert ((above > below) | ((above == below) & later)).all()
    assert all(len(set(row)) == kept for row in result.index.tolist())


def equal(left, right):
    return all(same_bits(a, b) for a, b in zip(left, right, strict=True))


@every_level
@each_dtype
@each_metric
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_scores_and_order_against_float64(backend, dtype, metric, shape, nan_filled_memory):
    query, corpus = rows(*shape, dtype)
    for k in (0, 1, 10, shape[1], shape[1] + 3, 2048):
        check(topk(query, corpus, k, metric=metric, backend=backend), query, corpus, k, metric)


@every_level
@each_dtype
@each_metric
def test_ties_of_an_exact_lattice_come_by_index(backend, dtype, metric):
    query = torch.randint(0, 2, (6, 16)) * 2 - 1
    corpus = torch.randint(0, 2, (many(1500), 16)) * 2 - 1
    truth = (query @ corpus.mT).double() / (16 if metric == "cosine" else 1)
    for k in (1, 37, len(corpus)):
        result = topk(query.to(dtype), corpus.to(dtype), k, metric=metric, backend=backend)
        expected = ordered(truth, k)
        assert torch.equal(result.index, expected.index)
        assert torch.equal(result.scores.double(), expected.scores)


@every_level
@each_dtype
@each_metric
@pytest.mark.parametrize("dim", [33, 1536])
def test_copies_of_a_row_tie_wherever_they_are(backend, dtype, metric, dim):
    query, few = rows(5, 7, dim, dtype)
    corpus = few.repeat(101, 1)[: many(705)]
    result = topk(query, corpus, corpus.shape[0], metric=metric, backend=backend)
    first = topk(query, few, 7, metric=metric, backend=backend)
    for q in range(5):
        places = [torch.arange(i, corpus.shape[0], 7) for i in first.index[q].tolist()]
        assert torch.equal(result.index[q], torch.cat(places))
        assert torch.equal(result.scores[q].unique(), first.scores[q].unique())


@every_level
@each_dtype
@each_metric
def test_a_querys_result_does_not_depend_on_the_others(backend, dtype, metric):
    query, corpus = rows(9, many(301), 70, dtype)
    together = topk(query, corpus, 20, metric=metric, backend=backend)
    for q in range(9):
        alone = topk(query[q : q + 1], corpus, 20, metric=metric, backend=backend)
        assert equal(alone, [x[q : q + 1] for x in together])


@every_level
@each_dtype
def test_no_cosine_lies_beyond_one(backend, dtype):
    """Of rows with themselves and with their opposites."""
    query, _ = rows(17, 0, 33, dtype)
    scores = topk(query, torch.cat([query, -query]), 34, backend=backend).scores
    assert (scores[:, 0] <= 1).all() and (scores[:, -1] >= -1).all()
    assert torch.allclose(scores[:, [0, -1]], scores.new_tensor([1, -1]), rtol=0, atol=1e-6)


@every_level
@each_dtype
@each_metric
def test_rows_that_are_zero_or_not_finite(backend, dtype, metric):
    query, corpus = rows(6, 90, 40, dtype)
    corpus[3], corpus[70] = 0, 0
    corpus[10, 5], corpus[11, 39], corpus[88, 0] = torch.nan, torch.inf, -torch.inf
    query[1] = 0
    query[2, 7], query[3, 0] = torch.nan, torch.inf
    bad = [10, 11, 88]
    before = query.clone(), corpus.clone()
    result = topk(query, corpus, 90, metric=metric, backend=backend)
    assert all(same_bits(x, y) for x, y in zip((query, corpus), before, strict=True))
    assert not result.scores.isnan().any()
    finite = [i for i in range(90) if i not in bad]
    for q in (2, 3):
        assert result.index[q].tolist() == list(range(90))
        assert (result.scores[q] == -torch.inf).all()
    assert result.index[1].tolist() == finite + bad
    assert (result.scores[1, :87] == 0).all()
    for q in (0, 1, 4, 5):
        assert result.index[q, 87:].tolist() == bad
        assert (result.scores[q, 87:] == -torch.inf).all()
        zeros = result.scores[q][torch.isin(result.index[q], torch.tensor([3, 70]))]
        assert same_bits(zeros, torch.zeros_like(zeros))
    sound = topk(query[[0, 4, 5]], corpus[finite], 87, metric=metric, backend=backend)
    assert equal([sound.scores], [result.scores[[0, 4, 5], :87]])
    assert torch.equal(torch.tensor(finite)[sound.index], result.index[[0, 4, 5], :87])
    # With fewer places than finite rows none of the others is seen.
    few = topk(query[:1], corpus, 5, metric=metric, backend=backend)
    assert equal(few, [x[:1, :5] for x in result])


@every_level
def test_cosines_of_tiny_and_huge_rows(backend):
    for dtype in {torch.bfloat16, torch.float32, torch.float64} & set(DTYPES):
        query, corpus = rows(5, many(203), 48, dtype)
        plain = topk(query, corpus, len(corpus), backend=backend)
        low, high = (-500, 500) if dtype == torch.float64 else (-66, 66)
        for q_power, c_power in ((low, high), (high, low), (low, low), (high, high), (0, low)):
            scaled = query * 2.0**q_power, corpus * 2.0**c_power
            assert equal(topk(*scaled, len(corpus), backend=backend), plain)
    ones = torch.ones(1, 64)
    mixed = torch.stack([x * torch.ones(64) for x in (1e-20, 1e20, 1e-38, 3e38, 1.0)])
    for scale in (1e-20, 1.0, 1e20):
        result = topk(ones * scale, mixed, 5, backend=backend)
        torch.testing.assert_close(result.scores, torch.ones(1, 5), rtol=0, atol=1e-5)
    smallest = torch.full((1, 3), 2.0**-149)
    assert topk(smallest, smallest, 1, backend=backend).scores.item() == pytest.approx(1, abs=1e-5)


@every_level
def test_dots_of_tiny_and_huge_rows(backend):
    query = torch.tensor([[1e20, 1e20, 2.0], [1e-30, 0, 1e-30]])
    corpus = torch.tensor([[1e20, -1e20, 3.0], [1e20, 1e20, 1.0], [-1e30, -1e30, 0], [1e-9, 0, 0]])
    result = topk(query, corpus, 4, metric="dot", backend=backend)
    # 1e40 is beyond float32, -2e50 below it; 1e20 * 1e20 - 1e20 * 1e20 is within 1e-5 |q| |c|.
    assert result.index[0, 0] == 1
    assert result.index[0, 3] == 2
    assert result.scores[0, 0] == torch.inf
    assert result.scores[0, 3] == -torch.inf
    expected = torch.tensor([1e-10, 1e-10, 1e-39, -1.0])
    torch.testing.assert_close(result.scores[1], expected, rtol=1e-5, atol=1e-44)
    assert result.index[1].tolist() == [0, 1, 3, 2]


@every_level
def test_thresholds_at_the_ends_of_the_range(backend):
    """Clamped, flushed and negative scores that tie with the worst kept one."""
    count = many(300)
    line = torch.linspace(1, 2, count).unsqueeze(-1).double()
    toward = line * torch.full((1, 37), 0.1, dtype=torch.float64)
    across = torch.zeros(count, 37, dtype=torch.float64)
    across[:, 0], across[:, 1] = (
        line[:, 0],
        line[:, 0] * torch.tensor([1e-20, -1e-20]).repeat(count // 2),
    )
    for dtype in {torch.float32, torch.float64} & set(DTYPES):
        query = torch.full((1, 37), 0.1, dtype=dtype)
        for corpus in (toward, -toward):
            corpus = corpus.to(dtype)
            whole = topk(query, corpus, count, backend=backend)
            for k in (1, 7, count // 2):
                part = topk(query, corpus, k, backend=backend)
                assert equal(part, [x[:, :k] for x in whole])
        query = torch.zeros(1, 37, dtype=dtype)
        query[0, 1] = 1
        whole = topk(query, across.to(dtype), count, backend=backend)
        for k in (1, 7, 2 * count // 3):
            part = topk(query, across.to(dtype), k, backend=backend)
            assert equal(part, [x[:, :k] for x in whole])


@every_level
@each_dtype
@pytest.mark.parametrize("turn", range(6))
def test_every_layout_gives_the_same_bits(backend, dtype, turn):
    """The corpus lies as the query does, `turn` layouts on: in six turns any beside any other."""
    query, corpus = rows(5, many(150), 35, dtype)
    plain = topk(query, corpus, 40, backend=backend)
    others = list(layouts(corpus).items())
    assert len(others) == 6
    for i, (name, q) in enumerate(layouts(query).items()):
        other, c = others[(i + turn) % 6]
        assert equal(topk(q, c, 40, backend=backend), plain), (name, other)
    same = corpus[:1].expand(len(corpus), 35)
    result = topk(query[:1].expand(5, 35), same, 40, metric="dot", backend=backend)
    assert torch.equal(result.index, torch.arange(40).expand(5, 40))


@each_backend
def test_a_read_only_memory_map_is_read_in_place(backend, tmp_path):
    query, corpus = rows(3, 400, 64, torch.float32)
    np.save(tmp_path / "corpus.npy", corpus.numpy())
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, once a process: the map cannot be written
        tensor = torch.from_numpy(mapped)
    assert equal(topk(query, tensor, 9, backend=backend), topk(query, corpus, 9, backend=backend))
    corpus.numpy().tofile(tmp_path / "corpus.bin")
    shared = torch.from_file(str(tmp_path / "corpus.bin"), size=corpus.numel()).view(400, 64)
    assert equal(topk(query, shared, 9, backend=backend), topk(query, corpus, 9, backend=backend))


@every_level
def test_bits_do_not_depend_on_the_number_of_threads(backend, threads):
    query, corpus = rows(6, 3001, 256, torch.bfloat16)
    corpus[1000:2000] = corpus[:1000]
    threads(1)
    alone = topk(query, corpus, 50, backend=backend)
    for count in (2, 3, 7):
        threads(count)
        for _ in range(3):
            assert equal(topk(query, corpus, 50, backend=backend), alone)


@each_backend
def test_offsets_beyond_32_bits(backend):
    query, near = rows(2, 3, 48, torch.bfloat16)
    memory = torch.empty(2 * (2**31 + 64) + 48, dtype=torch.bfloat16)  # lazily committed
    far = memory.as_strided((3, 48), (2**31 + 64, 1))
    far.copy_(near)
    assert equal(topk(query, far, 3, backend=backend), topk(query, near, 3, backend=backend))


@pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=str(available_backends()["cpu"])
)
def test_more_queries_than_one_pass_takes(threads):
    """A pass has 256 MB for its heaps: 16 bytes a place, on each thread."""
    query, corpus = rows(310, 8000, 4, torch.float32)
    threads(7)
    result = topk(query, corpus, 8000, metric="dot", backend="cpu")
    some = [0, 291, 300, 309]
    assert equal([x[some] for x in result], topk(query[some], corpus, 8000, metric="dot"))
    assert torch.equal(result.index[some].sort(-1).values, torch.arange(8000).expand(4, -1))


@each_backend
def test_results_are_detached(backend):
    query, corpus = (x.requires_grad_() for x in rows(2, 9, 5, torch.float32))
    result = topk(query, corpus, 3, backend=backend)
    assert not result.scores.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(topk(query, corpus, 3, backend=backend), result)
    with torch.inference_mode():
        assert equal(topk(query, corpus, 3, backend=backend), result)


@each_backend
@each_dtype
def test_opcheck(backend, dtype):
    query, corpus = rows(3, 7, 8, dtype)
    for k in (0, 4, 9):
        arguments = (query, corpus, k, "cosine", backend)
        torch.library.opcheck(torch.ops.elva_kernels.topk.default, arguments)


@each_compiler
def test_compiles_without_a_graph_break(compiler):
    def best(query, corpus):
        result = topk(query * 2, corpus, 4)
        return result, corpus[result.index[:, 0]] * result.scores[:, :1]

    query, corpus = rows(3, 50, 8, torch.float32)
    torch._dynamo.reset()
    result, nearest = torch.compile(best, fullgraph=True, backend=compiler)(query, corpus)
    expected, expected_nearest = best(query, corpus)
    assert equal(result, expected)
    torch.testing.assert_close(nearest, expected_nearest)


@each_backend
def test_compiles_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, c, k: topk(q, c, k, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n_queries, n_rows, k in ((2, 9, 3), (5, 40, 7), (4, 6, 30)):
        query, corpus = rows(n_queries, n_rows, 8, torch.float32)
        assert equal(compiled(query, corpus, k), topk(query, corpus, k, backend=backend))


Q, C = torch.ones(2, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], C, 1), TypeError, "query must be a tensor [Q, D], got list"),
        ((Q.int(), C, 1), TypeError, "query must be bfloat16, float16, float32 or float64"),
        ((Q[0], C, 1), ValueError, "query must have shape [Q, D], got shape [4]"),
        ((Q[None], C, 1), ValueError, "query must have shape [rows, D] with D >= 1"),
        ((Q[:, :0], C[:, :0], 1), ValueError, "query must have shape [rows, D] with D >= 1"),
        ((Q, C[None], 1), ValueError, "corpus must have shape [rows, D] with D >= 1"),
        ((Q, C[:, :3], 1), ValueError, "corpus must have query's D = 4, got shape [3, 3]"),
        ((Q, C.double(), 1), TypeError, "corpus must have query's dtype torch.float32"),
        ((Q, C.to("meta"), 1), ValueError, "corpus must be on the first tensor's device cpu"),
        ((Q, C, -1), ValueError, "k must be in [0, 2^63 - 1], got -1"),
        ((Q, C, 2**63), ValueError, "k must be in [0, 2^63 - 1]"),
        ((Q, C, 1.0), TypeError, "k must be an int, got float 1.0"),
        ((Q, C, True), TypeError, "k must be an int, got bool True"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error) as caught:
        topk(*arguments)
    assert str(caught.value).startswith(f"topk: {message}")


def test_errors_of_names():
    with pytest.raises(ValueError, match="topk: metric must be one of cosine, dot, got 'l2'"):
        topk(Q, C, 1, metric="l2")
    message = "topk: backend must be one of auto, cpu, cuda, triton, reference"
    with pytest.raises(ValueError, match=message):
        topk(Q, C, 1, backend="gpu")
