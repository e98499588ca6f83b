"""Properties of the grouped reward on inputs that hypothesis makes up, on every backend."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elva_kernels import ranking_reward, ranking_reward_and_grad
from tests import tolerances
from tests.kernels.cases import DTYPES, EVERY_LEVEL, INTERPRETED, same_bits, truth_scores

pytestmark = [
    pytest.mark.parametrize("backend", EVERY_LEVEL, indirect=True),
    pytest.mark.usefixtures("nan_filled_memory"),
]
many = settings(
    max_examples=10 if INTERPRETED else 150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-40, 1e-20, 1e20, 3e38, 65504.0, 6e-8]
BAD = [math.nan, math.inf, -math.inf]


@st.composite
def groups(draw, bad=True):
    """query, positive, negatives, mask and relevance of a few small groups, with special values
    sown in."""
    dtype = draw(st.sampled_from(DTYPES))
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    n, d = draw(st.integers(0, 9)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in [(*leading, d), (*leading, d), (*leading, n, d)]:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):
            x = x.sign()
        scale = torch.randint(-12, 13, (*shape[:-1], 1), generator=generator)
        tensors.append((x * torch.exp2(scale.double())).to(dtype))
    largest = torch.finfo(dtype).max
    for x in tensors:
        flat = x.view(-1)
        for _ in range(draw(st.integers(0, 3))):
            if flat.numel():
                value = draw(st.sampled_from(SPECIAL + (BAD if bad else [])))
                if math.isfinite(value):
                    value = max(-largest, min(largest, value))
                flat[draw(st.integers(0, flat.numel() - 1))] = value
    mask = torch.rand(*leading, n, generator=generator) < 0.8 if draw(st.booleans()) else None
    relevance = None
    if draw(st.booleans()):
        relevance = torch.rand(*leading, n, generator=generator)
        relevance = torch.where(relevance < 0.3, 0.0, torch.where(relevance > 0.8, 1.0, relevance))
    return (*tensors, mask, relevance)


@given(case=groups())
@many
def test_results_are_consistent_and_bad_groups_stay_alone(backend, case):
    *inputs, mask, relevance = case
    options = {"mask": mask, "relevance": relevance, "backend": backend}
    result, *gradients = ranking_reward_and_grad(*inputs, **options)
    n = inputs[2].shape[-2]
    live = torch.ones(*result.rank.shape, n + 1, dtype=torch.bool)
    if mask is not None:
        live[..., 1:] = mask
    key = result.scores.nan_to_num(nan=-math.inf)
    at_least = (key[..., 1:] >= key[..., :1]) & live[..., 1:]
    assert torch.equal(result.rank, (1 + at_least.sum(-1)).int())
    assert (result.scores[~live] == -math.inf).all()
    rows = torch.cat([inputs[1].unsqueeze(-2), inputs[2]], dim=-2)
    sound_rows = rows.isfinite().all(-1) & inputs[0].isfinite().all(-1, keepdim=True)
    assert torch.equal(result.scores.isnan(), ~sound_rows & live)
    sound = (sound_rows | ~live).all(-1)
    for value in result[:3]:
        assert torch.equal(value.isfinite(), sound)
    in_range = result.scores[sound_rows & live]
    assert (in_range.abs() <= 1).all()
    again, *gradients_again = ranking_reward_and_grad(*inputs, **options)
    for a, b in zip((*result, *gradients), (*again, *gradients_again), strict=True):
        assert same_bits(a, b)
    assert gradients[2][~live[..., 1:]].eq(0).all()


@given(case=groups(bad=False))
@many
def test_scores_are_right_for_every_finite_input(backend, case):
    *inputs, mask, _ = case
    dtype = inputs[0].dtype
    scores = ranking_reward(*inputs, mask=mask, backend=backend).scores
    truth = truth_scores(*inputs, mask)
    if mask is not None:
        truth[..., 1:][~mask] = -math.inf
        assert torch.equal(scores == -math.inf, truth == -math.inf)
    error = (scores.double() - truth).abs().nan_to_num(nan=0.0)  # -inf minus -inf
    assert (error <= tolerances.SCORE[dtype]).all()


@given(case=groups(), split=st.integers(0, 3))
@many
def test_groups_can_be_split_and_merged(backend, case, split):
    *inputs, mask, relevance = case
    if inputs[0].dim() != 2:
        groups = inputs[0].shape[:-1].numel()
        inputs = [x.reshape(groups, *x.shape[-k:]) for x, k in zip(inputs, (1, 1, 2), strict=True)]
        n = inputs[2].shape[-2]
        mask, relevance = (None if x is None else x.reshape(groups, n) for x in (mask, relevance))
    options = {"mask": mask, "relevance": relevance}
    whole = ranking_reward_and_grad(*inputs, **options, backend=backend)
    for part in (slice(0, split), slice(split, None)):
        given = {name: None if x is None else x[part] for name, x in options.items()}
        some = ranking_reward_and_grad(*(x[part] for x in inputs), **given, backend=backend)
        for a, b in zip((*some[0], *some[1:]), (*whole[0], *whole[1:]), strict=True):
            assert same_bits(a, b[part])
