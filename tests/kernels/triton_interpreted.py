"""Triton kernels in Triton's interpreter. `test_triton` runs this file, with TRITON_INTERPRET=1."""

import functools

import pytest
import torch

import elva_kernels as ek
from elva_kernels import ranking_reward, ranking_reward_and_grad, reference
from elva_kernels.backends import choice
from elva_kernels.backends.admission import in_batch as admitted
from elva_kernels.backends.admission import verdicts
from elva_kernels.backends.launcher import Groups
from elva_kernels.backends.table import LAUNCHERS
from elva_kernels.backends.triton import codes, in_batch, launch, reward, topk
from elva_kernels.backends.triton.kernels.in_batch import score_rows_kernel
from elva_kernels.reference import ALL, Batch, Weights
from tests.kernels import score_rows
from tests.kernels.cases import OPEN_HINGE, embeddings, same_bits

GUARD = 64  # elements before and after a buffer
SOFT = OPEN_HINGE | {"rank_temperature": 0.2}
TRIALS = [
    ("ranking_reward", torch.bfloat16, False),
    ("ranking_reward", torch.float16, True),
    ("ranking_reward_saved", torch.float16, False),
    ("ranking_reward_backward", torch.float64, True),
    ("ranking_reward_and_grad", torch.bfloat16, True),
    ("ranking_reward_and_grad", torch.float64, False),
    ("reward_from_scores", torch.float64, True),
    ("reward_from_scores", torch.float16, False),
    ("reward_from_scores_backward", torch.bfloat16, True),
    ("reward_from_scores_backward", torch.float64, False),
    ("rank_statistics", torch.bfloat16, True),
    ("rank_statistics", torch.float64, False),
    ("in_batch_ranking_reward", torch.float16, True),
    ("in_batch_ranking_reward_backward", torch.float32, False),
    ("info_nce", torch.float16, False),
    ("info_nce", torch.float64, True),
    ("info_nce_and_grad", torch.bfloat16, True),
    ("info_nce_and_grad", torch.float32, False),
    ("topk", torch.bfloat16, True),
    ("topk", torch.float32, False),
    ("row_codes", torch.bfloat16, True),
    ("nearest_codes", torch.float32, False),
    ("nearest_codes", torch.float32, True),
]


@pytest.mark.parametrize(("op", "dtype", "soft"), TRIALS, ids=str)
def test_passes_its_self_test(monkeypatch, op, dtype, soft):
    """What fills a GPU's tiles, and takes the interpreter many minutes, is cut short."""
    dense_of = admitted.dense_of

    def short_of(dtype):
        query, candidates, batch = dense_of(dtype)
        return query[:, :64].contiguous(), candidates[:, :64].contiguous(), batch

    monkeypatch.setattr(admitted, "dense_of", short_of)
    monkeypatch.setattr(admitted, "_COPIES", 2)
    launchers = {half: row.get("triton") for half, row in LAUNCHERS.items()}
    verdicts.TRIALS[op](launchers.get, dtype, torch.device("cpu"), soft)


@pytest.mark.parametrize("positives", [1, 2, 10, 300])
def test_score_rows(positives):
    """Positives of every kind, in more than one pass and more than one block."""
    case = score_rows.ScoreRows(positives)
    score_rows.check_results(case, *case.run(interpreted_score_rows))


@pytest.mark.parametrize(
    ("dtype", "powers"),
    [
        (torch.bfloat16, [-60, 0, 40]),
        (torch.float32, [-60, 20, 60]),
        (torch.float64, [-700, 100, 700]),
    ],
)
def test_a_row_times_a_power_of_two_has_the_same_unit_row(dtype, powers):
    """Scaled by another, so that its norm is far from the ends of the range."""
    rows = torch.randn(3, 35).to(dtype)
    scaled = rows * 2.0 ** torch.tensor(powers, dtype=torch.float64).unsqueeze(1).to(dtype)
    units, norms, _ = in_batch.units_of(scaled)
    exact = torch.nn.functional.normalize(rows.double(), dim=1)
    torch.testing.assert_close(units.double() * norms[:, :1], exact, rtol=1e-6, atol=0)
    assert same_bits(units.double() * 2 ** norms[:, 1:], scaled.double())
    assert (norms[:, 0].log2().abs() < (256 if dtype == torch.float64 else 32)).all()


