"""Every argument of every public function, with what does not belong there: one line, one form."""

import decimal
import fractions
import inspect
import math
import re

import numpy as np
import pytest
import torch

import elva_kernels as ek
from elva_kernels import BackendUnavailable, InfoNCELoss, RankingRewardLoss

FORM = re.compile(r"(?P<op>\w+): (?P<argument>\w+) must [^\n]+, got [^\n]+")
Q, P, N, C = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 5, 8), torch.randn(5, 8)


class Subclass(torch.Tensor):
    """Nothing but another type."""


# Each call as it is right; a hostile value takes the place of one argument.
CALLS = {
    ek.ranking_reward: {"query": Q, "positive": P, "negatives": N},
    ek.ranking_reward_and_grad: {"query": Q, "positive": P, "negatives": N},
    ek.reward_from_scores: {"scores": torch.randn(3, 6)},
    ek.in_batch_ranking_reward: {"query": Q, "candidates": C},
    ek.in_batch_ranking_reward_and_grad: {"query": Q, "candidates": C},
    ek.rank_statistics: {"query": Q, "candidates": C},
    ek.info_nce: {"query": Q, "candidates": C},
    ek.info_nce_and_grad: {"query": Q, "candidates": C},
    ek.topk: {"query": Q, "corpus": C, "k": 2},
    ek.row_codes: {"corpus": C},
    ek.coded_topk: {"query": Q, "corpus": C, "codes": ek.row_codes(C), "k": 2},
    ek.group_advantages: {"reward": torch.randn(3, 4)},
    RankingRewardLoss: {},
    InfoNCELoss: {},
}
BANK = {"negatives": C, "negative_index": torch.tensor([[0, 1], [2, -1], [4, 4]])}
ARGUMENTS = [
    pytest.param(function, call | more, argument, id=f"{function.__name__}-{argument}{name}")
    for function, call in CALLS.items()
    for name, more in {"": {}, "-bank": BANK}.items()
    if more.keys() <= inspect.signature(function).parameters.keys()
    for argument in inspect.signature(function).parameters
]


