"""Inputs, truths and backends of the contract suite. A new backend is one line in `BACKENDS`."""

import shutil

import pytest
import torch

from elva_kernels import available_backends, doctor, rank_statistics, reference
from elva_kernels.backends.table import LAUNCHERS
from tests import tolerances
from tests.kernels.hosted import INTERPRETED, ON_FIBERS

WEIGHTS = {"margin": 0.1, "rank_penalty": 0.01, "w_margin": 0.4, "w_rank": 0.6}
OPEN_HINGE = WEIGHTS | {"margin": -1.0, "rank_penalty": 0.1}
SOFT_RANKS = OPEN_HINGE | {"rank_temperature": 0.05}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# |loss - float64 truth| of scores that are 1e-5 off at most, per 1 / temperature.
LOSS = dict.fromkeys(DTYPES, 1e-06) | {torch.float64: 1e-13}


def _backends(*names):
    """Parameters of a test, `backend` or `backend:level`; what cannot run here says why."""
    reasons = available_backends()
    native = doctor().native
    for name in names:
        backend, _, level = name.partition(":")
        reason = reasons[backend]
        if reason is None and level and level not in native["levels"]:
            reason = f"this CPU has no {level}"
        yield pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


BACKENDS = [
    *_backends(
        "reference",
        "cpu",
    )
]
# Where numbers are at stake, each set of instructions that the cpu backend can choose.
ARM = "neon" in doctor().native.get("levels", ())
EVERY_LEVEL = [
    *_backends(
        "reference",
        *(("cpu:neondot", "cpu:neon") if ARM else ()),
        *(() if ARM else ("cpu:amx", "cpu:avx512bf16", "cpu:avx512", "cpu:avx2")),
        "cpu:plain",
    )
]


each_compiler = pytest.mark.parametrize(
    "compiler",
    [
        "aot_eager",  # what a graph is, without its code
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.thorough,
                pytest.mark.skipif(shutil.which("c++") is None, reason="it needs a C++ compiler"),
            ],
        ),
    ],
)