def interpreted_score_rows(case, table, temperature, results):
    """As a batch of two segments a query launches it."""
    rows, p = case.target.shape
    norms = torch.stack([case.norms, torch.zeros_like(case.norms)], 1)
    score_rows_kernel[(rows,)](
        *(table, case.query_norm, norms, case.target, case.skipped, case.first, case.last),
        *(score_rows.MAX_SCORE, *results, temperature, score_rows.M, score_rows.WIDTH, p, 2),
        ONE=False,
        AT_ONCE=in_batch.AT_ONCE,
        BLOCK=in_batch.BLOCK,
    )


def every_launch(inputs, scores, mask, relevance, upstream, weights):
    """All results of all launchers, some with a relevance and some without."""
    groups = Groups(*inputs, mask)
    graded = groups._replace(relevance=relevance)
    *values, saved = reward.ranking_reward_saved(graded, weights)
    yield from values
    yield from reward.ranking_reward(groups, weights)
    yield from reward.ranking_reward_backward(graded, saved, upstream, weights, ALL)
    yield from reward.ranking_reward_and_grad(groups, upstream, weights, ALL)
    yield from every_bank_launch(inputs, mask, relevance, upstream, weights)
    for grades in (relevance, None):
        yield from reward.reward_from_scores(scores, mask, grades, weights)
        yield from reward.reward_from_scores_backward(scores, mask, grades, upstream, weights)


def every_bank_launch(inputs, mask, relevance, upstream, weights):
    """All results for negatives that groups take from a bank, and for some of the gradients."""
    query, positive, negatives = inputs
    bank = negatives.flatten(0, 1)
    index = torch.arange(len(bank)).view(mask.shape) // 2
    index[-1, -1] = index[0, 0] = len(bank) - 1
    given = Groups(query, positive, bank, None, torch.where(mask, index, -1), relevance)
    yield from reward.ranking_reward_and_grad(given, upstream, weights, ALL)
    *values, saved = reward.ranking_reward_saved(given, weights)
    yield from values
    yield from reward.ranking_reward_backward(given, saved, upstream, weights, ALL)
    for place in range(3):
        wrt = tuple(i == place for i in range(3))
        yield reward.ranking_reward_and_grad(given, None, weights, wrt)[5 + place]
        plain = Groups(*inputs, mask, None, relevance)
        yield reward.ranking_reward_backward(plain, saved, upstream, weights, wrt)[place]


def every_batch_launch(query, candidates, weight):
    """All results of the in-batch ops and of search."""
    batch = Batch(
        torch.arange(len(query)).unsqueeze(1), None, torch.arange(len(candidates)) % 7, 0.9
    )
    several = torch.stack([batch.target[:, 0], torch.arange(len(query)) * 8], 1)
    several[2] = -1
    heat = torch.tensor(0.1)
    dtypes = (query.dtype, torch.float32)
    for given in (batch, batch._replace(candidate_ids=None), Batch(several)):
        yield from in_batch.TritonSteps(query, candidates, given, 3, heat).rank_statistics()
        call = in_batch.TritonSteps(query, candidates, given, 0, heat, 1)
        loss, _, *gradients = call.info_nce_and_gradients(weight, symmetric=True, dtypes=dtypes)
        yield from (loss, *gradients)
    for metric in ("cosine", "dot"):
        yield from topk.topk(query, candidates, 5, metric=metric)


def batch_arguments():
    query, candidates = torch.randn(5, 35), torch.randn(41, 35)
    candidates[7], candidates[9] = 0, torch.nan
    query[1] *= 2.0**60
    return query.bfloat16(), candidates.bfloat16(), torch.rand(5)


