"""Hostile arguments: each is refused before anything runs, in one line that says what to do."""

import math

import numpy as np
import pytest
import torch

from elva_kernels import (
    BackendUnavailable,
    RankingRewardLoss,
    group_advantages,
    ranking_reward,
    ranking_reward_and_grad,
    reward_from_scores,
)
from elva_kernels.backends import choice

Q, P, N = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 5, 8)
BACKENDS = "auto, cpu, cuda, triton, reference"
MASK = torch.ones(3, 5, dtype=torch.bool)
META = torch.empty(3, 8, device="meta")

EMBEDDINGS = [
    (
        {"query": None},
        TypeError,
        "query must be a tensor [*, D], got NoneType; use torch.as_tensor",
    ),
    ({"query": [[1.0] * 8] * 3}, TypeError, "query must be a tensor [*, D], got list"),
    ({"positive": np.ones((3, 8))}, TypeError, "positive must be a tensor [*, D], got ndarray"),
    (
        {"query": Q.long()},
        TypeError,
        "query must be bfloat16, float16, float32 or float64, got torch.int64",
    ),
    ({"query": Q.to(torch.complex64)}, TypeError, "got torch.complex64; convert it with .to()"),
    (
        {"negatives": N.half()},
        TypeError,
        "negatives must have query's dtype torch.float32, got torch.float16",
    ),
    (
        {"positive": P.double()},
        TypeError,
        "positive must have query's dtype torch.float32, got torch.float64",
    ),
    (
        {"positive": META},
        ValueError,
        "positive must be on the first tensor's device cpu, got meta; move it with .to('cpu')",
    ),
    (
        {"mask": MASK.to("meta")},
        ValueError,
        "mask must be on the first tensor's device cpu, got meta",
    ),
    (
        {"query": Q.to_sparse()},
        ValueError,
        "query must be dense, got torch.sparse_coo; use .to_dense()",
    ),
    ({"query": torch.tensor(1.0)}, ValueError, "query must have shape [*, D], got shape []"),
    ({"negatives": N[0, 0]}, ValueError, "negatives must have shape [*, N, D], got shape [8]"),
    (
        {"query": Q[:, :0], "positive": P[:, :0], "negatives": N[:, :, :0]},
        ValueError,
        "query must have D >= 1, got shape [3, 0]",
    ),
    ({"positive": P[:, :4]}, ValueError, "positive must have query's D = 8, got shape [3, 4]"),
    (
        {"negatives": N[..., :4]},
        ValueError,
        "negatives must have query's D = 8, got shape [3, 5, 4]",
    ),
    (
        {"positive": P[:2]},
        ValueError,
        "positive must have leading dimensions that broadcast with [3], got [2]",
    ),
    (
        {"negatives": N[:2]},
        ValueError,
        "negatives must have leading dimensions that broadcast with [3], got [2]",
    ),
    (
        {"query": N, "positive": N},
        ValueError,
        "negatives must have leading dimensions that broadcast with [3, 5], got [3]",
    ),
    (
        {"mask": MASK[:2]},
        ValueError,
        "mask must have leading dimensions that broadcast with [3], got [2]",
    ),
    ({"mask": MASK[:, :4]}, ValueError, "mask must have shape [*, N] with N = 5, got shape [3, 4]"),
    (
        {"mask": torch.tensor(True)},
        ValueError,
        "mask must have shape [*, N] with N = 5, got shape []",
    ),
    (
        {"mask": MASK.float()},
        TypeError,
        "live, got torch.float32; convert it with .bool()",
    ),
    ({"mask": [[True] * 5] * 3}, TypeError, "mask must be a bool tensor [*, N], got list"),
    ({"mask": MASK.to_sparse()}, ValueError, "mask must be dense"),
]

