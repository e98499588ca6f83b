"""Rewards and their gradients captured into a CUDA graph, replayed on new embeddings.

python -m elva.integrations.examples.cuda_graph
"""

import sys
from collections.abc import Callable

import torch

from elva_kernels import ranking_reward_and_grad, warm_up


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A replay of `step`: the same kernels on the same memory, without Python in between."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main(device: str = "cuda", capture: Callable[..., Callable[[], None]] = captured) -> None:
    """Prints how far replays are from eager calls, and the reward before and after 50 of them."""
    if device == "cuda" and not torch.cuda.is_available():
        print("cuda_graph: it needs a GPU, and torch sees none", file=sys.stderr)
        sys.exit(2)
    warm_up(device)  # proves and compiles the kernels, which a capture cannot do
    torch.manual_seed(0)
    shapes = (64, 256), (64, 256), (64, 100, 256)  # query, positive, negatives
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    held: dict = {}

    def step() -> None:  # whose results have their place in memory, which each replay fills anew
        held["reward"], *held["gradients"] = ranking_reward_and_grad(*inputs)

    replay = capture(step)
    for number in range(3):
        for x in inputs:
            x.copy_(torch.randn(x.shape))  # new embeddings, where the old ones lay
        replay()
        eager, *gradients = ranking_reward_and_grad(*inputs)
        apart = (held["reward"].reward - eager.reward).abs().max().item()
        for x, y in zip(held["gradients"], gradients, strict=True):
            apart = max(apart, (x - y).abs().max().item())
        print(f"replay {number}: apart {apart:.1e}")
    print(f"reward before: {eager.reward.mean():.3f}")
    for _ in range(50):
        replay()
        for x, gradient in zip(inputs, held["gradients"], strict=True):
            x.add_(gradient, alpha=30.0)
    replay()
    print(f"reward after: {held['reward'].reward.mean():.3f}")


if __name__ == "__main__":
    main()
