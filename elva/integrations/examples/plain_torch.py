"""InfoNCE, then the ranking reward, in a loop of plain torch.

python -m elva.integrations.examples.plain_torch
"""

import torch
from torch.utils.data import DataLoader

from elva.integrations.examples.pairs import Pairs, TwoTowers, recall_at_1
from elva_kernels import in_batch_ranking_reward, info_nce


def main() -> None:
    """Prints R@1 before, after InfoNCE, and after the reward."""
    model = TwoTowers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = DataLoader(Pairs(400, seed=1), batch_size=200, shuffle=True, drop_last=True)
    print(f"R@1 before: {recall_at_1(model):.3f}")
    for epoch in range(15):
        for batch in batches:
            query, candidates = model(batch["query"], batch["candidates"])
            ids = batch["labels"]  # a copy of a positive is no negative
            if epoch < 10:
                loss = info_nce(query, candidates, candidate_ids=ids, symmetric=True)
            else:
                found = in_batch_ranking_reward(query, candidates, candidate_ids=ids)
                loss = -found.reward.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch == 9:
            print(f"R@1 after InfoNCE: {recall_at_1(model):.3f}")
    print(f"R@1 after the ranking reward: {recall_at_1(model):.3f}")


if __name__ == "__main__":
    main()
