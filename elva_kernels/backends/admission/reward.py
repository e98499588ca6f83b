"""What a backend must get right before "auto" uses it: the grouped reward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

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
from elva_kernels.backends.launcher import Groups, Tensors
from elva_kernels.reference import ALL, Wanted, Weights

# Copies of each group, groups, N, D. On a GPU 150 groups: more than it holds clusters for (66 of
# four blocks on an H100), so that each cluster takes several.
_DENSE = (50, 3, 100, 1536)
_DENSE_ON_CPU = (1, 3, 20, 64)
_FROZEN = (True, False, False)  # of a bank that is not trained


class _Case(NamedTuple):
    """Inputs on the device, each group `copies` times, and what must come of them once."""

    inputs: Groups
    upstream: Tensor
    weights: Weights
    copies: int
    truth: reference.RankingReward  # this and the rest in float64 on the CPU
    gradients: Tensors
    norms: Tensors  # of the rows that the gradients are of

    def once(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores on the CPU, mask and relevance on the device, of each group once."""
        mask, relevance = self.inputs.mask, self.inputs.relevance
        assert mask is not None
        return self.truth.scores.to(dtype), mask[0], None if relevance is None else relevance[0]


def _ragged(dtype: torch.dtype) -> Groups:
    """Ragged sizes, wide strides, a tie, a zero row, masked NaN, huge rows, a group with NaN."""
    generator = torch.Generator().manual_seed(1)
    query, positive, negatives = (_randn(generator, 4, *x) for x in ((77,), (77,), (9, 2 * 77)))
    positive += query
    negatives[..., ::2] += torch.linspace(-1, 1, 9).double()[:, None] * query[:, None]
    negatives[0, 2, ::2] = positive[0]
    negatives[1, 4] = 0
    negatives[2] *= 2.0 ** _far(dtype)
    mask = torch.rand(4, 9, generator=generator) < 0.8
    mask[0, 2] = mask[1, 4] = mask[3, 5] = True
    mask[1, 6] = mask[3, 8] = False
    negatives[~mask] = torch.nan
    negatives[3, 5, 8] = torch.nan
    return Groups(query, positive, negatives[..., ::2], mask)


