"""The losses of a step on its embeddings: InfoNCE and the ranking reward, by elva_kernels.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.2 (InfoNCE) and 3.4 (rewards).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import elva_kernels
from elva.processes import Processes
from elva.recipe import StageConfig
from elva.training.comparison import SOURCES, Comparison
from elva.training.relevance import Relevance


@dataclass(frozen=True)
class Embedded:
    """A step's embeddings, and where those of each candidate stand.

    Args:
        query: [B, G, D].
        table: [T, D]: candidates' rollouts, then rows of the bank.
        columns: [M, G] rows of `table`: each candidate under each rollout; of the bank always one.
    """

    query: Tensor
    table: Tensor
    columns: Tensor

    @property
    def groups(self) -> int:
        return self.query.shape[1]


@dataclass(frozen=True)
class Shares:
    """What of a step is this process's.

    Args:
        asks: of its queries.
        shows: of the candidates that are rolled out; what is not is the last process's.
    """

    processes: Processes
    asks: range
    shows: range

    def queries(self, groups: int) -> slice:
        """Rows of the queries' rollouts."""
        return slice(self.asks.start * groups, self.asks.stop * groups)

    def table(self, groups: int, rows: int) -> slice:
        """Rows of a table of so many."""
        last = self.processes.index == self.processes.count - 1
        return slice(self.shows.start * groups, rows if last else self.shows.stop * groups)


