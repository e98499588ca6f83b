"""A compiled Triton kernel serves another N, batch, mask or stride: compiling takes seconds.

Counted without a GPU, by what Triton would look a compiled kernel up by.
"""

import importlib.util

import pytest
import torch

from elva_kernels.backends import triton
from elva_kernels.backends.launcher import Groups
from elva_kernels.backends.triton import codes, in_batch, launch, reward, topk
from elva_kernels.reference import ALL, Batch, FineCodes, RowCodes, Weights
from tests.kernels.cases import OPEN_HINGE

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(triton.INTERPRETED, reason="the interpreter compiles nothing"),
]
WEIGHTS = Weights(**OPEN_HINGE)
SIZES = [(1, 99), (7, 100), (16, 101), (1024, 112), (7, 1), (1, 16)]  # groups, N


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that launches would have compiled by now; none of them runs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    keys, backend = set(), make_backend(GPUTarget("cuda", 90, 32))

    def run(self, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialisation, options = bind(*args, **kwargs)
        keys.add((self.fn.__name__, str(specialisation), str(options)))

    def zeros(shape, dtype, device):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "empty", zeros)
    return keys


def train(groups, n, dim, mask, relevance=None):
    """What a training step launches, and the same without a graph."""
    shapes = ((groups, dim), (groups, dim), (groups, n, dim))
    inputs = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    upstream = torch.ones(groups)
    given = Groups(*inputs, mask, None, relevance)
    *_, saved = reward.ranking_reward_saved(given, WEIGHTS)
    reward.ranking_reward_backward(given, saved, upstream, WEIGHTS, ALL)
    reward.ranking_reward_and_grad(given, upstream, WEIGHTS, ALL)
    reward.ranking_reward(given, WEIGHTS)
    scores = torch.zeros(groups, n + 1)
    reward.reward_from_scores(scores, mask, relevance, WEIGHTS)
    reward.reward_from_scores_backward(scores, mask, relevance, upstream, WEIGHTS)


@pytest.mark.parametrize("masked", [False, True])
def test_another_n_batch_or_dimension_compiles_nothing(compiled, masked):
    for groups, n in SIZES:
        for dim in (64, 128):
            train(groups, n, dim, torch.ones(groups, n, dtype=torch.bool) if masked else None)
    names = sorted(name for name, *_ in compiled)
    expected = ["gradient_kernel", *["reward_kernel"] * 3]
    assert names == [*expected, "scores_gradient_kernel", "scores_kernel"]


def test_another_mask_compiles_nothing(compiled):
    """Expanded, of every second column, and not aligned."""
    whole = torch.ones(8, 41, dtype=torch.bool)
    for mask in (whole[:, :20], whole[:, 1:21], whole[:, 1::2], whole[:1, :20].expand(8, 20)):
        train(8, 20, 64, mask)
    assert len(compiled) == 6


def test_another_relevance_compiles_nothing(compiled):
    """Of another size, and not aligned."""
    for first, n in ((0, 20), (1, 20), (3, 41), (0, 1)):
        relevance = torch.zeros(first + 8 * n)[first:].view(8, n)
        train(8, n, 64, None, relevance)
    assert len(compiled) == 6


def test_another_batch_stride_compiles_nothing(compiled):
    """Groups of a longer buffer, of every second place of it, and one for all."""
    for negatives in (torch.zeros(16, 30, 64), torch.zeros(16, 47, 64)[:, :30]):
        for given in (negatives[:8], negatives[::2], negatives[:1].expand(8, 30, 64)):
            query = torch.zeros(8, 64)
            reward.ranking_reward(Groups(query, query, given), WEIGHTS)
    assert len(compiled) == 1


def test_another_bank_compiles_nothing(compiled):
    for groups, n in SIZES:
        query, index = torch.zeros(groups, 64), torch.zeros(groups, n, dtype=torch.int64)
        bank = torch.zeros(n + groups, 64)
        given = Groups(query, query, bank, None, index)
        reward.ranking_reward_and_grad(given, None, WEIGHTS, ALL)
    assert len(compiled) == 2


def test_what_decides_a_load_is_compiled_for(compiled):
    """An odd dimension, and rows that are not aligned: once for each."""
    train(7, 9, 64, None)
    aligned = len(compiled)
    train(7, 9, 77, None)
    assert aligned < len(compiled) < 2 * aligned + 1


def test_another_batch_of_queries_compiles_little(compiled):
    """Only products, whose loads are along a batch: once more where it is no multiple of 16.

    And once for search, whose scores are not padded.
    """

    def step(queries, candidates):
        query, rows = torch.ones(queries, 64), torch.ones(candidates, 64)
        batch = Batch(torch.arange(queries).unsqueeze(1))
        call = in_batch.TritonSteps(query, rows, batch, 3, torch.tensor(0.1))
        call.info_nce_and_gradients(
            torch.ones(queries), symmetric=True, dtypes=(query.dtype, rows.dtype)
        )
        topk.topk(query, rows, 5, metric="cosine")

    step(16, 32)
    step(48, 128)
    first = {key for key in compiled if key[0] != "product_kernel"}
    products = len(compiled) - len(first)
    step(7, 9)
    step(13, 99)
    assert first == {key for key in compiled if key[0] != "product_kernel"}
    assert len(compiled) - len(first) == 2 * products + 1


def test_another_search_among_codes_compiles_nothing(compiled):
    """But for few queries and for many, with a mask and without; and rows that are not aligned."""

    def search(queries, rows, dim, masked, first=0):
        code = torch.zeros(first + rows * dim, dtype=torch.int8)[first:].view(rows, dim)
        asked = torch.zeros(queries, dim, dtype=torch.int8)
        mask = torch.ones(first + rows, dtype=torch.bool)[first:] if masked else None
        numbers = torch.zeros(first + queries)[first:]
        found = FineCodes(asked, asked, numbers, numbers)
        numbers = torch.zeros(first + rows)[first:]
        codes.nearest_codes(found, RowCodes(code, numbers, numbers), 1, mask=mask, floor=None)

    for dim in (64, 1536):
        for queries, rows in ((1, 16), (3, 99), (16, 1000), (17, 128), (64, 1), (300, 77)):
            for masked in (False, True):
                search(queries, rows, dim, masked)
    assert len(compiled) == 4
    search(1, 99, 64, masked=False, first=32)
    assert len(compiled) == 4
    search(1, 99, 64, masked=False, first=1)
    search(100, 99, 64, masked=False, first=1)
    assert len(compiled) == 5
    search(1, 99, 77, masked=False)
    assert len(compiled) == 6