def arguments(dtype=torch.bfloat16, groups=3, n=6, d=35):
    inputs = embeddings((groups,), n, d, dtype)
    inputs[2][0, 1] = 0
    inputs[1][groups - 1] *= 2.0**60  # out of range: scaled
    mask = torch.rand(groups, n) < 0.7
    relevance = torch.rand(groups, n).masked_fill(~mask, torch.nan)
    return inputs, torch.randn(groups, n + 1).to(dtype), mask, relevance, torch.randn(groups)


class Guarded:
    """Buffers between red zones that hold NaN (the lowest integer), as nothing written does."""

    def __init__(self):
        self.zones = []

    def empty(self, shape, dtype, device=None):
        filler = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        size = torch.Size(shape).numel()
        memory = torch.full((size + 2 * GUARD,), filler, dtype=dtype)
        self.zones += [memory[:GUARD], memory[GUARD + size :]]
        return memory[GUARD : GUARD + size].view(shape)

    def copy(self, x):
        if x.dtype == torch.bool:
            return self.empty(x.shape, torch.uint8).copy_(x).view(torch.bool)
        return self.empty(x.shape, x.dtype).copy_(x)

    def check(self):
        for zone in self.zones:
            fresh = torch.full_like(zone, torch.nan if zone.is_floating_point() else 0)
            if not zone.is_floating_point():
                fresh.fill_(torch.iinfo(zone.dtype).min)
            assert same_bits(zone.view(torch.uint8).short(), fresh.view(torch.uint8).short())


@pytest.mark.parametrize("weights", [Weights(**OPEN_HINGE), Weights(**SOFT)], ids=["hard", "soft"])
def test_red_zones_are_neither_read_nor_written(monkeypatch, weights):
    inputs, *others = arguments()
    expected = list(every_launch(inputs, *others, weights))
    guarded = Guarded()
    monkeypatch.setattr(launch, "empty", guarded.empty)
    copies = [guarded.copy(x) for x in inputs]
    found = list(every_launch(copies, *map(guarded.copy, others), weights))
    guarded.check()
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


def test_red_zones_of_a_batch_are_neither_read_nor_written(monkeypatch):
    given = batch_arguments()
    expected = list(every_batch_launch(*given))
    guarded = Guarded()
    monkeypatch.setattr(launch, "empty", guarded.empty)
    found = list(every_batch_launch(*(guarded.copy(x) for x in given)))
    guarded.check()
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_red_zones_of_codes_are_neither_read_nor_written(monkeypatch, masked):
    asked = reference.fine_codes(torch.randn(18, 35))
    coded = reference.row_codes(torch.randn(70, 35))
    mask = torch.rand(70) < 0.7 if masked else None
    floor = torch.full((18,), -0.1)
    expected = codes.nearest_codes(asked, coded, 70, mask=mask, floor=floor)
    guarded = Guarded()
    monkeypatch.setattr(launch, "empty", guarded.empty)
    found = codes.nearest_codes(
        reference.FineCodes(*map(guarded.copy, asked)),
        reference.RowCodes(*map(guarded.copy, coded)),
        70,
        mask=guarded.copy(mask) if masked else None,
        floor=floor,
    )
    guarded.check()
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


def reordered(monkeypatch, order):
    """From now on a launch's x-th program of n is the order(n)[x]-th. The sizes of launches."""
    from triton.runtime import interpreter

    builder, sizes = interpreter.interpreter_builder, []
    place, measure = type(builder).set_grid_idx, type(builder).set_grid_dim

    def set_size(*size):
        sizes.append(size[0])
        measure(builder, *size)

    def set_place(x, y, z):
        place(builder, order(sizes[-1])[x], y, z)

    monkeypatch.setattr(builder, "set_grid_dim", set_size)
    monkeypatch.setattr(builder, "set_grid_idx", set_place)
    return sizes


def backwards(n):
    return range(n - 1, -1, -1)


@functools.cache
def shuffled(n):
    return torch.randperm(n).tolist()