def on_diagonal(case, level, levels):
    """Whether a case runs at a level by default: each case at one, each level with every dtype."""
    return (case + case // levels + case // levels**2 - level) % levels == 0


def computing(op, backends):
    """Those of `backends` that have a launcher for `op`."""
    return [x for x in backends if x.values[0].split(":")[0] in LAUNCHERS[op]]


# (leading shape, N, D): single groups, no negatives, ragged tails of every vector width, no groups.
SHAPES = [
    ((), 1, 1),
    ((), 0, 5),
    ((3,), 7, 33),
    ((2, 3), 5, 64),
    ((0,), 4, 8),
    ((4,), 100, 96),
    ((1,), 2, 257),
    ((2,), 17, 1537),
    ((5, 1), 3, 31),
]


if INTERPRETED:
    BACKENDS = EVERY_LEVEL = [*_backends("triton")]
    SHAPES = [((), 1, 1), ((1, 2), 5, 33), ((0,), 4, 8), ((1,), 17, 130), ((), 0, 5)]
if ON_FIBERS:
    BACKENDS = EVERY_LEVEL = [pytest.param("cuda")]
    DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def relevance_of(graded, *shape, dtype=torch.float32):
    """[*, N] in [0, 1], some of either end among them; None where it is not graded."""
    if not graded:
        return None
    share = torch.rand(shape)
    return torch.where(share < 0.2, 0.0, torch.where(share > 0.9, 1.0, share)).to(dtype)


def exact(relevance):
    """In float64, as a truth takes it."""
    return None if relevance is None else relevance.double()


def embeddings(leading, n, d, dtype, *, seed=0, signal=0.7):
    """A query, a positive near it and negatives at all distances from it, as models give them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = randn(*leading, d)
    positive = signal * query + randn(*leading, d)
    share = torch.linspace(-0.5, 0.8, n, dtype=torch.float64).unsqueeze(-1)
    negatives = share * query.unsqueeze(-2) + randn(*leading, n, d)
    return tuple(x.to(dtype) for x in (query, positive, negatives))


def layouts(x):
    """The same values in the ways that tensors lie in memory."""
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    padded[..., 1 : 2 * x.shape[-1] + 1 : 2] = x
    flat = torch.full((x.numel() + 2,), torch.nan, dtype=x.dtype)
    flat[1:-1] = x.flatten()
    return {
        "contiguous": x.contiguous(),
        "every_other": padded[..., 1 : 2 * x.shape[-1] + 1 : 2],
        "misaligned": flat[1:-1].view(x.shape),
        "transposed": x.movedim(-1, 0).contiguous().movedim(0, -1),
        "flipped_copy": x.flip(-1).flip(-1),
        "reversed_dims": x.permute(*reversed(range(x.dim())))
        .contiguous()
        .permute(*reversed(range(x.dim()))),
    }


def truth_scores(query, positive, negatives, mask=None):
    """The scores in float64."""
    return reference.cosine_scores(query.double(), positive.double(), negatives.double(), mask)


def truth_gradients(inputs, scores, mask, weight, relevance=None, **weights):
    """Float64 gradients of sum(weight * reward), with ranks and hinge as `scores` decide them.

    Taking the ranks from the backend's own scores keeps a swap of two near-equal ones, which is no
    error, out of the comparison.
    """
    scores = torch.where(torch.isfinite(scores), scores, 0).double()
    upstream = weight.double().expand(scores.shape[:-1])
    coefficients = reference.reward_from_scores_backward(
        scores, mask, upstream, reference.Weights(**weights), exact(relevance)
    )
    leaves = [x.detach().double().clone().requires_grad_() for x in inputs]
    truth = reference.cosine_scores(*leaves, mask)
    return torch.autograd.grad(truth, leaves, coefficients)


def norms(rows):
    """[R, 1] in float64, of rows of any magnitude."""
    rows = rows.double()
    size = rows.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return (rows / size).norm(dim=-1, keepdim=True) * size


def check_gradients(gradients, truths, inputs, dtype):
    """The contract's bound, each row's error weighed by the row's norm."""
    for gradient, truth, rows in zip(gradients, truths, inputs, strict=True):
        assert gradient.dtype == rows.dtype
        assert gradient.shape == rows.shape
        norm = norms(rows)
        allowed = tolerances.GRADIENT[dtype] + tolerances.half_ulp(truth, dtype) * norm
        error = (gradient.double() - truth).abs() * norm
        assert (error <= allowed).all(), f"{(error - allowed).max().item():.2e} over the bound"


def check_loss_gradients(gradients, truths, inputs, weight, temperature, dtype):
    """Of InfoNCE's losses, weighed by `weight`, on query, candidates (`inputs`) and temperature."""
    # Slopes are 1 / temperature times those that the bound is made for, and as many as queries.
    scale = temperature / max(1.0, weight.abs().sum().item())
    scaled = [(a.double() * scale, b * scale) for a, b in zip(gradients, truths, strict=True)]
    if dtype != torch.float64:
        for (a, b), rows in zip(scaled, inputs, strict=False):
            rounding = scale * tolerances.half_ulp(b / scale, dtype) * norms(rows)
            assert ((a - b).abs() * norms(rows) <= (2e-6 + rounding) / min(temperature, 1.0)).all()
    else:
        check_gradients([a for a, _ in scaled[:2]], [b for _, b in scaled[:2]], inputs, dtype)
    sensitivity = weight.double().abs().sum() / temperature**2
    assert (gradients[2] - truths[2]).abs() <= 10 * LOSS[dtype] * sensitivity / temperature


def same_bits(a, b):
    """Equal to the last bit: -0.0 is not 0.0. Any NaN equals any other: its payload is no value."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        a, b = (torch.where(x.isnan(), torch.nan, x) for x in (a, b))
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


# (B, M, D): one of each, ragged tails of every tile, more candidates than queries, none at all.
BATCH_SHAPES = [(1, 1, 1), (3, 7, 5), (17, 17, 33), (40, 97, 64), (5, 5, 257), (0, 4, 8), (0, 0, 3)]


def batch(b, m, d, dtype, *, seed=0, signal=0.7):
    """Queries and candidates, candidate i near query i."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, candidates = randn(b, d), randn(m, d)
    near = min(b, m)
    candidates[:near] += signal * query[:near]
    return query.to(dtype), candidates.to(dtype)


def lattice(b, m, d, dtype):
    """Entries +-1: with d = 4^k every cosine is a binary fraction."""
    return tuple((torch.randint(0, 2, (n, d)) * 2 - 1).to(dtype) for n in (b, m))


def exact_negatives(scores, target, ids=None, max_score=None):
    """Bool [B, M]: who is a negative of whom."""
    negative = torch.arange(scores.shape[1]) != target.unsqueeze(1)
    if ids is not None:
        negative &= ids != ids[target].unsqueeze(1)
    return negative if max_score is None else negative & (scores <= max_score)


def cosines(query, candidates):
    """In float64; differentiable."""
    q, c = (
        torch.nn.functional.normalize(x.double(), dim=1, eps=1e-300) for x in (query, candidates)
    )
    return q @ c.T


def every_score(query, candidates, target, backend):
    """The backend's own scores [B, M], put together from its target score and its whole order."""
    found = rank_statistics(query, candidates, target, k=len(candidates), backend=backend)
    scores = torch.full((len(query), len(candidates)), torch.nan, dtype=found.topk_scores.dtype)
    for i in range(len(query)):
        there = found.topk_index[i] >= 0
        scores[i, found.topk_index[i][there]] = found.topk_scores[i][there]
        scores[i, target[i]] = found.target_score[i]
    return scores
