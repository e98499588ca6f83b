"""InfoNCE with a learnt temperature in Lightning, in bf16.

python -m elva.integrations.examples.lightning_module
"""

import sys

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from elva.integrations.examples.pairs import Pairs, TwoTowers, recall_at_1
from elva_kernels import InfoNCELoss

try:
    import lightning
except ModuleNotFoundError:
    sys.exit("lightning_module: it needs Lightning; pip install 'elva[lightning]'")


class Retriever(lightning.LightningModule):
    """Two towers, and a loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = TwoTowers()
        self.loss = InfoNCELoss(temperature=0.1, learnable_temperature=True, symmetric=True)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        query, candidates = self.towers(batch["query"], batch["candidates"])
        return self.loss(query, candidates, candidate_ids=batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    """Prints R@1 and the temperature before and after."""
    module = Retriever()
    trainer = lightning.Trainer(
        max_epochs=10, precision="bf16-mixed", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    for when in ("before", "after"):
        temperature = torch.as_tensor(module.loss.temperature).item()
        print(f"R@1 {when}: {recall_at_1(module.towers):.3f}, temperature {temperature:.4f}")
        if when == "before":
            trainer.fit(module, DataLoader(Pairs(400, seed=1), batch_size=200, shuffle=True))


if __name__ == "__main__":
    main()