def _dense(dtype: torch.dtype, groups: int, n: int, dim: int) -> Groups:
    """Rows in whole vectors at scores that lie apart, a zero row and one out of range."""
    generator = torch.Generator().manual_seed(2)
    query = _randn(generator, groups, dim)
    share = torch.linspace(-1, 1, n, dtype=torch.float64).roll(n // 3)
    candidates = _randn(generator, groups, n + 1, dim)
    own = query.unsqueeze(1)
    candidates -= (
        (candidates * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
    )
    candidates += torch.cat([share.new_tensor([0.505]), share]).view(1, -1, 1) * own
    positive, negatives = candidates[:, 0], candidates[:, 1:]
    negatives[1, 4] = 0
    negatives[1, 5] *= 2.0 ** _far(dtype)
    return Groups(query, positive, negatives.contiguous())


def _of_bank(inputs: Groups) -> Groups:
    """The same negatives as rows of a bank in another order: one is named by two groups, some by
    none, and the last group names one that does not exist."""
    groups, n = inputs.negatives.shape[:2]
    order = torch.randperm(groups * n, generator=torch.Generator().manual_seed(3))
    bank = inputs.negatives.flatten(0, 1)[order]
    index = order.argsort().view(groups, n).clone()
    if inputs.mask is not None:
        index[~inputs.mask] = -1
    index[:, n // 2] = -1
    index[0, 1] = index[1, 2]
    index[-1, 0] = -2
    return inputs._replace(negatives=bank, mask=None, negative_index=index)


def _graded(inputs: Groups) -> Groups:
    """With a relevance, NaN where it is not looked at; one in the first group is none. All
    are small but that of the least score, which leaves hinges open."""
    rows = inputs.negatives if inputs.negative_index is None else inputs.negative_index.unsqueeze(2)
    groups, n = rows.shape[:2]
    order = torch.randperm(groups * n, generator=torch.Generator().manual_seed(4))
    relevance = torch.linspace(0, 0.3, groups * n, dtype=torch.float64)[order].view(groups, n)
    relevance[:, n // 3] = 1
    live = torch.ones(groups, n, dtype=torch.bool) if inputs.mask is None else inputs.mask
    if inputs.negative_index is not None:
        live = inputs.negative_index != -1
    relevance[~live] = torch.nan
    relevance[0, live[0].nonzero()[0]] = 1.5
    return inputs._replace(relevance=relevance)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _far(dtype: torch.dtype) -> int:
    """The exponent of a row that is out of a kernel's range, if the dtype has any."""
    return 8 if dtype == torch.float16 else 70


def _cases(dtype: torch.dtype, device: torch.device, soft: bool) -> Iterator[_Case]:
    """A ragged one and a dense one, of negatives in their place and of a bank; two of these with a
    relevance too."""
    copies, *shape = _DENSE_ON_CPU if device.type == "cpu" else _DENSE
    for is_dense in (False, True):
        for of_bank in (False, True):
            for graded in (False, True)[: 1 + (is_dense == of_bank)]:
                with torch.device("cpu"):  # whatever the default device is
                    inputs = _dense(dtype, *shape) if is_dense else _ragged(dtype)
                    inputs = _of_bank(inputs) if of_bank else inputs
                    inputs = _graded(inputs) if graded else inputs
                    case = _case(inputs, copies if is_dense else None, dtype, device, soft)
                yield case


def _masked(dtype: torch.dtype, device: torch.device, soft: bool) -> Iterator[_Case]:
    """Those with a mask: one without a relevance and one with."""
    return (case for case in _cases(dtype, device, soft) if case.inputs.mask is not None)


def _exact(relevance: Tensor | None) -> Tensor | None:
    return None if relevance is None else relevance.cpu().double()


def _case(
    inputs: Groups, copies: int | None, dtype: torch.dtype, device: torch.device, soft: bool
) -> _Case:
    """None for `copies`: one, and negatives that are not dense."""
    query, positive, negatives = rows = [x.to(dtype) for x in inputs[:3]]
    exact = [x.double() for x in rows]
    mask, index, relevance = inputs.mask, inputs.negative_index, inputs.relevance
    values = reference.compute_dtype(dtype)
    upstream = torch.linspace(-1.5, 1, len(query)).to(values)
    relevance = None if relevance is None else relevance.to(values)
    weights = WEIGHTS._replace(rank_temperature=TEMPERATURE if soft else 0.0)
    truth, *gradients = reference.ranking_reward_and_grad(
        exact[0],
        exact[1],
        exact[2],
        mask,
        upstream.double(),
        weights,
        index,
        relevance=_exact(relevance),
    )
    negatives = negatives.to(device)
    if copies is None:
        negatives, copies = _spread(negatives), 1

    def repeated(x: Tensor) -> Tensor:
        return x.to(device).expand(copies, *x.shape)

    return _Case(
        Groups(
            repeated(query),
            repeated(positive),
            repeated(negatives) if index is None else negatives,
            None if mask is None else repeated(mask),
            None if index is None else repeated(index),
            None if relevance is None else repeated(relevance).contiguous(),
        ),
        repeated(upstream),
        weights,
        copies,
        truth,
        tuple(x for x in gradients if x is not None),
        tuple(x.norm(dim=-1, keepdim=True) for x in exact),
    )


def _spread(rows: Tensor) -> Tensor:
    """The same values with NaN between them."""
    return torch.stack([rows, torch.full_like(rows, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def _try_values(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    for case in _cases(dtype, device, soft):
        _check_values(launchers("ranking_reward")(case.inputs, case.weights), case)


def _try_autograd(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    """The forward that saves and the backward: neither means anything without the other."""
    for case in _cases(dtype, device, soft):
        *values, saved = launchers("ranking_reward_saved")(case.inputs, case.weights)
        _check_values(values, case)
        for wrt in (ALL, _FROZEN):
            backward = launchers("ranking_reward_backward")
            found = backward(case.inputs, saved, case.upstream, case.weights, wrt)
            _check_gradients(found, case, wrt)


def _try_value_and_grad(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    for case in _cases(dtype, device, soft):
        for wrt in (ALL, _FROZEN):
            launch = launchers("ranking_reward_and_grad")
            results = launch(case.inputs, case.upstream, case.weights, wrt)
            _check_values(results[:5], case)
            _check_gradients(results[5:], case, wrt)


def _try_scores(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    for case in _masked(dtype, device, soft):
        scores, mask, relevance = case.once(dtype)
        exact = (scores.double(), mask.cpu(), case.weights, _exact(relevance))
        truth = reference.reward_from_scores(*exact)
        given = (scores.to(device), mask, relevance, case.weights)
        found = launchers("reward_from_scores")(*given)
        for name, actual, expected in zip(truth._fields, found, truth, strict=True):
            check(name, actual, expected, torch.zeros_like(expected, dtype=torch.float64))


def _try_scores_backward(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    for case in _masked(dtype, device, soft):
        scores, mask, relevance = case.once(dtype)
        upstream = case.upstream[0]
        exact = (scores.double(), mask.cpu(), upstream.cpu().double(), case.weights)
        truth = reference.reward_from_scores_backward(*exact, _exact(relevance))
        launch = launchers("reward_from_scores_backward")
        (gradient,) = launch(scores.to(device), mask, relevance, upstream, case.weights)
        check("grad_scores", gradient, truth, torch.finfo(dtype).eps * truth.abs())


TRIALS: dict[str, Trial] = {
    "ranking_reward": _try_values,
    "ranking_reward_saved": _try_autograd,
    "ranking_reward_backward": _try_autograd,
    "ranking_reward_and_grad": _try_value_and_grad,
    "reward_from_scores": _try_scores,
    "reward_from_scores_backward": _try_scores_backward,
}


def _check_values(found: Iterable[Tensor], case: _Case) -> None:
    for name, actual, expected in zip(case.truth._fields, found, case.truth, strict=True):
        once = _once(name, actual)
        check(name, once, expected, torch.zeros_like(expected, dtype=torch.float64))


def _check_gradients(found: Iterable[Tensor | None], case: _Case, wrt: Wanted) -> None:
    names = ("grad_query", "grad_positive", "grad_negatives")
    for i, (name, actual, wanted) in enumerate(zip(names, found, wrt, strict=True)):
        if actual is None or not wanted:
            if (actual is None) == wanted:
                raise Wrong(f"{name} is missing" if wanted else f"{name} is not wanted")
            continue
        truth, scale = case.gradients[i], case.norms[i].nan_to_num()
        if i == 2 and case.inputs.negative_index is not None:  # a sum over all copies
            truth, scale = truth * case.copies, scale / case.copies
        else:
            actual = _once(name, actual)
        rounding = torch.finfo(actual.dtype).eps * truth.abs() * scale
        if actual.dtype == torch.float16:  # subnormal gradients of huge rows
            rounding = rounding + 2.0**-25 * scale
        check(name, actual.cpu().double() * scale, truth * scale, rounding, actual.dtype)


def _once(name: str, found: Tensor) -> Tensor:
    """The first of the copies; a group's bits are the same in each."""
    if not bool(((found == found[:1]) | (found.isnan() & found[:1].isnan())).all()):
        raise Wrong(f"{name} of a group is not the same in every copy of it")
    return found[0]
