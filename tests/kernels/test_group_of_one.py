"""A group of one process, on every backend: what a process has alone."""

import contextlib
import tempfile

import pytest
import torch
import torch.distributed as dist

from elva_kernels import (
    in_batch_ranking_reward_and_grad,
    info_nce,
    info_nce_and_grad,
    rank_statistics,
)
from tests.kernels.cases import BACKENDS, DTYPES, batch, computing

every_backend = pytest.mark.parametrize("backend", computing("info_nce_share", BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@contextlib.contextmanager
def one_process():
    """Its group."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


def given_of(dtype):
    """A batch with everything that says who is compared with whom."""
    query, candidates = batch(5, 23, 33, dtype)
    candidates[7] = candidates[3]
    named = {
        "target": torch.tensor([[3, 0], [1, -1], [-1, -1], [20, 4], [9, 9]]),
        "excluded": torch.tensor([[4, 1], [0, 22], [0, 22], [2, 5]]),
        "candidate_ids": torch.arange(23) % 19,
        "max_score": 0.25,
    }
    return (query, candidates), named


@every_backend
@each_dtype
@pytest.mark.parametrize("symmetric", [False, True])
def test_has_what_it_has_alone(backend, dtype, symmetric):
    rows, named = given_of(dtype)
    named |= {"backend": backend}
    options = {"temperature": torch.tensor(0.2), "symmetric": symmetric}
    alone = info_nce_and_grad(*rows, **options, **named)
    with one_process() as group:
        together = info_nce_and_grad(*rows, **options, **named, group=group)
    exact = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(together[0], alone[0], rtol=exact, atol=exact)
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    rounding = 1e-11 if dtype == torch.float64 else rounding
    for found, expected in zip(together[1:3], alone[1:3], strict=True):
        assert found.dtype == dtype
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding * size)
    torch.testing.assert_close(together[3], alone[3], rtol=1e-5, atol=1e-6)
    with one_process() as group:
        _, found = info_nce(*rows, **options, **named, group=group, return_statistics=True)
    _, statistics = info_nce(*rows, **options, **named, return_statistics=True)
    for name, expected in statistics._asdict().items():
        assert torch.equal(getattr(found, name), expected), name


@every_backend
def test_a_gradient_that_is_not_asked_for_is_none(backend):
    rows, named = given_of(torch.float32)
    named |= {"backend": backend}
    with one_process() as group:
        _, *both, _ = info_nce_and_grad(*rows, **named, group=group)
        for place, name in enumerate(("query", "candidates")):
            _, *found, _ = info_nce_and_grad(*rows, **named, group=group, wrt=(name,))
            assert found[1 - place] is None
            assert torch.equal(found[place], both[place])


@every_backend
def test_ranks_and_rewards_are_those_alone(backend):
    rows, named = given_of(torch.float32)
    named |= {"backend": backend}
    alone = rank_statistics(*rows, k=4, temperature=0.2, **named)
    reward, *gradients = in_batch_ranking_reward_and_grad(*rows, head=6, **named)
    with one_process() as group:
        together = rank_statistics(*rows, k=4, temperature=0.2, **named, group=group)
        again, *grads = in_batch_ranking_reward_and_grad(*rows, head=6, **named, group=group)
    for name, expected in alone._asdict().items():
        assert torch.equal(getattr(together, name), expected), name
    for name, expected in reward._asdict().items():
        assert torch.equal(getattr(again, name), expected), name
    for found, expected in zip(grads, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