GRADES = torch.full((3, 5), 0.5)
WRONG = GRADES.clone()
WRONG[0, 1], WRONG[2, 0] = 1.5, math.nan
RELEVANCES = [
    ({"relevance": [[0.5] * 5] * 3}, TypeError, "relevance must be a tensor [*, N], got list"),
    (
        {"relevance": GRADES > 0},
        TypeError,
        "relevance must be bfloat16, float16, float32 or float64, got torch.bool; convert it",
    ),
    ({"relevance": GRADES.long()}, TypeError, "got torch.int64; convert it with .to()"),
    (
        {"relevance": GRADES.to("meta")},
        ValueError,
        "relevance must be on the first tensor's device cpu, got meta; move it with .to('cpu')",
    ),
    ({"relevance": GRADES.to_sparse()}, ValueError, "relevance must be dense"),
    (
        {"relevance": torch.tensor(0.5)},
        ValueError,
        "relevance must have shape [*, N] with N = 5, got shape []",
    ),
    (
        {"relevance": GRADES[:, :4]},
        ValueError,
        "relevance must have shape [*, N] with N = 5, got shape [3, 4]",
    ),
    (
        {"relevance": GRADES[:2]},
        ValueError,
        "relevance must have leading dimensions that broadcast with [3], got [2]",
    ),
    (
        {"relevance": WRONG},
        ValueError,
        "relevance must be in [0, 1], got 1.5 at [0, 1], nan at [2, 0]",
    ),
    ({"relevance": GRADES[0] - 1}, ValueError, "got -0.5 at [0], -0.5 at [1]"),
    (
        {"relevance": GRADES + 0.75},
        ValueError,
        "got 1.25 at [0, 0], 1.25 at [0, 1], 1.25 at [0, 2], 1.25 at [0, 3], 1.25 at [0, 4], "
        "1.25 at [1, 0], 1.25 at [1, 1], 1.25 at [1, 2] and 7 more",
    ),
    (
        {"relevance": WRONG, "mask": WRONG != 1.5},
        ValueError,
        "relevance must be in [0, 1], got nan at [2, 0]",
    ),
]

INDEX = torch.zeros(3, 4, dtype=torch.int64)
BANKED = {"negatives": N[0], "negative_index": INDEX}
BANKS = [
    (
        {"negatives": N},
        ValueError,
        "negatives must have shape [M, D] beside negative_index, got shape [3, 5, 8]; "
        "use .flatten(0, -2)",
    ),
    ({"negative_index": [[0]]}, TypeError, "negative_index must be a tensor [*, N], got list"),
    (
        {"negative_index": INDEX.float()},
        TypeError,
        "negative_index must hold integers, got torch.float32; convert it with .long()",
    ),
    (
        {"negative_index": INDEX.to("meta")},
        ValueError,
        "negative_index must be on the first tensor's device cpu, got meta",
    ),
    ({"negative_index": INDEX.to_sparse()}, ValueError, "negative_index must be dense"),
    (
        {"negative_index": torch.tensor(0)},
        ValueError,
        "negative_index must have shape [*, N], got shape []",
    ),
    (
        {"negative_index": INDEX[:2]},
        ValueError,
        "negative_index must have leading dimensions that broadcast with [3], got [2]",
    ),
    ({"negatives": N[0, :, :4]}, ValueError, "negatives must have query's D = 8, got shape [5, 4]"),
    ({"mask": MASK}, ValueError, "mask must have shape [*, N] with N = 4, got shape [3, 5]"),
    (
        {"negative_index": INDEX - 2},
        ValueError,
        "negative_index must hold rows of negatives, in [0, 5), or -1 for none, got -2 at [0, 0], "
        "-2 at [0, 1], -2 at [0, 2], -2 at [0, 3], -2 at [1, 0], -2 at [1, 1], -2 at [1, 2], "
        "-2 at [1, 3] and 4 more",
    ),
    (
        {"negative_index": torch.where(torch.arange(4) == 2, 5, INDEX)},
        ValueError,
        "got 5 at [0, 2], 5 at [1, 2], 5 at [2, 2]",
    ),
]

SCALARS = [
    ({"margin": math.nan}, ValueError, "got nan"),
    ({"margin": -math.inf}, ValueError, "got -inf"),
    ({"margin": None}, TypeError, "margin must be a number, got NoneType None"),
    ({"margin": True}, TypeError, "margin must be a number, got bool True"),
    ({"margin": "0.1"}, TypeError, "margin must be a number, got str '0.1'"),
    ({"margin": 0.1j}, TypeError, "margin must be a number, got complex"),
    ({"rank_penalty": -0.1}, ValueError, "rank_penalty must be finite and at least 0, got -0.1"),
    ({"w_margin": math.inf}, ValueError, "w_margin must be finite and at least 0, got inf"),
    ({"w_rank": -1}, ValueError, "w_rank must be finite and at least 0, got -1.0"),
    ({"rank_temperature": -1.0}, ValueError, "rank_temperature must be finite and at least 0"),
    ({"rank_temperature": math.nan}, ValueError, "rank_temperature must be finite"),
    ({"rank_temperature": 1e-9}, ValueError, "rank_temperature must be 0 or at least 1e-06"),
    ({"backend": "gpu"}, ValueError, f"backend must be one of {BACKENDS}, got 'gpu'"),
    ({"backend": None}, ValueError, f"backend must be one of {BACKENDS}, got None"),
]


