"""InfoNCE over the candidates of all processes, in a loop of Accelerate.

accelerate launch --num_processes 2 --cpu -m elva.integrations.examples.accelerate_loop

The losses that it prints are those of one process with the same batches.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader

from elva.integrations.examples.pairs import Pairs, TwoTowers, recall_at_1
from elva_kernels import info_nce


def main() -> None:
    """Prints R@1 before and after, and each epoch's last loss."""
    # Batches of 200 are split: 100 pairs a process, 200 candidates for each query.
    accelerator = Accelerator(split_batches=True)
    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    model = TwoTowers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = DataLoader(Pairs(400, seed=1), batch_size=200, shuffle=True, drop_last=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    accelerator.print(f"R@1 before: {recall_at_1(accelerator.unwrap_model(model)):.3f}")
    for _ in range(10):
        for batch in batches:
            query, candidates = model(batch["query"], batch["candidates"])
            loss = info_nce(query, candidates, candidate_ids=batch["labels"], group=group)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        # Scaled so that the mean over processes is the loss of the whole batch, and that DDP's mean
        # of gradients is its gradient.
        accelerator.print(f"loss: {accelerator.reduce(loss.detach(), 'mean').item():.5f}")
    accelerator.print(f"R@1 after: {recall_at_1(accelerator.unwrap_model(model)):.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
