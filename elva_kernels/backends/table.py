"""Which backend computes which op: every launcher, where it is called from.

A new backend is a line in `BACKENDS` and one in each row of `LAUNCHERS` that it computes;
`launcher` says what a launcher of each op takes and gives.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from elva_kernels.backends import cpu, cuda, in_batch, reference, shares, triton
from elva_kernels.backends.cpu import codes as cpu_codes
from elva_kernels.backends.cpu import reward as cpu_reward
from elva_kernels.backends.cpu import topk as cpu_topk
from elva_kernels.backends.cpu.in_batch import CpuSteps
from elva_kernels.backends.cuda import codes as cuda_codes
from elva_kernels.backends.cuda import reward as cuda_reward
from elva_kernels.backends.cuda import topk as cuda_topk
from elva_kernels.backends.cuda.in_batch import CudaSteps
from elva_kernels.backends.launcher import Launcher
from elva_kernels.backends.triton import codes as triton_codes
from elva_kernels.backends.triton import reward as triton_reward
from elva_kernels.backends.triton import topk as triton_topk
from elva_kernels.backends.triton.in_batch import TritonSteps


class Backend(NamedTuple):
    """What a backend needs, asked before it is chosen."""

    device_type: str | None  # None: every device
    unavailable_reason: Callable[[], str | None]
    # What a self-test's verdict on it holds for; None: trusted without one.
    version: Callable[[], str] | None = None
    by_name_only: bool = False  # never chosen by "auto"
    dtypes: tuple[torch.dtype, ...] | None = None  # None: all


# In the order in which "auto" prefers them.
BACKENDS: dict[str, Backend] = {
    "cpu": Backend("cpu", cpu.unavailable_reason),
    "cuda": Backend("cuda", cuda.unavailable_reason, cuda.version, dtypes=cuda.DTYPES),
    "triton": Backend(
        triton.DEVICE_TYPE, triton.unavailable_reason, triton.version, triton.INTERPRETED
    ),
    "reference": Backend(None, lambda: None),
}

# op -> backend -> launcher.
LAUNCHERS: dict[str, dict[str, Launcher]] = {
    "ranking_reward": {
        "cpu": cpu_reward.ranking_reward,
        "cuda": cuda_reward.ranking_reward,
        "triton": triton_reward.ranking_reward,
        "reference": reference.ranking_reward,
    },
    "ranking_reward_saved": {
        "cpu": cpu_reward.ranking_reward_saved,
        "cuda": cuda_reward.ranking_reward_saved,
        "triton": triton_reward.ranking_reward_saved,
        "reference": reference.ranking_reward_saved,
    },
    "ranking_reward_backward": {
        "cpu": cpu_reward.ranking_reward_backward,
        "cuda": cuda_reward.ranking_reward_backward,
        "triton": triton_reward.ranking_reward_backward,
        "reference": reference.ranking_reward_backward,
    },
    "ranking_reward_and_grad": {
        "cpu": cpu_reward.ranking_reward_and_grad,
        "cuda": cuda_reward.ranking_reward_and_grad,
        "triton": triton_reward.ranking_reward_and_grad,
        "reference": reference.ranking_reward_and_grad,
    },
    "reward_from_scores": {
        "cpu": cpu_reward.reward_from_scores,
        "triton": triton_reward.reward_from_scores,
        "reference": reference.reward_from_scores,
    },
    "reward_from_scores_backward": {
        "cpu": cpu_reward.reward_from_scores_backward,
        "triton": triton_reward.reward_from_scores_backward,
        "reference": reference.reward_from_scores_backward,
    },
    "topk": {
        "cpu": cpu_topk.topk,
        "cuda": cuda_topk.topk,
        "triton": triton_topk.topk,
        "reference": reference.topk,
    },
    "row_codes": {
        "cpu": cpu_codes.row_codes,
        "cuda": reference.row_codes,
        "triton": reference.row_codes,
        "reference": reference.row_codes,
    },
    "nearest_codes": {
        "cpu": cpu_codes.nearest_codes,
        "cuda": cuda_codes.nearest_codes,
        "triton": triton_codes.nearest_codes,
        "reference": reference.nearest_codes,
    },
    "group_advantages": {
        "cpu": cpu_reward.group_advantages,
        "reference": reference.group_advantages,
    },
    "rank_statistics": {
        "cpu": partial(in_batch.rank_statistics, CpuSteps),
        "cuda": partial(in_batch.rank_statistics, CudaSteps),
        "triton": partial(in_batch.rank_statistics, TritonSteps),
        "reference": reference.rank_statistics,
    },
    "in_batch_ranking_reward": {
        "cpu": partial(in_batch.in_batch_ranking_reward, CpuSteps),
        "cuda": partial(in_batch.in_batch_ranking_reward, CudaSteps),
        "triton": partial(in_batch.in_batch_ranking_reward, TritonSteps),
        "reference": reference.in_batch_ranking_reward,
    },
    "in_batch_ranking_reward_backward": {
        "cpu": partial(in_batch.in_batch_ranking_reward_backward, CpuSteps),
        "cuda": partial(in_batch.in_batch_ranking_reward_backward, CudaSteps),
        "triton": partial(in_batch.in_batch_ranking_reward_backward, TritonSteps),
        "reference": reference.in_batch_ranking_reward_backward,
    },
    "info_nce": {
        "cpu": partial(in_batch.info_nce, CpuSteps),
        "cuda": partial(in_batch.info_nce, CudaSteps),
        "triton": partial(in_batch.info_nce, TritonSteps),
        "reference": reference.info_nce,
    },
    "info_nce_share": {
        "cpu": partial(shares.info_nce_share, CpuSteps),
        "cuda": partial(shares.info_nce_share, CudaSteps),
        "triton": partial(shares.info_nce_share, TritonSteps),
        "reference": reference.info_nce_share,
    },
    "info_nce_and_grad": {
        "cpu": partial(in_batch.info_nce_and_grad, CpuSteps),
        "cuda": partial(in_batch.info_nce_and_grad, CudaSteps),
        "triton": partial(in_batch.info_nce_and_grad, TritonSteps),
        "reference": reference.info_nce_and_grad,
    },
}
