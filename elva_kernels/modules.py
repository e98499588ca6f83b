"""The ops as `nn.Module`s."""

import torch
from torch import Tensor

from elva_kernels import checks
from elva_kernels.ops import ranking_reward


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
        checked = checks.weights(
            type(self).__name__,
            margin,
            rank_penalty,
            w_margin,
            w_rank,
            rank_temperature,
            backend,
            checks.WIDEST_COSINE,
        )
        self.margin, self.rank_penalty, self.w_margin, self.w_rank = checked[:4]
        self.rank_temperature, self.backend = checked[4:]

    def forward(
        self, query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The scalar loss of query [*, D], positive [*, D], negatives [*, N, D], mask [*, N]."""
        result = ranking_reward(
            query,
            positive,
            negatives,
            mask=mask,
            margin=self.margin,
            rank_penalty=self.rank_penalty,
            w_margin=self.w_margin,
            w_rank=self.w_rank,
            rank_temperature=self.rank_temperature,
            backend=self.backend,
        )
        return -result.reward.mean()

    def extra_repr(self) -> str:
        """The weights, as `print(module)` shows them."""
        return (
            f"margin={self.margin}, rank_penalty={self.rank_penalty}, w_margin={self.w_margin}, "
            f"w_rank={self.w_rank}, rank_temperature={self.rank_temperature}, "
            f"backend={self.backend!r}"
        )
