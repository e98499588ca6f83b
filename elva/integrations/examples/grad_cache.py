"""GradCache: InfoNCE over a large batch, of which a graph is held for one chunk at a time.

python -m elva.integrations.examples.grad_cache
"""

import torch
from torch import Tensor

from elva.integrations.examples.pairs import Pairs, TwoTowers, recall_at_1
from elva_kernels import info_nce, info_nce_and_grad

CHUNK = 100


def backward(model: TwoTowers, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch, whose gradients on the model's weights are added up in `.grad`."""
    chunks = [{k: x[i : i + CHUNK] for k, x in batch.items()} for i in range(0, 1200, CHUNK)]
    with torch.no_grad():  # embed all of it without a graph
        rows = [model(x["query"], x["candidates"]) for x in chunks]
    query, candidates = map(torch.cat, zip(*rows, strict=True))
    loss, *gradients = info_nce_and_grad(query, candidates, candidate_ids=batch["labels"])
    of_query, of_candidates = (x.split(CHUNK) for x in gradients[:2])
    for chunk, *upstream in zip(chunks, of_query, of_candidates, strict=True):
        torch.autograd.backward(model(chunk["query"], chunk["candidates"]), upstream)
    return loss


def main() -> None:
    """Prints how far the gradients are from one graph's, and R@1 before and after."""
    batch = Pairs(400, seed=1)[:]
    model = TwoTowers()
    loss = info_nce(*model(batch["query"], batch["candidates"]), candidate_ids=batch["labels"])
    at_once = torch.autograd.grad(loss, list(model.parameters()))
    cached = backward(model, batch)
    pairs = zip(model.parameters(), at_once, strict=True)
    apart = max(((p.grad - x).norm() / x.norm()).item() for p, x in pairs)
    print(f"apart: loss {(loss - cached).abs():.1e}, gradients, relatively {apart:.1e}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    print(f"R@1 before: {recall_at_1(model):.3f}")
    for _ in range(30):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    print(f"R@1 after: {recall_at_1(model):.3f}")


if __name__ == "__main__":
    main()
