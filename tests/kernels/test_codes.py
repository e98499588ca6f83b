"""Codes of rows, and the search that reads them, on every backend and CPU level."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elva_kernels.codes as codes_module
from elva_kernels import coded_topk, reference, row_codes, topk
from elva_kernels import codes as public
from elva_kernels.backends.gpu import codes as gpu_codes
from elva_kernels.backends.table import LAUNCHERS
from elva_kernels.reference import RowCodes
from tests.kernels.cases import (
    BACKENDS,
    DTYPES,
    EVERY_LEVEL,
    INTERPRETED,
    ON_FIBERS,
    computing,
    layouts,
    same_bits,
)

coding = pytest.mark.parametrize("backend", computing("row_codes", EVERY_LEVEL), indirect=True)
searching = pytest.mark.parametrize(
    "backend", computing("nearest_codes", EVERY_LEVEL), indirect=True
)
each_backend = pytest.mark.parametrize("backend", computing("nearest_codes", BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# Q, P, D: ragged tails of every vector and tile, several blocks, rows of one element.
SHAPES = [(1, 1, 1), (2, 9, 2), (5, 300, 31), (4, 259, 64), (7, 66, 1537), (3, 130, 4100)]
if INTERPRETED:
    SHAPES = [(1, 1, 1), (2, 9, 2), (5, 70, 31), (3, 40, 130)]
KINDS = ["random", "clustered", "ties", "near ties", "outliers"]


def rows(kind, count, dim, dtype, seed=0):
    """Rows as they are hard to tell apart, with a zero row."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = randn(count, dim)
    if kind == "clustered":
        place = torch.randint(0, 5, (count,), generator=generator)
        found = randn(5, dim)[place] + 0.05 * found
    if kind == "ties":
        found = randn(3, dim)[torch.randint(0, 3, (count,), generator=generator)]
    if kind == "near ties":
        found = randn(1, dim) + 1e-4 * found
    if kind == "outliers":
        found[:, dim // 2] += 80
    if count > 2:
        found[count // 2] = 0
    return found.to(dtype)


def queries(count, corpus, dtype, seed=1):
    """Random ones, a row of the corpus and a zero row."""
    found = rows("random", count, corpus.shape[1], dtype, seed)
    if count > 1:
        found[count // 2] = 0
        found[1] = corpus[len(corpus) // 3].to(dtype)
    return found


def cosines(query, corpus):
    unit = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (query, corpus))
    return next(unit) @ next(unit).T


def fine_codes(query, backend):
    return reference.FineCodes(*LAUNCHERS["row_codes"][backend](query, True))


@coding
@each_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_no_cosine_lies_above_its_bound(backend, dtype, kind, shape):
    """And by little below it: what rounding lost of the row, and next to nothing of the query."""
    q, p, dim = shape
    corpus = rows(kind, p, dim, dtype)
    query = queries(q, corpus, dtype)
    codes, asked = row_codes(corpus, backend=backend), fine_codes(query, backend)
    space = reference.score_bounds(asked, codes).double() - cosines(query, corpus)
    assert (space >= reference.SCORE_ERROR / 2).all()
    assert (space <= 2 * (codes.lost.double() + asked.lost.double()[:, None]) + 3e-5).all()
    assert (codes.lost <= 0.02 if dim > 1000 else codes.lost < 0.01 * dim**0.5).all()
    assert (codes.lost[cosines(corpus, corpus).diagonal() == 0] == 0).all()


@coding
@each_dtype
def test_codes_are_the_references(backend, dtype):
    """But for ties of rounding: rows of all magnitudes, zero, and not finite."""
    corpus = rows("random", 60, 257, torch.float64) * torch.logspace(-2, 2, 60).unsqueeze(1)
    corpus = corpus.to(dtype)
    corpus[3, 5], corpus[4, 256] = torch.nan, -torch.inf
    for fine in (False, True):
        found = LAUNCHERS["row_codes"][backend](corpus, fine)
        truth = LAUNCHERS["row_codes"]["reference"](corpus, fine)
        torch.testing.assert_close(found[0].int(), truth[0].int(), rtol=0, atol=1)
        assert (found[0] != truth[0]).double().mean() < 1e-3
        whole = [x[0].int() * 256 + x[1] if fine else x[0] * 1 for x in (found, truth)]
        torch.testing.assert_close(whole[0], whole[1], rtol=0, atol=1 + fine)
        torch.testing.assert_close(found[2], truth[2], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[3], truth[3], rtol=0, atol=1e-6)
    assert found[3][[3, 4, 30]].tolist() == [torch.inf, torch.inf, 0]
    scale = 2.0 ** (-900 if dtype == torch.float64 else -60)
    if dtype != torch.float16:
        plain = row_codes(corpus, backend=backend)
        assert all(map(same_bits, row_codes(corpus * scale, backend=backend), plain))


@coding
def test_codes_do_not_depend_on_the_layout(backend):
    corpus = rows("random", 30, 35, torch.float32)
    plain = row_codes(corpus, backend=backend)
    for lying in layouts(corpus).values():
        assert all(map(same_bits, row_codes(lying, backend=backend), plain))


@searching
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_nearest_codes_have_the_largest_bounds(backend, masked, shape):
    q, p, dim = shape
    corpus = rows("clustered", p, dim, torch.float32)
    corpus[-1] = corpus[0]  # they tie
    asked = reference.fine_codes(queries(q, corpus, torch.float32))
    codes = reference.row_codes(corpus)
    mask = torch.arange(p) % 3 != 1 if masked else None
    bounds = reference.score_bounds(asked, codes)
    if masked:
        bounds = torch.where(mask, bounds, -torch.inf)
    for depth in {1, min(p, 40), p}:
        found, index = LAUNCHERS["nearest_codes"][backend](
            asked, codes, depth, mask=mask, floor=None
        )
        expected = bounds.sort(dim=1, descending=True).values[:, :depth]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        there = index >= 0
        assert torch.equal(there, expected > -torch.inf)
        assert (index[~there] == -1).all()
        own = bounds.gather(1, index.clamp(min=0))
        torch.testing.assert_close(found[there], own[there], rtol=0, atol=2e-6)
        above, below = found[:, :-1], found[:, 1:]
        assert ((above > below) | (index[:, :-1] < index[:, 1:]) | (index[:, 1:] < 0)).all()
        floor = found[:, depth // 2].clone()
        high, at = LAUNCHERS["nearest_codes"][backend](asked, codes, depth, mask=mask, floor=floor)
        kept = found >= floor.unsqueeze(1)
        assert torch.equal(high[kept], found[kept])
        assert torch.equal(at[kept], index[kept])


@searching
def test_the_largest_products_of_the_longest_rows(backend):
    """127 or -128 everywhere: integers of 32 bits still hold them, and those of either sign."""
    dim, sign = 65_536, torch.tensor([1.0, -1.0])
    code = (127 * sign).to(torch.int8).unsqueeze(1).expand(2, dim)
    scale = torch.full((2,), 1 / (127 * dim**0.5))
    codes = reference.RowCodes(code, scale, torch.zeros(2))
    for fine in (127, -128):
        asked = reference.FineCodes(code, torch.full_like(code, fine), scale, torch.zeros(2))
        found, index = LAUNCHERS["nearest_codes"][backend](asked, codes, 2, mask=None, floor=None)
        exact = reference.score_bounds(asked, codes).gather(1, index)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
        assert index.tolist() == [[0, 1], [1, 0]]


@searching
@each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_topks_to_the_bit(backend, dtype, kind):
    count, dim = (70, 40) if INTERPRETED else (300, 96) if ON_FIBERS else (900, 96)
    corpus = rows(kind, count, dim, dtype)
    codes = row_codes(corpus, backend=backend)
    parts = (corpus[: count // 3], corpus[:0], corpus[count // 3 :])
    of_parts = [row_codes(part, backend=backend) for part in parts]
    mask = torch.arange(count) % 4 != 2
    live = mask.nonzero()[:, 0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for query in {dtype: queries(5, corpus, dtype), wide: queries(5, corpus, wide)}.values():
        for k in (0, 1, 10, count, count + 3):
            right = topk(query, corpus.to(query.dtype), k, backend=backend)
            for found in (
                coded_topk(query, corpus, codes, k, backend=backend),
                coded_topk(query, parts, of_parts, k, backend=backend),
            ):
                assert same_bits(found.scores, right.scores)
                assert torch.equal(found.index, right.index)
            right = topk(query, corpus[mask].to(query.dtype), k, backend=backend)
            found = coded_topk(query, corpus, codes, k, mask=mask, backend=backend)
            assert same_bits(found.scores, right.scores)
            assert torch.equal(found.index, live[right.index])


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_pace_gives_the_same_answer(backend, kind, monkeypatch):
    """All proposals read at once, two or three queries at a time; more of them than rows."""
    monkeypatch.setattr(public, "_ON_A_CPU", public._ON_A_GPU._replace(together=3, alike=2))
    monkeypatch.setattr(public, "_PROPOSED", 20)
    corpus = rows(kind, 70 if INTERPRETED else 300, 40, torch.float32)
    query, mask = queries(5, corpus, torch.float32), torch.arange(len(corpus)) % 4 != 2
    parts = corpus.split(len(corpus) // 3)
    of_parts = [row_codes(part, backend=backend) for part in parts]
    for k in (1, 7):
        right = topk(query, corpus[mask], k, backend=backend)
        found = coded_topk(query, parts, of_parts, k, mask=mask, backend=backend)
        assert same_bits(found.scores, right.scores)
        assert torch.equal(found.index, mask.nonzero()[:, 0][right.index])


@each_backend
@pytest.mark.parametrize("kind", ["random", "near ties"])
def test_rows_are_read_in_blocks_of_any_size(backend, kind, monkeypatch):
    """Eleven at a time, of two parts behind a mask; where codes prove the answer and where not."""
    monkeypatch.setattr(public, "_ON_A_CPU", public._ON_A_CPU._replace(block_bytes=11 * 40 * 4))
    monkeypatch.setattr(public, "_PROPOSED", 4)
    monkeypatch.setattr(public, "_MORE", 2)
    corpus = rows(kind, 90, 40, torch.float32)
    query, mask = queries(2, corpus, torch.float32), torch.arange(90) % 4 != 2
    parts = corpus.split(50)
    codes = [row_codes(part, backend=backend) for part in parts]
    right = topk(query, corpus[mask], 3, backend=backend)
    found = coded_topk(query, parts, codes, 3, mask=mask, backend=backend)
    assert found.proven.all() == (kind == "random")
    assert same_bits(found.scores, right.scores)
    assert torch.equal(found.index, mask.nonzero()[:, 0][right.index])


@given(
    st.sampled_from(KINDS),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(1, 700),
    st.integers(1, 80),
    st.integers(1, 30),
    st.integers(0, 2**31),
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.skipif(INTERPRETED, reason="700 rows take the interpreter minutes")
def test_any_rows_and_deletions_give_topks_answer(kind, dtype, count, dim, k, seed, share):
    corpus = rows(kind, count, dim, dtype, seed)
    query = queries(3, corpus, torch.float32, seed + 1)
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) >= share
    found = coded_topk(query, corpus, row_codes(corpus), k, mask=mask)
    right = topk(query, corpus[mask].float(), k)
    assert same_bits(found.scores, right.scores)
    assert torch.equal(found.index, mask.nonzero()[:, 0][right.index])


@searching
def test_rows_and_queries_that_are_not_finite(backend):
    corpus = rows("random", 60, 33, torch.float32)
    corpus[7, 3], corpus[8, 32] = torch.nan, torch.inf
    query = queries(4, corpus, torch.float32)
    query[3, 0] = torch.inf
    codes = row_codes(corpus, backend=backend)
    for asked in (query, query[3:]):
        for k in (3, 60):
            found = coded_topk(asked, corpus, codes, k, backend=backend)
            right = topk(asked, corpus, k)
            assert torch.equal(found.index, right.index)
            assert torch.equal(found.scores.isinf(), right.scores.isinf())


@each_backend
def test_only_rows_that_matter_are_read(backend):
    """The others are spoilt after they were coded, and nobody sees it; copies are all read."""
    corpus = rows("random", 20_000, 64, torch.float16)
    query = queries(3, corpus, torch.float32)[:2]
    codes = row_codes(corpus, backend=backend)
    right = topk(query, corpus.float(), 10, backend=backend)
    far = (cosines(query, corpus) < right.scores[:, -1:] - 0.06).all(0)
    assert far.double().mean() > 0.98
    spoilt = torch.where(far.unsqueeze(1), torch.nan, corpus)
    found = coded_topk(query, spoilt, codes, 10, backend=backend)
    assert same_bits(found.scores, right.scores)
    assert torch.equal(found.index, right.index)
    assert found.proven.all()
    assert found.rows_read < 200
    copies = rows("ties", 20_000, 64, torch.float16)
    found = coded_topk(query, copies, row_codes(copies, backend=backend), 10, backend=backend)
    assert found.proven.tolist() == [False, False]
    assert found.rows_read >= 20_000
    assert torch.equal(found.index, topk(query, copies.float(), 10, backend=backend).index)


@searching
def test_the_number_of_threads_changes_nothing(backend):
    corpus = rows("clustered", 3000 if not INTERPRETED else 50, 48, torch.float16)
    query = queries(9, corpus, torch.float32)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            codes = row_codes(corpus, backend=backend)
            asked = fine_codes(query, backend if backend in LAUNCHERS["row_codes"] else "reference")
            near = LAUNCHERS["nearest_codes"][backend](asked, codes, 40, mask=None, floor=None)
            found.append((*codes, *near))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(same_bits, others, found[0]))


@pytest.mark.skipif("cpu" not in str(BACKENDS), reason="the CPU's heaps")
def test_more_queries_than_one_pass_takes():
    """A pass has 64 MB for its heaps: 16 bytes a place, on each thread."""
    corpus = rows("random", 6000, 4, torch.float32)
    asked = reference.fine_codes(rows("random", 800, 4, torch.float32, seed=2))
    codes = reference.row_codes(corpus)
    launch = LAUNCHERS["nearest_codes"]["cpu"]
    found = launch(asked, codes, 6000, mask=None, floor=None)
    some = [0, 690, 700, 799]
    few = reference.FineCodes(*(x[some] for x in asked))
    alone = launch(few, codes, 6000, mask=None, floor=None)
    assert all(torch.equal(x[some], y) for x, y in zip(found, alone, strict=True))


@pytest.mark.skipif(not (INTERPRETED or ON_FIBERS), reason="the blocks of a GPU's search")
@each_backend
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_rows_and_of_queries_change_nothing(backend, masked, monkeypatch):
    """Seven rows and three queries at a time; copies tie across them."""
    count = 60 if INTERPRETED else 330
    corpus = rows("clustered", count, 33, torch.float32)
    corpus[::11] = corpus[3]
    asked = reference.fine_codes(queries(8, corpus, torch.float32))
    coded = reference.row_codes(corpus)
    mask = torch.arange(count) % 5 != 2 if masked else None
    launch = LAUNCHERS["nearest_codes"][backend]
    depths = (1, 17, count)  # the last one is more than CUDA chooses at once
    whole = [launch(asked, coded, depth, mask=mask, floor=None) for depth in depths]
    monkeypatch.setattr(gpu_codes, "_WORKSPACE_BYTES", 7 * 3 * 4)
    monkeypatch.setattr(gpu_codes, "_QUERIES", 3)
    for depth, (bounds, index) in zip(depths, whole, strict=True):
        found = launch(asked, coded, depth, mask=mask, floor=None)
        assert same_bits(found[0], bounds)
        assert torch.equal(found[1], index)
        floor = bounds[:, depth // 2]
        found = launch(asked, coded, depth, mask=mask, floor=floor)
        kept = bounds >= floor.unsqueeze(1)
        assert torch.equal(found[1], index.where(kept, -1))


@each_backend
def test_opcheck(backend):
    corpus = rows("random", 7, 8, torch.float32)
    ops = torch.ops.elva_kernels
    for fine in (False, True):
        torch.library.opcheck(ops.row_codes.default, (corpus, fine, "auto"))
    given = (*reference.fine_codes(corpus[:3]), *reference.row_codes(corpus))
    for mask in (None, torch.ones(7, dtype=torch.bool)):
        arguments = (*given, mask, None, 4, backend)
        torch.library.opcheck(ops.nearest_codes.default, arguments)


def test_what_does_not_fit_is_refused():
    corpus = rows("random", 9, 8, torch.float16)
    query, codes = corpus[:2].float(), row_codes(corpus)
    bad = {
        "have query's D = 7": (query[:, :7], corpus, codes),
        "have query's dtype torch.float16, or fewer bits": (query.half(), corpus.float(), codes),
        "be 2, one of each corpus": (query, [corpus, corpus], [codes]),
        "have code of int8": (query, corpus[:8], codes),
        "have scale of float32": (query, corpus, codes._replace(scale=codes.scale.double())),
        "be a RowCodes, or a list": (query, corpus, tuple(codes)),
    }
    for rule, arguments in bad.items():
        with pytest.raises((TypeError, ValueError), match=rf"^coded_topk: \w+ must {rule}"):
            coded_topk(*arguments, 3)
    with pytest.raises(TypeError, match="mask must be a tensor of bool"):
        coded_topk(query, corpus, codes, 3, mask=torch.ones(9))
    with pytest.raises(ValueError, match="with D from 1 to 65536"):
        row_codes(torch.empty(1, 65_537))
    assert isinstance(codes, RowCodes)


@pytest.mark.skipif("cpu" not in str(BACKENDS), reason="the pace of a CPU")
def test_where_nothing_is_proven_the_first_queries_show_it(monkeypatch):
    """The others are not proposed rows; and what is proposed at once is bounded."""
    corpus = 1 + 1e-4 * rows("random", 3000, 16, torch.float32)
    asked, launch = [], codes_module.registered.nearest_codes

    def counted(query, *rest):
        asked.append(len(query) * rest[-2])
        return launch(query, *rest)

    monkeypatch.setattr(codes_module.registered, "nearest_codes", counted)
    query = queries(400, corpus, torch.float32)
    codes = row_codes(corpus)
    found = coded_topk(query, corpus, codes, 10)
    assert torch.equal(found.index, topk(query, corpus, 10).index)
    assert len(asked) == 2 and not found.proven.all()
    alone = coded_topk(query[:1], corpus, codes, 10)
    assert torch.equal(alone.index, found.index[:1]) and not alone.proven
    asked.clear()
    plain = rows("random", 3000, 16, torch.float32)
    assert coded_topk(query, plain, row_codes(plain), 300).proven.all()
    assert max(asked) <= 2**20


@pytest.mark.parametrize("field", ["scale", "lost"])
def test_codes_that_are_no_numbers_prove_nothing(field):
    corpus = rows("random", 2000, 16, torch.float32)
    query, codes = queries(3, corpus, torch.float32), row_codes(corpus)
    for spoilt in (slice(None), slice(3, None), slice(0, 1990)):
        values = getattr(codes, field).clone()
        values[spoilt] = torch.nan
        found = coded_topk(query, corpus, codes._replace(**{field: values}), 10)
        right = topk(query, corpus, 10)
        assert torch.equal(found.index, right.index) and not found.proven.any()


def test_nothing_to_prove_is_proven():
    corpus = rows("random", 9, 8, torch.float32)
    codes = row_codes(corpus)
    for k, mask in ((0, None), (3, torch.zeros(9, dtype=torch.bool))):
        found = coded_topk(corpus[:2], corpus, codes, k, mask=mask)
        assert found.proven.all() and found.rows_read == 0 and found.index.shape == (2, 0)


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_program_calls_it_beside_its_graph():
    corpus = rows("random", 300, 8, torch.float32)
    codes = row_codes(corpus)

    def search(query):
        return coded_topk(query * 2, corpus, codes, 3).index + 1

    expected = search(corpus[:2])
    assert torch.equal(torch.compile(search)(corpus[:2]), expected)
