"""What a backend must get right before "auto" uses it: the in-batch ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elva_kernels import reference
from elva_kernels.backends.admission.trial import TEMPERATURE, WEIGHTS, Launchers, Trial, check
from elva_kernels.reference import Batch

_Arguments = tuple[Tensor, Tensor, Batch]

_B, _M, _D = 5, 37, 77


def inputs_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Batch]:
    """Ragged sizes, copies of a positive, ids, a limit, zero, huge, tiny and NaN rows."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, candidates = randn(_B, _D), randn(_M, _D)
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


def _on(device: torch.device, batch: Batch) -> Batch:
    ids = None if batch.candidate_ids is None else batch.candidate_ids.to(device)
    return batch._replace(target=batch.target.to(device), candidate_ids=ids)


def _case(dtype: torch.dtype, device: torch.device) -> tuple[_Arguments, _Arguments, Tensor]:
    """Arguments of a launcher on the device, the same for the truth, and the temperature."""
    with torch.device("cpu"):  # whatever the default device is
        query, candidates, batch = inputs_of(dtype)
        temperature = torch.tensor(TEMPERATURE, dtype=torch.float64)
    given = (query.to(device), candidates.to(device), _on(device, batch))
    return given, (query.double(), candidates.double(), batch), temperature


def _check_statistics(found: Any, truth: Any) -> None:
    for name, actual, expected in zip(truth._fields, found, truth, strict=True):
        if expected is not None:
            check(name, actual, expected, torch.zeros_like(expected, dtype=torch.float64))


def _try_statistics(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    given, exact, temperature = _case(dtype, device)
    k = 4 if soft else 0
    found = launchers("rank_statistics")(*given, k=k, temperature=temperature.to(device))
    _check_statistics(found, reference.rank_statistics(*exact, k=k, temperature=temperature))


def _try_info_nce(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    given, exact, temperature = _case(dtype, device)
    options = {"symmetric": soft, "workspace_mb": 1}
    loss, *found = launchers("info_nce")(*given, temperature.to(device), **options)
    truth, statistics = reference.info_nce(*exact, temperature, symmetric=soft)
    check("loss", loss, truth, truth.abs() * 1e-5)
    _check_statistics(found, statistics)


def _try_info_nce_gradients(
    launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool
) -> None:
    """In the scores' dtype and in the inputs'."""
    given, exact, temperature = _case(dtype, device)
    options = {"symmetric": soft, "workspace_mb": 1}
    weight = torch.full((_B,), 1 / _B, dtype=torch.float64)
    truth = reference.info_nce_gradients(*exact, temperature, weight, symmetric=soft)
    launch, inputs = launchers("info_nce_and_grad"), (*given, temperature.to(device))
    for rounded in (False, True):
        found = launch(*inputs, weight.to(device), wrt=(True, True), rounded=rounded, **options)
        _check_gradients(found[-3:], truth, exact)


def _try_reward(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    """The reward of a head and its gradient."""
    given, exact, _ = _case(dtype, device)
    head = 3 if soft else _M
    *values, index = launchers("in_batch_ranking_reward")(*given, head, WEIGHTS)
    found = reference.rank_statistics(*exact, k=head, temperature=None)
    scores = torch.cat([found.target_score, found.topk_scores], dim=1)
    truth = reference.reward_of_head(scores, found.rank, head, WEIGHTS)
    _check_statistics(values, truth)
    indices = torch.cat([exact[2].target, found.topk_index], dim=1)
    check("index", index.int(), indices.int(), torch.zeros(index.shape))
    upstream = torch.linspace(-1, 1, _B, dtype=torch.float64)
    slopes = reference.head_slopes(scores, found.rank, head, upstream, WEIGHTS)
    expected = reference.in_batch_gradients(exact[0], exact[1], indices, slopes, 1)
    backward = launchers("in_batch_ranking_reward_backward")
    gradients = backward(
        *given[:2],
        indices.to(device),
        scores.to(values[4].dtype).to(device),
        found.rank.to(device),
        upstream.to(values[0].dtype).to(device),
        head,
        WEIGHTS,
        (True, True),
    )
    _check_gradients(gradients, expected, exact)


def _check_gradients(found: Any, truth: Any, exact: Any) -> None:
    for name, actual, expected, rows in zip(
        ("grad_query", "grad_candidates"), found, truth, exact, strict=False
    ):
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
}
