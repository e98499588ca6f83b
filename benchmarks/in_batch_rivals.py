"""The in-batch ops as others write them, on cosines, with a temperature of `TEMPERATURE`.

A loss takes queries and candidates [B, D] of which equal rows belong together, and gives a number.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.05
CHUNK = 1024  # queries at a time, where a library wants to be told
Loss = Callable[[Tensor, Tensor], Tensor]
Gradients = tuple[Tensor, ...]


def _wide(scores: Tensor) -> Tensor:
    """In float32, or in float64 where they are."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _cosines(query: Tensor, candidates: Tensor) -> Tensor:
    """In the inputs' dtype."""
    return F.normalize(query, dim=-1) @ F.normalize(candidates, dim=-1).T


def _unit_pair(query: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows, the queries over the temperature, and each query's own class."""
    rows, weight = (F.normalize(x, dim=-1) for x in (query, candidates))
    return rows / TEMPERATURE, weight, torch.arange(len(query), device=query.device)


def eager_loss(query: Tensor, candidates: Tensor) -> Tensor:
    """Scores in the inputs' dtype, the rest in float32."""
    logits = _wide(_cosines(query, candidates)) / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def exact_loss(query: Tensor, candidates: Tensor) -> Tensor:
    """All of it in float32."""
    return eager_loss(query.float(), candidates.float())


def linear_loss(query: Tensor, candidates: Tensor) -> Tensor:
    """torch's own fusion of a product and a cross entropy."""
    return F.linear_cross_entropy(*_unit_pair(query, candidates))


def compiled(loss: Loss) -> Loss:
    """`loss` under torch.compile with static shapes, compiled anew for each shape."""
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def loss_and_grads(loss: Loss) -> Callable[[tuple[Tensor, Tensor]], Gradients]:
    """A pair -> the loss, then its gradients."""

    def run(pair: tuple[Tensor, Tensor]) -> Gradients:
        leaves = [x.detach().requires_grad_() for x in pair]
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


@functools.cache
def _sentence_transformers_loss() -> Callable[..., Tensor]:
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = torch.nn.Sequential(torch.nn.Identity())  # the embeddings are given
    loss = CachedMultipleNegativesRankingLoss(model, 1 / TEMPERATURE, mini_batch_size=CHUNK)
    return loss.calculate_loss


def sentence_transformers(pair: tuple[Tensor, Tensor]) -> Gradients:
    """CachedMultipleNegativesRankingLoss, from the embeddings on, as its trainer calls it."""
    query, candidates = (x.detach().requires_grad_() for x in pair)
    loss = _sentence_transformers_loss()([[query], [candidates]], with_backward=True)
    return loss, query.grad, candidates.grad


def inf_cl_loss(query: Tensor, candidates: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    rows, weight = (F.normalize(x, dim=-1) for x in (query, candidates))
    scale = torch.tensor(1 / TEMPERATURE, device=query.device)
    return cal_flash_loss(rows, weight, scale=scale).mean()


def liger_loss(query: Tensor, candidates: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    rows, weight, own = _unit_pair(query, candidates)
    return LigerFusedLinearCrossEntropyLoss()(weight, rows, own)


def cut_cross_entropy_loss(query: Tensor, candidates: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(*_unit_pair(query, candidates))


def quack_loss(query: Tensor, candidates: Tensor) -> Tensor:
    """Its cross entropy alone: the product is torch's, its scores in the inputs' dtype."""
    from quack.cross_entropy import cross_entropy

    rows, weight, own = _unit_pair(query, candidates)
    return cross_entropy(rows @ weight.T, own, reduction="mean")


# Their kernels need a GPU: the name of the package, of its module, the loss.
ON_A_GPU: dict[str, tuple[str, Loss]] = {
    "liger-kernel": ("liger_kernel", liger_loss),
    "cut-cross-entropy": ("cut_cross_entropy", cut_cross_entropy_loss),
    "inf-cl": ("inf_cl", inf_cl_loss),
    "quack-kernels": ("quack", quack_loss),
}


def gpu_losses() -> dict[str, Loss]:
    """Of the rivals that need a GPU, those that can run here."""
    if not torch.cuda.is_available():
        return {}
    return {
        name: loss
        for name, (module, loss) in ON_A_GPU.items()
        if importlib.util.find_spec(module) is not None
    }


def absent() -> dict[str, str]:
    """The rivals that cannot run here, and why."""
    reasons = {}
    if importlib.util.find_spec("sentence_transformers") is None:
        reasons["sentence-transformers"] = "not installed; pip install 'elva[rivals]'"
    if not hasattr(F, "linear_cross_entropy"):
        reasons["torch linear_cross_entropy"] = f"torch {torch.__version__} has none"
    missing = "not installed" if torch.cuda.is_available() else "its kernels need a GPU"
    return reasons | dict.fromkeys(ON_A_GPU.keys() - gpu_losses().keys(), missing)


def statistics(query: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Ranks and target scores; also the k hardest."""
    scores = _cosines(query, candidates)
    target = scores.diagonal().unsqueeze(1)
    rank = (scores >= target).sum(1)
    scores.topk(k + 1)
    return torch.stack([rank, target.squeeze(1)])


def reward_loss(query: Tensor, candidates: Tensor, weights: dict[str, float], head: int) -> Tensor:
    """-mean of eq. 12 with its margin (elva_kernels/reference), over the whole batch."""
    scores = _wide(_cosines(query, candidates))
    target = scores.diagonal().unsqueeze(1)
    rank = (scores >= target).sum(1)  # itself included
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    negatives = scores.masked_fill(itself, -torch.inf).topk(min(head, len(scores) - 1)).values
    places = torch.arange(1, negatives.shape[1] + 1, device=scores.device)
    ranks = places + (target > negatives).detach()
    weight = torch.where(ranks <= head, ranks.to(scores.dtype).log() - 1, 0.0)
    contrast = target.squeeze(1) / (1 + rank.to(scores.dtype).log())
    rank_reward = contrast - weights["rank_penalty"] * (negatives * weight).sum(1)
    margin_reward = torch.relu(target - negatives[:, :1] - weights["margin"]).squeeze(1)
    return -(weights["w_margin"] * margin_reward + weights["w_rank"] * rank_reward).mean()
