"""Losses of sentence-transformers' trainer, by elva_kernels.

Its own InfoNCE holds all scores of a batch, several times over; these hold `workspace_mb` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import cos_sim, pytorch_cos_sim
from torch import Tensor, nn

import elva
import elva_kernels

_ROWS_OF_A_PROCESS = 1 << 40
"""Ours: more than one process has, so that its ids are nobody else's."""


class InfoNCELoss(MultipleNegativesRankingLoss):
    """The loss of `MultipleNegativesRankingLoss`, in value and gradients, in bounded memory.

    A batch's columns are an anchor, its positive, and any number of hard negatives; positives and
    hard negatives of the others in the batch are negatives too (van den Oord et al.,
    arXiv:1807.03748, eq. 4), equal ones among them: use `BatchSamplers.NO_DUPLICATES`.

    Args:
        scale: > 0, 1 / temperature.
        similarity_fct: the cosine similarity, which is the only one that there is.
        gather_across_devices: negatives are those of all processes; each keeps its own rows' part.
        directions: what each query and its positive are compared with: "query_to_doc" and any of
            "query_to_query", "doc_to_query", "doc_to_doc".
        partition_mode: "joint", one softmax over all directions; "per_direction", the mean over one
            for each, of "query_to_doc" and "doc_to_query" alone.
        hardness_mode, hardness_strength: as of `MultipleNegativesRankingLoss`: what is added to the
            logits of "in_batch_negatives", "hard_negatives" or "all_negatives", times their cosine.
        workspace_mb: >= 1, megabytes of scores held at once (`elva_kernels.info_nce`).

    Raises:
        ValueError: an argument out of its range; another similarity.

    Differentiable: the loss, in the model's parameters.

    Example::

        from elva.integrations.sentence_transformers import InfoNCELoss

        loss = InfoNCELoss(model, directions=("query_to_doc", "doc_to_query"))
        SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        workspace_mb: int = 256,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength,
        )  # fmt: skip
        self.workspace_mb = workspace_mb
        _must_be_cosine(similarity_fct)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any = None) -> Tensor:
        """[] of columns [B, D] each: queries, positives, then hard negatives; no labels."""
        _must_be_cosine(self.similarity_fct)
        if len(embeddings) < 2:
            raise ValueError(
                f"InfoNCELoss: a batch must have at least 2 columns, got {len(embeddings)}; name "
                "an anchor and a positive"
            )
        query, positive = embeddings[:2]
        docs = torch.cat(embeddings[1:])
        ways, joint = set(self.directions), self.partition_mode == "joint"
        plain = not (self.hardness_mode and self.hardness_strength)
        loss = partial(
            elva_kernels.info_nce, temperature=1 / self.scale, workspace_mb=self.workspace_mb,
            group=self._group,
        )  # fmt: skip
        if plain and ways == {"query_to_doc"}:
            return loss(query, docs)
        if plain and ways == {"query_to_doc", "doc_to_query"} and not joint:
            return loss(query, docs, symmetric=True)
        each = partial(loss, reduction="none")
        # Of each direction log(1 + sum_j exp(l_j) / exp(l_positive)) over its negatives j.
        both = [each(query, docs) if plain else self._hardened(query, embeddings[1:], loss)]
        if "doc_to_query" in ways:
            both.append(each(positive, query))
        if not joint:
            return torch.stack(both).mean()
        alike = []  # directions that have no positive of their own in the joint softmax
        if "query_to_query" in ways:
            alike.append(self._apart(each, query, query, positive))
        if "doc_to_doc" in ways:
            alike.append(self._apart(each, positive, docs, query))
        losses = torch.stack([*both, *alike])
        most = losses.detach().amax(0)
        joined = (losses - most).exp().sum(0) - len(alike) * (-most).exp()
        return (most + joined.log()).mean()

    @property
    def _group(self) -> Any:
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.group.WORLD if self.gather_across_devices and there else None

    def _apart(
        self, loss: Callable[..., Any], rows: Tensor, others: Tensor, partner: Tensor
    ) -> Any:
        """A loss of rows [B, D], each with its partner for a positive, against all others but its
        own.

        Args:
            others: [n B, D]; rows i, B + i, ... are row i's own.
        """
        count, index = len(others), torch.arange(len(rows), device=rows.device)
        own = index[:, None] + torch.arange(0, count, len(rows), device=rows.device)
        left_out = torch.stack([index[:, None].expand_as(own).flatten(), own.flatten()], 1)
        first = 1
        if self._group is not None:
            first += torch.distributed.get_rank() * _ROWS_OF_A_PROCESS
        ids = first + torch.arange(count, device=rows.device)
        return loss(
            rows, torch.cat([others, partner]), count + index, excluded=left_out,
            candidate_ids=torch.cat([ids, 0 * index]),  # no partner is another's negative
        )  # fmt: skip

    def _hardened(self, query: Tensor, docs: list[Tensor], loss: Callable[..., Any]) -> Tensor:
        """[B] of a direction whose negatives weigh more the harder they are (Lan et al.,
        arXiv:2503.04812, eq. 5): logits ``scale * s + strength * stop_gradient(s)``."""
        strength, mode = self.hardness_strength, self.hardness_mode
        own = torch.stack(docs, 1)
        # Without negatives the rank reward is the positive's cosine.
        cosine = elva_kernels.ranking_reward(
            query[:, None], own, own[:, :, None][:, :, :0], w_margin=0.0, w_rank=1.0
        ).reward
        logits = self.scale * cosine
        if mode != "in_batch_negatives":
            harder = strength * cosine.detach()
            logits = torch.cat([logits[:, :1], (logits + harder)[:, 1:]], 1)
        if len(query) > 1 or self._group is not None:
            slope = self.scale + (0.0 if mode == "hard_negatives" else strength)
            # Beside what is opposite to the query, whose exponential is the least there is, the sum
            # over the others is known to the last digit.
            harder_loss = partial(
                loss, temperature=1 / slope, reduction="none", return_statistics=True
            )
            found, seen = self._apart(harder_loss, query, torch.cat(docs), -query.detach())
            others = found + (-(-found).expm1()).log() + slope * seen.target_score
            part = self.scale / slope  # of its gradient: the harder weights are constants
            others = part * others + (1 - part) * others.detach()
            logits = torch.cat([logits, others[:, None]], 1)
        return logits.logsumexp(1) - self.scale * cosine[:, 0]


class CachedInfoNCELoss(CachedMultipleNegativesRankingLoss):
    """`InfoNCELoss` of batches larger than the model's activations would allow (GradCache, Gao et
    al., arXiv:2101.06983), equal to `CachedMultipleNegativesRankingLoss` in value and gradients.

    The model embeds in mini-batches without a graph, the embeddings' gradients come with the loss,
    then it embeds again with a graph, from the same random states, so that dropout drops the same.

    Args:
        mini_batch_size: rows that the model embeds at once.
        mini_batch_num_tokens: tokens at once instead of rows.
        show_progress_bar: a bar over the mini-batches.
        workspace_mb: >= 1, megabytes of scores held at once.
        settings: the others of `InfoNCELoss`.

    Raises:
        ValueError: an argument out of its range; a model of a StaticEmbedding, which has no rows.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        *,
        workspace_mb: int = 256,
        **settings: Any,
    ) -> None:
        super().__init__(model, scale, similarity_fct, mini_batch_size, **settings)
        names = ("mini_batch_num_tokens", "show_progress_bar")
        own = {name: value for name, value in settings.items() if name not in names}
        self.loss = InfoNCELoss(model, scale, similarity_fct, workspace_mb=workspace_mb, **own)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
    ) -> Tensor:
        """[] of columns of mini-batches [b, D]; with gradients on them if asked for."""
        loss = self.loss.compute_loss_from_embeddings([torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


class RankingRewardLoss(nn.Module):
    """Minus the mean ranking reward (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4) of a batch's
    queries.

    Columns are an anchor, its positive, and any number of hard negatives. A query is rewarded for
    its own hard negatives (`elva_kernels.ranking_reward`), or for the candidates of the whole batch
    (`elva_kernels.in_batch_ranking_reward`).

    Differs from the paper, which rewards sampled summaries by it (policy gradients): here the
    reward itself is differentiated, with its ranks as constants unless `rank_temperature` is given.

    Args:
        margin, rank_penalty, w_margin, w_rank, rank_temperature: as in
            `elva_kernels.ranking_reward`; a rank temperature needs a query's own negatives.
        in_batch: whether candidates are those of the batch. None: where there are no hard
            negatives, or where they are gathered.
        head: >= 1, of the batch's candidates the last rank that enters the penalty.
        gather_across_devices: candidates are those of all processes.

    Raises:
        ValueError: arguments that contradict each other, or, from the first batch on, one out of
            its range.

    Differentiable: the loss, in the model's parameters.

    Example::

        from elva.integrations.sentence_transformers import RankingRewardLoss

        loss = RankingRewardLoss(model, margin=0.05)
        SentenceTransformerTrainer(model=model, train_dataset=triplets, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        margin: float = 0.1,
        rank_penalty: float = 0.01,
        w_margin: float = 0.4,
        w_rank: float = 0.6,
        rank_temperature: float = 0.0,
        in_batch: bool | None = None,
        head: int = 100,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if gather_across_devices and in_batch is False:
            raise ValueError(
                "RankingRewardLoss: in_batch must not be False where candidates are gathered, got "
                "False; leave it out"
            )
        if rank_temperature and (in_batch or gather_across_devices):
            raise ValueError(_OF_OWN.format(rank_temperature))
        self.model = model
        self.weights: dict[str, Any] = {
            "margin": margin, "rank_penalty": rank_penalty, "w_margin": w_margin, "w_rank": w_rank,
        }  # fmt: skip
        self.rank_temperature, self.head = rank_temperature, head
        self.in_batch, self.gather_across_devices = in_batch, gather_across_devices

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """[] of a batch's columns of features; no labels."""
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(columns)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any = None) -> Tensor:
        """[] of columns [B, D] each: queries, positives, then hard negatives; no labels."""
        if len(embeddings) < 2:
            raise ValueError(
                f"RankingRewardLoss: a batch must have at least 2 columns, got {len(embeddings)}; "
                "name an anchor and a positive"
            )
        query, *docs = embeddings
        in_batch = self.in_batch
        if in_batch is None:
            in_batch = len(docs) == 1 or self.gather_across_devices
        if not in_batch:
            found = elva_kernels.ranking_reward(
                query, docs[0], torch.stack(docs, 1)[:, 1:], **self.weights,
                rank_temperature=self.rank_temperature,
            )  # fmt: skip
            return -found.reward.mean()
        if self.rank_temperature:
            raise ValueError(_OF_OWN.format(self.rank_temperature))
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        group = torch.distributed.group.WORLD if self.gather_across_devices and there else None
        found = elva_kernels.in_batch_ranking_reward(
            query, torch.cat(docs), head=self.head, group=group, **self.weights
        )
        return -found.reward.mean()

    def get_config_dict(self) -> dict[str, Any]:
        """Its arguments, for the model card."""
        return {
            **self.weights, "rank_temperature": self.rank_temperature, "in_batch": self.in_batch,
            "head": self.head, "gather_across_devices": self.gather_across_devices,
        }  # fmt: skip

    @property
    def citation(self) -> str:
        return elva.CITATION


_OF_OWN = (
    "RankingRewardLoss: rank_temperature must be 0 without hard negatives of a query's own, got "
    "{}; leave it out"
)


def _must_be_cosine(similarity: Callable[[Tensor, Tensor], Tensor]) -> None:
    if similarity not in (cos_sim, pytorch_cos_sim):
        name = getattr(similarity, "__name__", type(similarity).__name__)
        raise ValueError(
            f"InfoNCELoss: similarity_fct must be cos_sim, got {name}; for the dot product of unit "
            "rows, which it equals, end the model with a Normalize module"
        )
