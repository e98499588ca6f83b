"""The ops as `nn.Module`s."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elva_kernels import checks
from elva_kernels.info_nce import info_nce
from elva_kernels.reference import Weights
from elva_kernels.reward import ranking_reward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RankingRewardLoss(torch.nn.Module):
    """Minus the mean `ranking_reward`: a loss for the embeddings of a query and its candidates.

    Args:
        margin, rank_penalty, w_margin, w_rank, rank_temperature, backend: as in `ranking_reward`.

    A NaN or inf row makes the mean NaN; pass its group's reward through `ranking_reward` where one
    bad group must not stop a step. The mean over no group is NaN, as in torch's own losses.
    """

    def __init__(
        self,
        *,
        margin: float = 0.1,
        rank_penalty: float = 0.01,
        w_margin: float = 0.4,
        w_rank: float = 0.6,
        rank_temperature: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.backend = checks.known_backend(op, backend)
        weights = Weights(margin, rank_penalty, w_margin, w_rank, rank_temperature)
        weights = checks.weights(op, weights, checks.WIDEST_COSINE)
        self.margin, self.rank_penalty, self.w_margin, self.w_rank, self.rank_temperature = weights

    @property
    def _weights(self) -> Weights:
        """The scalars that `ranking_reward` is called with."""
        return Weights(*(getattr(self, name) for name in Weights._fields))

    def forward(
        self,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor,
        mask: Tensor | None = None,
        negative_index: Tensor | None = None,
        relevance: Tensor | None = None,
    ) -> Tensor:
        """The scalar loss of query [*, D], positive [*, D], negatives [*, N, D], mask [*, N].

        With negative_index [*, N] negatives are a bank [M, D]; relevance [*, N], each in [0, 1],
        says how relevant a negative is itself, as in `ranking_reward`.
        """
        result = ranking_reward(
            query,
            positive,
            negatives,
            negative_index=negative_index,
            mask=mask,
            relevance=relevance,
            **self._weights._asdict(),
            backend=self.backend,
        )
        return -result.reward.mean()

    def extra_repr(self) -> str:
        """The weights, as `print(module)` shows them."""
        weights = ", ".join(f"{name}={value}" for name, value in self._weights._asdict().items())
        return f"{weights}, backend={self.backend!r}"


class InfoNCELoss(torch.nn.Module):
    """`info_nce` as a module.

    Args:
        temperature: at least 1e-6; the initial one where it is learnt.
        learnable_temperature: learn it, as the parameter `log_temperature`, whose exponential is
            used: no step makes it negative.
        symmetric, max_score, reduction, workspace_mb, backend: as in `info_nce`.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        symmetric: bool = False,
        max_score: float | None = None,
        reduction: str = "mean",
        workspace_mb: int = 256,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        checks.known_backend(op, backend)
        checks.reduction(op, reduction)
        self._temperature = checks.temperature_number(op, temperature)
        self.max_score = checks.max_score(op, max_score)
        self.workspace_mb = checks.count(op, "workspace_mb", workspace_mb, 1)
        self.symmetric = checks.flag(op, "symmetric", symmetric)
        self.reduction, self.backend = reduction, backend
        self.log_temperature = None
        if checks.flag(op, "learnable_temperature", learnable_temperature):
            self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(self._temperature)))

    @property
    def temperature(self) -> float | Tensor:
        """What `info_nce` is called with."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self,
        query: Tensor,
        candidates: Tensor,
        target: Tensor | None = None,
        candidate_ids: Tensor | None = None,
        excluded: Tensor | None = None,
        *,
        group: ProcessGroup | None = None,
        global_target: bool = False,
    ) -> Tensor:
        """The loss of query [B, D], candidates [M, D] and who is no negative, as in `info_nce`."""
        return info_nce(
            query,
            candidates,
            target,
            temperature=self.temperature,
            symmetric=self.symmetric,
            excluded=excluded,
            candidate_ids=candidate_ids,
            group=group,
            global_target=global_target,
            max_score=self.max_score,
            reduction=self.reduction,
            workspace_mb=self.workspace_mb,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The arguments, as `print(module)` shows them."""
        learnt = "" if self.log_temperature is None else " (learnt)"
        temperature = self._temperature
        if self.log_temperature is not None and not self.log_temperature.is_meta:
            temperature = self.log_temperature.detach().exp().item()
        return (
            f"temperature={temperature:.6g}{learnt}, symmetric={self.symmetric}, "
            f"max_score={self.max_score}, reduction={self.reduction!r}, "
            f"workspace_mb={self.workspace_mb}, backend={self.backend!r}"
        )