def info_nce(
    stage: StageConfig, comparison: Comparison, embedded: Embedded, temperature: float | Tensor,
    shares: Shares | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """InfoNCE of every rollout of a query against every rollout of its candidates, and its metrics.

    A right answer's G rollouts are G positives of each of the query's. Of several processes the
    loss is this one's share times their number, on its rows alone; metrics are the whole step's.

    Args:
        shares: what is this process's; None: all.
    """
    query, columns, groups = embedded.query.flatten(0, 1), embedded.columns, embedded.groups
    target, excluded = _pairs(comparison, columns, groups)
    if shares is None:
        shares = Shares(Processes(), range(len(embedded.query)), range(comparison.rolled))
    own, processes = shares.queries(groups), shares.processes
    mine = (excluded[:, 0] >= own.start) & (excluded[:, 0] < own.stop)
    loss, statistics = elva_kernels.info_nce(
        query[own], embedded.table[shares.table(groups, len(embedded.table))], target[own],
        temperature=temperature, symmetric=stage.symmetric,
        excluded=excluded[mine] - excluded.new_tensor([own.start, 0]),
        group=processes.group, global_target=processes.count > 1, return_statistics=True,
    )  # fmt: skip
    shared = processes.total({"infonce": loss.item()})
    metrics = {"infonce": shared["infonce"] / processes.count}
    if not bool((comparison.negatives >= 0).any()):
        return loss, metrics

    def whole(own: Tensor) -> Tensor:
        """Of all queries' rollouts."""
        return processes.gather(own.unflatten(0, (-1, groups)), len(query) // groups).flatten(0, 1)

    t = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
    best = columns.new_tensor(comparison.target[:, 0])
    again = columns[:, 1:].masked_fill(columns[:, 1:] == columns[:, :1], -1)  # a bank's row: one
    once = torch.cat([columns[:, :1], again], 1)
    every = _index(comparison, once).flatten(1)[:, None]  # each under every rollout
    every = every.expand(-1, groups, -1)
    scores = elva_kernels.ranking_reward(
        embedded.query.detach(), embedded.table.detach()[columns[best]], embedded.table.detach(),
        negative_index=every,
    ).scores  # fmt: skip
    logsumexp = whole(statistics.logsumexp)[:, None]
    right = (whole(statistics.target_score) / t - logsumexp).exp().sum(1)
    mass = (scores[..., 1:] / t - logsumexp.unflatten(0, (-1, groups))).exp()
    total = (1 - right).clamp(min=0)  # what the softmax gives all negatives
    sources = _sources(comparison, columns).repeat(1, groups)[:, None].expand_as(mass)
    sources = sources.where(sources != SOURCES.index("in_batch"), -1)  # the rest of its softmax
    found = dict(_by_source("infonce", scores, mass, sources, total))
    own_shares = sum(value for name, value in found.items() if name.startswith("infonce_share"))
    return loss, {**metrics, **found, "infonce_share_in_batch": max(0.0, 1.0 - own_shares)}


class Rewards(NamedTuple):
    """A step's rewards, by whose summaries they are the reward of.

    Attributes:
        query: [B, G], of the query's rollouts.
        shown: [B, G], of its candidates'; the same where rollouts meet those of their own number.
    """

    query: Tensor
    shown: Tensor


def reward(
    stage: StageConfig, comparison: Comparison, embedded: Embedded,
    relevance: Relevance | None = None,
) -> tuple[Rewards, dict[str, float]]:  # fmt: skip
    """The rewards of every rollout, means over a query's right answers, and metrics.

    A query's rollout meets its candidates' rollouts of the same number (paper, sec. 3.4) or, where
    `stage.pairings` is all, those of every number, and its reward is the mean over them.
    """
    columns = embedded.columns
    scalars: dict[str, Any] = asdict(stage.reward)  # RewardConfig names the op's arguments
    target = columns.new_tensor(comparison.target)
    asks, answers = (target >= 0).nonzero(as_tuple=True)  # one group each: a query, an answer
    query = embedded.query[asks]  # [A, G, D]
    positive = embedded.table[columns[target[asks, answers]]]
    index = _index(comparison, columns)[asks]
    graded = None if relevance is None else relevance(comparison, asks, answers)[:, None]
    if stage.pairings == "all":  # [A, G of the query, G of its candidates, ...]
        groups = embedded.groups
        query = query[:, :, None].expand(-1, -1, groups, -1)
        positive, index = (x[:, None].expand(-1, groups, -1, -1) for x in (positive, index))
        graded = None if graded is None else graded[:, None]
    graded = None if graded is None else graded.expand(index.shape)
    out = elva_kernels.ranking_reward(
        query, positive, embedded.table, negative_index=index, relevance=graded, **scalars
    )
    # A place for each answer and a sum in order: no atomics.
    each = out.reward.new_zeros(*target.shape, *out.reward.shape[1:])
    each = each.index_put((asks, answers), out.reward)
    counts = (target >= 0).sum(1).view(-1, *[1] * (out.reward.dim() - 1))
    means = each.sum(1) / counts
    found = Rewards(means, means) if means.dim() == 2 else Rewards(means.mean(2), means.mean(1))
    scores = out.scores.detach().requires_grad_()
    live = scores.isfinite()[..., 1:]
    paid = elva_kernels.reward_from_scores(scores, mask=live, relevance=graded, **scalars)
    paid.reward.sum().backward()
    assert scores.grad is not None
    pull = scores.grad[..., 1:].abs()
    sources = _sources(comparison, columns)[asks]
    sources = sources.view(len(asks), *[1] * (pull.dim() - 2), -1).expand_as(pull)
    metrics = _reward_metrics(found.query.detach(), out)
    metrics.update(_by_source("reward", out.scores, pull, sources, pull.sum(-1)))
    return found, metrics


def _pairs(comparison: Comparison, columns: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Targets [B * G, P * G] and excluded pairs [E * G * G, 2] of rollouts, from those of items."""
    target = columns.new_tensor(comparison.target)
    found = torch.where(target[..., None] >= 0, columns[target], -1).flatten(1)  # [B, P * G]
    excluded = columns.new_tensor(comparison.excluded)
    rollouts = torch.arange(groups, device=columns.device)
    asks = excluded[:, 0, None, None] * groups + rollouts[:, None]
    pairs = torch.stack(torch.broadcast_tensors(asks, columns[excluded[:, 1]][:, None]), -1)
    return found.repeat_interleave(groups, 0), pairs.flatten(0, 2)


def _index(comparison: Comparison, columns: Tensor) -> Tensor:
    """[B, G, N] rows of the table: every query's negatives under the same rollout; -1 masked."""
    negatives = columns.new_tensor(comparison.negatives)
    found = torch.where(negatives[..., None] >= 0, columns[negatives], -1)  # [B, N, G]
    return found.transpose(1, 2).contiguous()


def _sources(comparison: Comparison, columns: Tensor) -> Tensor:
    """[B, N] index into `SOURCES`, -1 where there is no negative."""
    there = comparison.negatives >= 0
    return columns.new_tensor(np.where(there, comparison.sources, -1))


def _by_source(
    loss: str, scores: Tensor, pull: Tensor, sources: Tensor, total: Tensor
) -> Iterator[tuple[str, float]]:
    """How much of a loss each source of negatives makes, and how often one outranks the positive.

    Args:
        loss: its name, before the metrics'.
        scores: [..., 1 + N], the positive's first.
        pull: [..., N] size of the loss's gradient on the scores of negatives, of `total` [...].
        sources: [..., N], -1 where there is none.
    """
    above = scores[..., 1:] >= scores[..., :1]
    for place, name in enumerate(SOURCES):
        of = sources == place
        if bool(of.any()):
            part = torch.where(of, pull, 0.0).sum() / total.sum().clamp(min=1e-30)
            yield f"{loss}_share_{name}", part.item()
            outranked = (above & of).any(-1).sum() / of.any(-1).sum()
            yield f"{loss}_outranked_{name}", outranked.item()


def _reward_metrics(found: Tensor, out: elva_kernels.RankingReward) -> dict[str, float]:
    """What shows a collapse or a hack early."""
    rank = out.rank.float()
    spread = found.amax(1) - found.amin(1)
    scores = out.scores[out.scores.isfinite()]
    return {
        "reward": found.mean().item(),
        "reward_std": found.std(1, unbiased=False).mean().item(),
        "frac_zero_std": (spread < 1e-6).float().mean().item(),
        "margin_reward": out.margin_reward.mean().item(),
        "rank_reward": out.rank_reward.mean().item(),
        "positive_score": out.scores[..., 0].mean().item(),
        "mean_score": scores.mean().item(),
        "rank_1": (rank == 1).float().mean().item(),
        "rank_2_3": ((rank >= 2) & (rank <= 3)).float().mean().item(),
        "rank_4_10": ((rank >= 4) & (rank <= 10)).float().mean().item(),
        "rank_11_up": (rank > 10).float().mean().item(),
    }