def test_programs_of_a_batch_backwards_give_the_same_bits(monkeypatch):
    given = batch_arguments()
    expected = list(every_batch_launch(*given))
    sizes = reordered(monkeypatch, backwards)
    for a, b in zip(every_batch_launch(*given), expected, strict=True):
        assert same_bits(a, b)
    assert max(sizes) > 1


def test_float64_products_step_by_step_are_those_of_tiles(monkeypatch):
    """A GPU takes the former, the interpreter the latter."""
    a, b, norm = torch.randn(3, 9).double(), torch.randn(9, 37).double(), torch.rand(9, 2).double()
    tiles, steps = torch.empty(2, 3, 37, dtype=torch.float64)
    in_batch.multiply(a, b, tiles, inner=norm)
    constants = in_batch.product_constants
    monkeypatch.setattr(in_batch, "product_constants", lambda *x: constants(*x) | {"OUTER": True})
    in_batch.multiply(a, b, steps, inner=norm)
    assert (tiles - steps).abs().max() < 1e-14
    assert (steps - a * norm[:, 0] @ b).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_added_to_what_is_there(dtype):
    """In several tiles of columns, of which the last is not whole."""
    a, b, before = torch.randn(3, 9), torch.randn(9, 37), torch.randn(3, 37)
    out = before.to(dtype, copy=True)
    in_batch.multiply(a.to(dtype), b.to(dtype), out, add=True)
    assert (out.double() - before - a.double() @ b.double()).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.bfloat16, 2.0**-50), (torch.float32, 2.0**-50), (torch.float64, 2.0**-300)],
)
def test_a_score_that_products_may_have_lost_is_zero(dtype, least):
    query = torch.tensor([[0.0, 1.0]], dtype=dtype)
    rows = torch.tensor([[1.0, least], [1.0, 0.75 * least]], dtype=dtype)
    assert ek.topk(query, rows, 2, backend="triton").scores.tolist() == [[least, 0]]
    found = ranking_reward(query, rows[:1], rows[None, 1:], backend="triton")
    assert found.scores.tolist() == [[least, 0]]
    found = ek.rank_statistics(query, rows, torch.tensor([0]), k=1, backend="triton")
    assert (found.target_score.item(), found.topk_scores.item()) == (least, 0)


@pytest.mark.parametrize("order", [backwards, shuffled])
def test_any_order_of_programs_gives_the_same_bits(monkeypatch, order):
    given = (*arguments(torch.float32, 5), Weights(**SOFT))
    expected = list(every_launch(*given))
    sizes = reordered(monkeypatch, order)
    for a, b in zip(every_launch(*given), expected, strict=True):
        assert same_bits(a, b)
    assert max(sizes) > 5


def test_leading_dimensions_that_do_not_merge():
    """Three of them, permuted and expanded: launched in parts, with the bits of dense tensors."""
    query, positive, negatives = embeddings((2, 3, 2), 3, 9, torch.float32)
    strange = (
        query.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        positive[:, :1].expand(2, 3, 2, 9),
        negatives.permute(1, 0, 2, 4, 3).contiguous().permute(1, 0, 2, 4, 3),
    )
    dense = [x.contiguous() for x in strange]
    relevance, rest = torch.rand(2, 3, 2, 3), (None, Weights(**OPEN_HINGE), ALL)
    actual, expected = (
        reward.ranking_reward_and_grad(Groups(*rows, relevance=relevance), *rest)
        for rows in (strange, dense)
    )
    for a, b in zip(actual, expected, strict=True):
        assert same_bits(a, b)
        assert a.is_contiguous()


def test_auto_never_takes_the_interpreter():
    inputs = embeddings((1,), 2, 4, torch.float32)
    taken = choice.launcher("ranking_reward", "auto", torch.device("cpu"), torch.float32)
    assert taken is not LAUNCHERS["ranking_reward"]["triton"]
    for weights in (OPEN_HINGE, SOFT):
        result = ranking_reward(*inputs, **weights)
        assert torch.equal(result.rank, ranking_reward_and_grad(*inputs, **weights)[0].rank)
