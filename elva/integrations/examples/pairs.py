"""What the examples train on and with: two views of the same things, and a tower for each."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import elva_kernels


class Pairs(Dataset):
    """Query and candidate [64], two noisy views of one thing, and the thing's number as `labels`.

    Three copies of each thing: `labels` say which candidates of a batch are no negatives.
    """

    def __init__(self, things: int, seed: int, copies: int = 3) -> None:
        views = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
        drawn = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(things).repeat(copies)
        latent = torch.randn(things, 16, generator=drawn)[self.labels]
        noise = torch.randn(2, things * copies, 64, generator=drawn)
        self.query, self.candidates = (latent @ views).tanh() + 0.3 * noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Tensor) -> dict[str, Tensor]:
        names = ("query", "candidates", "labels")
        return {name: getattr(self, name)[index] for name in names}


class TwoTowers(nn.Module):
    """Embeddings [B, 32] of queries [B, 64] and of candidates [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.of_query, self.of_candidates = (
            nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(2)
        )

    def forward(self, query: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_query(query), self.of_candidates(candidates)


@torch.no_grad()
def recall_at_1(model: nn.Module) -> float:
    """Share of 500 unseen queries whose own candidate comes first of all."""
    unseen = Pairs(500, seed=2, copies=1)
    device = next(model.parameters()).device
    query, candidates = model(unseen.query.to(device), unseen.candidates.to(device))
    return (elva_kernels.rank_statistics(query, candidates).rank == 1).float().mean().item()
