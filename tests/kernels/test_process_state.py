"""No op depends on what the process is set to, nor changes it: values and gradients keep bits."""

import contextlib
import ctypes
import functools
import platform

import pytest
import torch

import elva_kernels as ek
from elva_kernels import available_backends
from tests.kernels.cases import DTYPES, batch, embeddings, same_bits

ROUNDING = {"upward": 0x800, "downward": 0x400}  # of fesetround on x86
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in available_backends().items()
    if name in ("cpu", "reference")
]


@contextlib.contextmanager
def changed(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def attribute(owner, name, value):
    return changed(lambda: getattr(owner, name), lambda x: setattr(owner, name, x), value)


@contextlib.contextmanager
def flushing():
    assert torch.set_flush_denormal(True), "this processor cannot flush subnormals"
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def rounding(direction):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the numbers of the rounding modes are another processor's")
    library = ctypes.CDLL(None)
    return changed(library.fegetround, library.fesetround, ROUNDING[direction])


@contextlib.contextmanager
def deterministic():
    with attribute(torch.utils.deterministic, "fill_uninitialized_memory", True):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def matmul_precision(value):
    get, put = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    return changed(get, put, value)


FLOAT_MODES = {
    "subnormals flushed": flushing,
    **{f"rounding {x}": lambda x=x: rounding(x) for x in ROUNDING},
}
STATES = {
    **FLOAT_MODES,
    "default dtype float64": lambda: changed(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "default dtype float16": lambda: changed(
        torch.get_default_dtype, torch.set_default_dtype, torch.float16
    ),
    "default device meta": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "deterministic algorithms": deterministic,
    "matmul precision medium": lambda: matmul_precision("medium"),
    "fp32 precision bf16": lambda: attribute(
        torch.backends.mkldnn.matmul, "fp32_precision", "bf16"
    ),
    "fp32 precision tf32": lambda: attribute(torch.backends, "fp32_precision", "tf32"),
}
WITHOUT_GRADIENTS = {"no_grad": torch.no_grad, "inference mode": torch.inference_mode}


def rounds_and_flushes():
    """How this thread computes: a half of the least normal number, and sums that have to round."""
    least, one, little = 2.0**-1022, 1.0, 1e-300
    return least / 2 > 0, one + little, one - little, -one - little


def state():
    """All that a test changes and an op might."""
    return (
        rounds_and_flushes(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_num_threads(),
        torch.get_rng_state().numpy().tobytes(),
    )


def grouped(scale, dtype):
    return [x * scale for x in embeddings((5,), 7, 33, dtype)]


def in_batch(scale, dtype):
    return [x * scale for x in batch(6, 11, 33, dtype)]


SOFT = {"rank_temperature": 0.05}


def coded(query, corpus, **given):
    """Its results, and the codes behind them."""
    codes = ek.row_codes(corpus, **given)
    found = ek.coded_topk(query, corpus, codes, 4, **given)
    return [*codes, *found[:3]]


LOSSES = {
    f"info_nce {t} {reduction}{' symmetric' * symmetric}": (
        in_batch,
        lambda q, c, t=t, **given: ek.info_nce(
            q, c, temperature=t, return_statistics=True, **given
        ),
        {"reduction": reduction, "symmetric": symmetric},
    )
    for t in (0.05, 0.003)  # at the lower one losses are subnormal
    for reduction in ("mean", "none")
    for symmetric in (False, True)
}
# Rounded to the scores' dtype, where the first is subnormal in float32.
GRADES = torch.linspace(0, 1, 7, dtype=torch.float64).clamp(min=1e-40)
# What an op is called with, the op, its options. Results that have a graph are differentiated.
OPS = {
    "ranking_reward": (grouped, ek.ranking_reward, {}),
    "soft ranks": (grouped, ek.ranking_reward, SOFT),
    "shared negatives": (
        lambda *x: [y if y.dim() == 2 else y[0] for y in grouped(*x)],
        ek.ranking_reward,
        {},
    ),
    "bank": (
        lambda *x: [y if y.dim() == 2 else y.flatten(0, 1) for y in grouped(*x)],
        ek.ranking_reward,
        {"negative_index": torch.arange(30).view(5, 6) * 7 % 33 - 1},
    ),
    "graded": (
        grouped,
        lambda q, p, n, **given: ek.ranking_reward(q, p, n, relevance=GRADES, **given),
        SOFT,
    ),
    "ranking_reward_and_grad": (grouped, ek.ranking_reward_and_grad, {}),
    "weighed": (
        lambda *x: [*grouped(*x), torch.linspace(-1, 1, 5).double() * x[0]],
        lambda q, p, n, w, **given: ek.ranking_reward_and_grad(q, p, n, weight=w, **given),
        {},
    ),
    "reward_from_scores": (
        lambda *x: [grouped(*x)[0]],
        lambda scores, **given: ek.reward_from_scores(scores, **given),
        SOFT,
    ),
    "in_batch_ranking_reward": (in_batch, ek.in_batch_ranking_reward, {"head": 4}),
    "in_batch_ranking_reward_and_grad": (in_batch, ek.in_batch_ranking_reward_and_grad, {}),
    "rank_statistics": (in_batch, ek.rank_statistics, {"k": 4, "temperature": 0.05}),
    **LOSSES,
    "info_nce_and_grad": (in_batch, ek.info_nce_and_grad, {}),
    "topk cosine": (in_batch, lambda q, c, **given: ek.topk(q, c, 4, **given), {}),
    "topk dot": (in_batch, lambda q, c, **given: ek.topk(q, c, 4, metric="dot", **given), {}),
    "coded_topk": (in_batch, coded, {}),
    **{
        f"group_advantages {scale}": (
            lambda *x: [grouped(*x)[0]],
            lambda reward, backend, scale=scale: torch.ops.elva_kernels.group_advantages(
                reward.detach(), scale, 1e-4, backend
            ),
            {},
        )
        for scale in ("std", "batch", "none")
    },
}


def flat(results):
    """The tensors in nested results."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [] if results is None else [y for x in results for y in flat(x)]


def results(op, inputs, upstream, backend, with_gradients):
    """All values of an op, and the gradients on its inputs."""
    _, function, options = OPS[op]
    found = flat(function(*inputs, backend=backend, **options))
    values = [x.detach() for x in found]
    watched = [x for x in found if x.requires_grad]
    if not with_gradients or not watched:
        return values
    weights = [upstream[x.dtype][: x.numel()].view(x.shape) for x in watched]
    wanted = [x for x in inputs if x.requires_grad]
    return values + list(torch.autograd.grad(watched, wanted, weights))


def scales(dtype, setting):
    """Ordinary rows; where the thread computes otherwise, also rows of subnormal numbers."""
    least = {torch.float16: 1e-7, torch.float64: 1e-310}
    return (1.0, least.get(dtype, 1e-39)) if setting in FLOAT_MODES else (1.0,)


@functools.cache
def case(op, dtype, scale, backend, with_gradients):
    """Inputs, upstream gradients, and what comes of them as torch is set by default."""
    inputs = [x.requires_grad_() for x in OPS[op][0](scale, dtype)]
    weights = torch.linspace(0.5, -1, 8).double() * scale
    upstream = {x: weights.to(x) for x in (torch.float32, torch.float64)}
    return inputs, upstream, results(op, inputs, upstream, backend, with_gradients)


def check(op, setting, backend, with_gradients=True):
    """With and without the state, in every dtype; and the state after is the state before."""
    enter = STATES.get(setting) or WITHOUT_GRADIENTS[setting]
    for dtype in DTYPES:
        for scale in scales(dtype, setting):
            inputs, upstream, expected = case(op, dtype, scale, backend, with_gradients)
            with enter():
                before = state()
                found = results(op, inputs, upstream, backend, with_gradients)
                after = state()
            assert after == before
            for a, b in zip(found, expected, strict=True):
                assert same_bits(a, b), (dtype, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", STATES)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_process(op, setting, backend):
    check(op, setting, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", WITHOUT_GRADIENTS)
@pytest.mark.parametrize("op", OPS)
def test_values_do_not_depend_on_autograd(op, setting, backend):
    check(op, setting, backend, with_gradients=False)
