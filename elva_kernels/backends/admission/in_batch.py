"""What a backend must get right before "auto" uses it: the in-batch ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elva_kernels import reference
from elva_kernels.backends.admission.trial import (
    TEMPERATURE,
    WEIGHTS,
    Launchers,
    Trial,
    Wrong,
    check,
)
from elva_kernels.backends.launcher import Contrast, Launcher
from elva_kernels.backends.shares import Exchange
from elva_kernels.reference import NO_POSITIVE, Batch

_Arguments = tuple[Tensor, Tensor, Batch]

_B, _M, _D = 5, 37, 77
_ON_CPU = torch.device("cpu")
_CROWD, _QUERIES = 137, 70
_COPIES = 120  # of _CROWD candidates: enough for a GPU's larger tiles
# (rounded, wrt) of a call for gradients.
_WANTED = [
    (False, (True, True)),
    *((True, x) for x in ((True, True), (True, False), (False, True))),
]


class _Case(NamedTuple):
    """What a launcher is given on the device, and the same for the truth."""

    given: _Arguments
    exact: _Arguments
    head: int  # the negatives whose order no rounding changes

    @property
    def weight(self) -> Tensor:
        """[B] of the losses or rewards."""
        return torch.linspace(-1, 1, len(self.exact[0]), dtype=torch.float64)


def inputs_of(dtype: torch.dtype) -> _Arguments:
    """Ragged sizes, copies of a positive, ids, a limit, zero, huge, tiny and NaN rows."""
    query, candidates = _randn(11, _B, _D), _randn(12, _M, _D)
    target = torch.tensor([3, 0, 36, 7, 20])
    candidates[target] += query
    candidates[5] = candidates[35] = candidates[3]
    candidates[9] = 0
    candidates[10] = torch.nan
    candidates[11] *= 2.0 ** (8 if dtype == torch.float16 else 60)
    query[1] *= 2.0 ** (-8 if dtype == torch.float16 else -60)
    query[3, 1] = torch.inf
    ids = torch.arange(_M) % 31
    return query.to(dtype), candidates.to(dtype), Batch(target.unsqueeze(1), None, ids, 0.9)


def several_of(dtype: torch.dtype) -> _Arguments:
    """Several positives, one twice, padding, none at all; copies, ids and excluded pairs."""
    query, candidates = _randn(73, 6, _D), _randn(74, _M, _D)
    none = NO_POSITIVE
    target = torch.tensor(
        [[3, 5, none], [0, 0, 7], [none] * 3, [36, 20, 11], [4, none, 8], [9, 10, 2]]
    )
    candidates[[3, 0, 36, 4]] += query[[0, 1, 3, 4]]
    candidates[15] = candidates[16] = candidates[3].clone()
    candidates[9] = 0
    candidates[10] = torch.nan
    pairs = torch.tensor([[0, 16], [0, 1], [2, 8], [4, 30], [4, 30], [4, 31], [5, 6]])
    batch = Batch(target, pairs, torch.arange(_M) % 31)
    return query.to(dtype), candidates.to(dtype), batch


def dense_of(dtype: torch.dtype) -> _Arguments:
    """Rows in whole vectors, several tiles of scores, two positives a query."""
    query, candidates = _randn(15, 6, 1536), _randn(16, 144, 1536)
    target = torch.arange(12).view(6, 2) * 12
    candidates[target] += query.unsqueeze(1) * torch.tensor([0.4, 0.03]).view(1, 2, 1)
    return query.to(dtype), candidates.to(dtype), Batch(target)


def crowd_of(dtype: torch.dtype) -> _Arguments:
    """A batch without anything special, whose candidates are to be repeated."""
    query, candidates = _randn(7, _QUERIES, 16), _randn(8, _CROWD, 16)
    return query.to(dtype), candidates.to(dtype), Batch(torch.arange(_QUERIES).unsqueeze(1))


def _randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _on(device: torch.device, arguments: _Arguments) -> _Arguments:
    query, candidates, batch = arguments
    moved = Batch._make(x.to(device) if isinstance(x, Tensor) else x for x in batch)
    return query.to(device), candidates.to(device), moved


def _cases(dtype: torch.dtype, device: torch.device) -> list[_Case]:
    with torch.device("cpu"):  # whatever the default device is
        made = [(inputs_of(dtype), _M), (several_of(dtype), _M), (dense_of(dtype), 4)]
    return [
        _Case(_on(device, found), (found[0].double(), found[1].double(), found[2]), head)
        for found, head in made
    ]


def _temperature(device: torch.device) -> Tensor:
    return torch.tensor(TEMPERATURE, dtype=torch.float64, device=device)


def _check_statistics(found: Any, truth: Any) -> None:
    for name, actual, expected in zip(truth._fields, found, truth, strict=True):
        if expected is not None:
            check(name, actual, expected, torch.zeros_like(expected, dtype=torch.float64))


def _try_statistics(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    launch = launchers("rank_statistics")
    for case in _cases(dtype, device):
        k = 4 if soft else 0
        found = launch(*case.given, k=k, temperature=_temperature(device))
        truth = reference.rank_statistics(*case.exact, k=k, temperature=_temperature(_ON_CPU))
        _check_statistics(found, truth)
    if not soft:
        _try_crowd(launchers, dtype, device)


def _try_crowd(launchers: Launchers, dtype: torch.dtype, device: torch.device) -> None:
    """Every candidate many times over: counts grow by as much."""
    with torch.device("cpu"):
        query, candidates, batch = crowd_of(dtype)
    exact = (query.double(), candidates.double(), batch)
    truth = reference.rank_statistics(*exact, k=0, temperature=None)
    crowd = _on(device, (query, candidates.repeat(_COPIES, 1), batch))
    found = launchers("rank_statistics")(*crowd, k=0, temperature=None)
    greater, equal = _COPIES * truth.n_greater, _COPIES * (truth.n_equal + 1) - 1
    counts = (1 + greater + equal, greater, equal, truth.target_score)
    for name, actual, expected in zip(truth._fields, found, counts, strict=False):
        check(name, actual, expected, torch.zeros(expected.shape))


def _try_info_nce(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    launch = launchers("info_nce")
    for case in _cases(dtype, device):
        loss, *found = launch(Contrast(*case.given, _temperature(device), soft, 1))
        truth, statistics = reference.info_nce(*case.exact, _temperature(_ON_CPU), symmetric=soft)
        check("loss", loss, truth, truth.abs() * 1e-5)
        _check_statistics(found, statistics)


class _Alone(Exchange):
    """Of a group of one process."""

    def __init__(self, given: _Arguments) -> None:
        self.query = given[0]
        self.rows, self.columns = (slice(0, len(x)) for x in given[:2])

    def queries(self) -> Tensor:
        return self.query

    def of_rows(self, own: Tensor) -> Tensor:
        return own

    def of_columns(self, own: Tensor) -> Tensor:
        return own


def _try_info_nce_gradients(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    _try_gradients(launchers("info_nce_and_grad"), dtype, device, soft, lambda given: ())


def _try_info_nce_share(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    _try_gradients(launchers("info_nce_share"), dtype, device, soft, lambda given: (_Alone(given),))


def _try_gradients(
    launch: Launcher,
    dtype: torch.dtype,
    device: torch.device,
    symmetric: bool,
    further: Callable[[_Arguments], tuple[Exchange, ...]],
) -> None:
    """In the scores' dtype and in the inputs', and one without the other; and the values beside."""
    for case in _cases(dtype, device):
        contrast = Contrast(*case.given, _temperature(device), symmetric, 1)
        weight, more = case.weight.to(device), further(case.given)
        exact = (*case.exact, _temperature(_ON_CPU))
        loss, statistics = reference.info_nce(*exact, symmetric=symmetric)
        truth = reference.info_nce_gradients(*exact, case.weight, symmetric=symmetric)
        for rounded, wrt in _WANTED:
            found = launch(contrast, weight, wrt, rounded, *more)
            check("loss", found[0], loss, loss.abs() * 1e-5)
            _check_statistics(found[1:-3], statistics)
            _check_gradients(found[-3:], truth, case.exact, wrt)


def _try_reward(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    """The reward of a head and its gradient."""
    for case in _cases(dtype, device):
        _try_reward_of(case, launchers, device, 3 if soft else case.head)


def _try_reward_of(case: _Case, launchers: Launchers, device: torch.device, head: int) -> None:
    *values, index = launchers("in_batch_ranking_reward")(*case.given, head, WEIGHTS)
    found = reference.rank_statistics(*case.exact, k=head, temperature=None)
    scores = torch.cat([found.target_score, found.topk_scores], dim=1)
    truth = reference.reward_of_head(scores, found.rank, head, WEIGHTS)
    _check_statistics(values, truth)
    target = case.exact[2].target
    indices = torch.cat([target, found.topk_index], dim=1)
    check("index", index.int(), indices.int(), torch.zeros(index.shape))
    slopes = reference.head_slopes(scores, found.rank, head, case.weight, WEIGHTS)
    expected = reference.in_batch_gradients(*case.exact[:2], indices, slopes, target.shape[1])
    backward = launchers("in_batch_ranking_reward_backward")
    saved = (indices, scores.to(values[4].dtype), found.rank, case.weight.to(values[0].dtype))
    for _, wrt in _WANTED[1:]:
        gradients = backward(*case.given[:2], *(x.to(device) for x in saved), head, WEIGHTS, wrt)
        _check_gradients(gradients, expected, case.exact, wrt)


def _check_gradients(found: Any, truth: Any, exact: Any, wrt: tuple[bool, bool]) -> None:
    for name, actual, expected, rows, wanted in zip(
        ("grad_query", "grad_candidates"), found, truth, exact, wrt, strict=False
    ):
        if not wanted:
            if actual is not None:
                raise Wrong(f"{name} is there, and was not asked for")
            continue
        scale = rows.norm(dim=-1, keepdim=True).nan_to_num(posinf=0.0)
        rounding = torch.finfo(actual.dtype).eps * expected.abs() * scale
        if actual.dtype == torch.float16:  # subnormal gradients of huge rows
            rounding = rounding + 2.0**-25 * scale
        check(name, actual.cpu().double() * scale, expected * scale, rounding, actual.dtype)
    if len(found) > 2:
        allowed = 1e-4 * truth[2].abs()
        check("grad_temperature", found[2].float(), truth[2], allowed)


TRIALS: dict[str, Trial] = {
    "rank_statistics": _try_statistics,
    "in_batch_ranking_reward": _try_reward,
    "in_batch_ranking_reward_backward": _try_reward,
    "info_nce": _try_info_nce,
    "info_nce_and_grad": _try_info_nce_gradients,
    "info_nce_share": _try_info_nce_share,
}