def refused(function, error, message, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert type(caught.value) is error
    assert message in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("function", [ranking_reward, ranking_reward_and_grad])
@pytest.mark.parametrize(("change", "error", "message"), EMBEDDINGS + RELEVANCES + SCALARS, ids=str)
def test_embeddings(function, change, error, message):
    options = {"query": Q, "positive": P, "negatives": N} | change
    text = refused(function, error, message, **options)
    assert text.startswith(f"{function.__name__}: ")


@pytest.mark.parametrize(("change", "error", "message"), RELEVANCES, ids=str)
def test_relevance_of_scores_and_beside_a_graph(change, error, message):
    scores = torch.randn(3, 6)
    for leaf in (scores, scores.clone().requires_grad_()):
        text = refused(reward_from_scores, error, message, leaf, **change)
        assert text.startswith("reward_from_scores: ")
    refused(ranking_reward, error, message, Q.clone().requires_grad_(), P, N, **change)
    refused(RankingRewardLoss(), error, message, Q, P, N, **change)


def test_a_relevance_that_nobody_looks_at_may_be_anything():
    live = (WRONG >= 0) & (WRONG <= 1)
    expected = ranking_reward(Q, P, N, mask=live, relevance=GRADES).reward
    assert torch.equal(ranking_reward(Q, P, N, mask=live, relevance=WRONG).reward, expected)
    index = torch.where(live[0], torch.arange(5), -1)
    options = {"negative_index": index, "mask": live[2:]}
    found = ranking_reward(Q, P, N[0], relevance=WRONG[::2, None], **options).reward
    assert found.shape == (2, 3)
    assert found.isfinite().all()
    message = (
        "relevance must be in [0, 1], got nan at [1, 0, 0]"  # of the relevance, not the groups
    )
    shown = {"negative_index": index, "relevance": WRONG[::2, None]}
    refused(ranking_reward, ValueError, message, Q, P, N[0], **shown)
    tiny = torch.full((5,), 1 + 1e-12, dtype=torch.float64)  # 1 in float32
    assert ranking_reward(Q, P, N, relevance=tiny).reward.isfinite().all()
    exact = [x.double() for x in (Q, P, N)]
    refused(ranking_reward, ValueError, "got 1 at [0]", *exact, relevance=tiny)


@pytest.mark.parametrize("function", [ranking_reward, ranking_reward_and_grad])
@pytest.mark.parametrize(("change", "error", "message"), BANKS, ids=str)
def test_banks(function, change, error, message):
    options = {"query": Q, "positive": P} | BANKED | change
    text = refused(function, error, message, **options)
    assert text.startswith(f"{function.__name__}: ")
    query = Q.clone().requires_grad_()
    refused(function, error, message, **options | {"query": query})


@pytest.mark.parametrize(
    ("wrt", "error", "message"),
    [
        (
            "query",
            TypeError,
            "wrt must be a tuple of names, got str 'query'; use ('query',)",
        ),
        (None, TypeError, "wrt must be a tuple of names, got NoneType None"),
        (
            ("query", "candidates"),
            ValueError,
            "wrt must name some of query, positive, negatives, got 'candidates'",
        ),
    ],
)
def test_wrt(wrt, error, message):
    refused(ranking_reward_and_grad, error, message, Q, P, N, wrt=wrt)


@pytest.mark.parametrize("function", [ranking_reward, RankingRewardLoss])
@pytest.mark.parametrize("margin", [2.1, -2.1, 3])
def test_margin_is_a_cosine_difference(function, margin):
    tensors = (Q, P, N) if function is ranking_reward else ()
    refused(function, ValueError, "margin must be in [-2, 2], got", *tensors, margin=margin)
    assert reward_from_scores(torch.randn(4), margin=margin).reward.isfinite()


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (1.0, TypeError, "weight must be a tensor [*], got float"),
        (
            torch.ones(2),
            ValueError,
            "weight must broadcast to the reward's shape [3], got shape [2]",
        ),
        (
            torch.ones(1, 3),
            ValueError,
            "weight must broadcast to the reward's shape [3], got shape [1, 3]",
        ),
        (
            torch.ones(3, dtype=torch.int32),
            TypeError,
            "weight must be bfloat16, float16, float32 or float64",
        ),
        (
            torch.ones(3, device="meta"),
            ValueError,
            "weight must be on the first tensor's device cpu",
        ),
    ],
)
def test_weight(weight, error, message):
    refused(ranking_reward_and_grad, error, message, Q, P, N, weight=weight)


