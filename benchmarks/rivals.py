"""The grouped reward as one writes it in torch: what the op replaces."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = tuple[Tensor, ...]


def reward_of_scores(scores: Tensor, weights: dict[str, float]) -> Tensor:
    """Eq. 2 to 5 of elva_kernels/reference, by a sort."""
    positive, hardest = scores[:, 0], scores[:, 1:].amax(-1)
    order = scores.argsort(-1, descending=True)
    ranks = order.argsort(-1).to(scores.dtype) + 1
    log_rank = ranks.log()
    penalty = (scores[:, 1:] * (log_rank[:, 1:] - 1)).sum(-1)
    rank_reward = positive / (1 + log_rank[:, 0]) - weights["rank_penalty"] * penalty
    margin_reward = torch.relu(positive - hardest - weights["margin"])
    return weights["w_margin"] * margin_reward + weights["w_rank"] * rank_reward


def normalize_sort(
    query: Tensor, positive: Tensor, negatives: Tensor, weights: dict[str, float]
) -> Tensor:
    """Normalised rows in float32, products, a sort."""
    candidates = torch.cat([positive.unsqueeze(1), negatives], 1).float()
    scores = (
        F.normalize(query.float(), dim=-1).unsqueeze(1) * F.normalize(candidates, dim=-1)
    ).sum(-1)
    return reward_of_scores(scores, weights)


def bmm_norms(
    query: Tensor, positive: Tensor, negatives: Tensor, weights: dict[str, float]
) -> Tensor:
    """One batched matrix product in the inputs' dtype over the norms: faster, less exact."""
    candidates = torch.cat([positive.unsqueeze(1), negatives], 1)
    dots = torch.bmm(candidates, query.unsqueeze(-1)).squeeze(-1).float()
    norms = candidates.norm(dim=-1).float() * query.norm(dim=-1, keepdim=True).float()
    return reward_of_scores(dots / norms, weights)


FORMS = {"torch eager, normalize + sort": normalize_sort, "torch eager, bmm + norms": bmm_norms}


def value_and_grad(
    form: Callable[..., Tensor], weights: dict[str, float]
) -> Callable[..., Gradients]:
    """(query, positive, negatives) -> the three gradients of the summed reward, by autograd."""

    def run(*inputs: Tensor) -> Gradients:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(form(*leaves, weights).sum(), leaves)

    return run


def compiled(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`form` under torch.compile with static shapes, compiled anew for each shape."""
    torch._dynamo.reset()
    return torch.compile(form, dynamic=False)
