"""InfoNCE and the ranking reward inside torch.compile: one graph, forward and backward.

python -m elva.integrations.examples.compiled
"""

import torch
from torch import Tensor

from elva.integrations.examples.pairs import Pairs, TwoTowers, recall_at_1
from elva_kernels import info_nce, ranking_reward


def loss_of(query: Tensor, candidates: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE, less a tenth of the reward among the 50 candidates that come next in the batch."""
    loss = info_nce(query, candidates, candidate_ids=labels)
    index = (torch.arange(len(query))[:, None] + torch.arange(1, 51)) % len(query)
    different = labels[index] != labels[:, None]
    found = ranking_reward(query, candidates, candidates, negative_index=index, mask=different)
    return loss - 0.1 * found.reward.mean()


def main() -> None:
    """Prints graph breaks, how far compiled and eager losses and gradients differ, and R@1."""
    things, model = Pairs(400, seed=1), TwoTowers()
    batch = things[:200]
    rows = [x.detach().requires_grad_() for x in model(batch["query"], batch["candidates"])]
    found = torch._dynamo.explain(loss_of)(*rows, batch["labels"])
    print(f"graphs: {found.graph_count}, graph breaks: {found.graph_break_count}")
    compiled = torch.compile(loss_of, fullgraph=True)  # raises at a graph break
    losses = [f(rows[0], rows[1], batch["labels"]) for f in (loss_of, compiled)]
    gradients = [torch.cat(torch.autograd.grad(loss, rows)) for loss in losses]
    apart = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    print(f"apart: loss {(losses[0] - losses[1]).abs():.1e}, gradients, relatively {apart:.1e}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    print(f"R@1 before: {recall_at_1(model):.3f}")
    for _ in range(10):
        for order in torch.randperm(len(things)).split(200):
            batch = things[order]
            query, candidates = model(batch["query"], batch["candidates"])
            compiled(query, candidates, batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"R@1 after: {recall_at_1(model):.3f}")


if __name__ == "__main__":
    main()