def hostile_values():
    nested = [torch.randn(2, 8), torch.randn(3, 8)]
    yield from (None, True, 0, -1, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 10**5000)
    yield from (
        0.0,
        -0.0,
        1e-300,
        0.1,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
        1j,
        "",
        "auto",
        "x\ny",
    )
    yield from (b"auto", [], [1.0], (0.1,), {}, {"query"}, object(), type, lambda: None, ...)
    yield from (decimal.Decimal("0.1"), decimal.Decimal("sNaN"), decimal.Decimal("1e999"))
    yield from (fractions.Fraction(1, 3), fractions.Fraction(10**5000), range(3))
    yield from (np.float32(0.5), np.float64("nan"), np.int64(2), np.bool_(True), np.array(0.5))
    yield from (np.array([0.5, 1.0]), np.array("x"), np.longdouble(1) * np.longdouble("1e4000"))
    yield from (torch.float32, torch.device("cpu"), torch.Size([3]))
    yield from (torch.tensor(0.5), torch.tensor(2), torch.tensor(True), torch.tensor(1j))
    yield from (torch.tensor([0.5]), torch.tensor([1, 2]), torch.empty(0), torch.empty(0, 8))
    yield from (torch.tensor(0.5, requires_grad=True), torch.tensor(math.nan), torch.randn(3, 8, 1))
    yield from (torch.empty(3, 8, device="meta"), torch.empty((), device="meta"))
    yield from (torch.nested.nested_tensor(nested), torch.nested.as_nested_tensor(nested))
    yield torch.nested.nested_tensor(nested, layout=torch.jagged)
    yield from (Q.to_sparse(), Q.to_sparse_csr(), Q.to(torch.complex64), Q.half(), Q > 0, Q.long())
    yield torch.quantize_per_tensor(Q, 0.1, 0, torch.qint8)
    yield from (Q.to(torch.float8_e4m3fn), Q.as_subclass(Subclass), torch.nn.Parameter(Q.clone()))
    yield from (torch.full((3,), -5), torch.full((3,), 2**62), torch.tensor([[0, 99]]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("function", "right", "argument"), ARGUMENTS)
def test_a_refusal_is_one_line_that_names_the_argument(function, right, argument):
    refused = 0
    for value in hostile_values():
        try:
            function(**right | {argument: value})
        except (TypeError, ValueError, BackendUnavailable) as error:
            refused += 1
            found = FORM.fullmatch(str(error))
            assert found, f"{type(value)}: {error!r}"
            # A value and gradient in one call may be refused by what it has in common.
            names = (function.__name__, function.__name__.removesuffix("_and_grad"))
            assert found["op"] in names
            assert found["argument"] in inspect.signature(function).parameters
            assert len(str(error)) < 400
    assert refused >= 20


@pytest.mark.parametrize(
    "half",
    [
        np.float32(0.5),
        np.array(0.5),
        decimal.Decimal("0.5"),
        fractions.Fraction(1, 2),
        torch.tensor(0.5),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ],
    ids=repr,
)
def test_real_numbers_of_any_type_are_taken(half):
    expected = ek.ranking_reward(Q, P, N, margin=0.5, w_rank=0.5, rank_temperature=0.5).reward
    found = ek.ranking_reward(Q, P, N, margin=half, w_rank=half, rank_temperature=half).reward
    assert torch.equal(found, expected)
    assert RankingRewardLoss(margin=half).margin == 0.5
    assert InfoNCELoss(temperature=half).temperature == 0.5
    loss = ek.info_nce(Q, C, temperature=half, max_score=half)
    assert torch.allclose(loss, ek.info_nce(Q, C, temperature=0.5, max_score=0.5), atol=0)
    assert torch.equal(ek.group_advantages(Q, std_eps=half), ek.group_advantages(Q, std_eps=0.5))


@pytest.mark.parametrize("two", [np.int64(2), np.uint8(2), np.array(2)], ids=repr)
def test_integers_of_any_type_are_taken(two):
    assert torch.equal(ek.topk(Q, C, two).index, ek.topk(Q, C, 2).index)
    assert ek.rank_statistics(Q, C, k=two).topk_index.shape == (3, 2)
    head = ek.in_batch_ranking_reward(Q, C, head=two).scores
    assert torch.equal(head, ek.in_batch_ranking_reward(Q, C, head=2).scores)
    assert InfoNCELoss(workspace_mb=two).workspace_mb == 2


def test_flags_of_numpy_are_taken_and_no_words():
    expected = ek.info_nce(Q, C, symmetric=True)
    assert torch.equal(ek.info_nce(Q, C, symmetric=np.bool_(True)), expected)
    with pytest.raises(TypeError, match="symmetric must be a bool, got str 'false'"):
        ek.info_nce(Q, C, symmetric="false")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ek.ranking_reward(Q, P, N, margin=10**400),
            "ranking_reward: margin must be in [-2, 2], got an int of 1329 bits",
        ),
        (
            lambda: ek.topk(torch.nested.nested_tensor([Q, C]), C, 2),
            "topk: query must be dense, got a nested tensor; "
            "use torch.nested.to_padded_tensor; mask or drop its padding",
        ),
        (
            lambda: ek.rank_statistics(Q, C, k=2**63),
            "rank_statistics: k must be at most 2^63 - 1, got 9223372036854775808",
        ),
        (
            lambda: ek.ranking_reward(Q, P, N, margin=torch.tensor(0.1, requires_grad=True)),
            "ranking_reward: margin must be a number, got Tensor; use .item()",
        ),
    ],
    ids=range(4),
)
def test_messages(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "op",
    [
        ek.rank_statistics,
        ek.info_nce,
        ek.info_nce_and_grad,
        ek.in_batch_ranking_reward,
        ek.in_batch_ranking_reward_and_grad,
    ],
)
def test_what_only_values_show_is_refused_in_the_name_of_the_op_that_was_called(op):
    calls = {
        "target": {"target": torch.tensor([0, 1, 9])},
        "excluded": {"excluded": torch.tensor([[0, 0]])},
        "backend": {"backend": "cuda"},
    }
    watched = Q.clone().requires_grad_()
    for argument, options in calls.items():
        for query in (Q, watched):
            with pytest.raises((ValueError, BackendUnavailable)) as caught:
                op(query, C, **options)
            assert str(caught.value).startswith(f"{op.__name__}: {argument} must ")


def test_tensors_without_values_have_no_rows_to_name():
    meta = [x.to("meta") for x in (Q, P, N, C)]
    assert ek.ranking_reward(*meta[:3], check_finite=True).scores.shape == (3, 6)
    assert ek.info_nce(meta[0], meta[3], check_finite=True).shape == ()
    loss = InfoNCELoss(temperature=0.07, learnable_temperature=True)
    assert repr(loss.to("meta")).startswith("InfoNCELoss(temperature=0.07 (learnt), ")