@pytest.mark.parametrize(
    ("scores", "options", "error", "message"),
    [
        (None, {}, TypeError, "scores must be a tensor [*, C], got NoneType"),
        (
            torch.ones(3, 0),
            {},
            ValueError,
            "scores must hold the positive's in column 0, got shape [3, 0]",
        ),
        (torch.tensor(1.0), {}, ValueError, "scores must have shape [*, C], got shape []"),
        (torch.ones(3, 6).int(), {}, TypeError, "scores must be bfloat16"),
        (
            torch.ones(3, 6),
            {"mask": torch.ones(3, 6).bool()},
            ValueError,
            "mask must have shape [*, N] with N = 5",
        ),
        (
            torch.ones(3, 6),
            {"mask": torch.ones(2, 5).bool()},
            ValueError,
            "mask must have leading dimensions",
        ),
    ],
)
def test_scores(scores, options, error, message):
    text = refused(reward_from_scores, error, message, scores, **options)
    assert text.startswith("reward_from_scores: ")


@pytest.mark.parametrize(("change", "error", "message"), SCALARS, ids=str)
def test_scalars_beside_scores_and_in_the_module(change, error, message):
    refused(reward_from_scores, error, message, torch.randn(4), **change)
    refused(RankingRewardLoss, error, message, **change)


@pytest.mark.parametrize(
    ("reward", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "reward must be a tensor [*, G], got list"),
        (torch.tensor(1.0), {}, ValueError, "reward must have shape [*, G], got shape []"),
        (
            torch.ones(2, 0),
            {},
            ValueError,
            "reward must hold a rollout in each group, got shape [2, 0]",
        ),
        (torch.ones(2, 3).long(), {}, TypeError, "reward must be bfloat16"),
        (
            torch.ones(2, 3),
            {"scale": "group"},
            ValueError,
            "scale must be one of std, batch, none, got 'group'",
        ),
        (torch.ones(2, 3), {"std_eps": -1e-4}, ValueError, "std_eps must be finite and at least 0"),
        (
            torch.ones(2, 3),
            {"std_eps": math.nan},
            ValueError,
            "std_eps must be finite and at least 0",
        ),
    ],
)
def test_advantages(reward, options, error, message):
    text = refused(group_advantages, error, message, reward, **options)
    assert text.startswith("group_advantages: ")


def test_named_backend_on_another_device():
    meta = [x.to("meta") for x in (Q, P, N)]
    message = "backend must run here, got 'cpu'; cpu takes tensors on cpu, these are on meta"
    # A meta tensor never reaches a launcher, so the table itself is asked.
    asked = ("ranking_reward", "cpu", torch.device("meta"), torch.float32)
    refused(choice.launcher, BackendUnavailable, message, *asked)
    assert ranking_reward(*meta).scores.shape == (3, 6)


def test_check_finite_names_the_rows():
    negatives = N.clone()
    negatives[1, 2, 3], negatives[2, 0, 0] = math.nan, math.inf
    for function in (ranking_reward, ranking_reward_and_grad):
        refused(
            function,
            ValueError,
            "negatives must be finite, got NaN or inf in rows [1, 2], [2, 0]",
            Q,
            P,
            negatives,
            check_finite=True,
        )
        mask = MASK.clone()
        mask[1, 2] = mask[2, 0] = False
        function(Q, P, negatives, mask=mask, check_finite=True)
    bank = {"negatives": negatives[1], "negative_index": INDEX + 2, "check_finite": True}
    message = "negatives must be finite, got NaN or inf in rows [2]"
    refused(ranking_reward, ValueError, message, Q, P, **bank)
    ranking_reward(Q, P, **bank | {"negative_index": INDEX})  # nobody names the row
    many = torch.full((20, 8), math.nan)
    refused(ranking_reward, ValueError, "and 12 more", many, P[:1], N[:1], check_finite=True)
    scores = torch.randn(3, 6)
    scores[2, 4] = math.nan
    message = "scores must be finite, got NaN or inf in entries [2, 4]"
    refused(reward_from_scores, ValueError, message, scores, check_finite=True)
    assert math.isnan(reward_from_scores(scores).reward[2])


def test_numbers_of_any_real_type_are_taken():
    expected = ranking_reward(Q, P, N, margin=1.0, w_rank=0.5).reward
    for margin, w_rank in [(1, np.float32(0.5)), (np.int64(1), np.float64(0.5))]:
        assert torch.equal(ranking_reward(Q, P, N, margin=margin, w_rank=w_rank).reward, expected)


def test_arguments_after_the_tensors_are_keyword_only():
    with pytest.raises(TypeError):
        ranking_reward(Q, P, N, MASK)
