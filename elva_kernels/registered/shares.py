"""The in-batch ops of a batch that lies on the processes of a group, with their gradients.

What is differentiated is the mean of the processes' losses: a process receives, on its own rows,
the gradient of the sum of all losses, which the mean over processes of the parameters' gradients
(DistributedDataParallel, FSDP2) turns into that of the mean. Under `torch.compile` these are breaks
of the graph: how many rows come is known when they come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from elva_kernels.backends.choice import launcher
from elva_kernels.backends.launcher import Contrast, Gradients, Launcher, Tensors
from elva_kernels.reference import NO_POSITIVE, Weights
from elva_kernels.registered.batch import Given, counted, like_target, statistics_like
from elva_kernels.registered.library import (
    is_watched,
    outside_graphs,
    refuse_second_derivative,
    wanted,
)
from elva_kernels.registered.processes import Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@outside_graphs
def rank_statistics(
    query: Tensor,
    candidates: Tensor,
    given: Given,
    group: ProcessGroup,
    temperature: Tensor | None,
    k: int,
    backend: str,
) -> Tensors:
    """The fields of `reference.RankStatistics` of its own queries; indices into all candidates."""
    op = "rank_statistics"
    spec = f"max_score {given.max_score}"
    processes = Processes(op, group, query, candidates, given, (False, False), spec)
    launch = launcher(op, backend, query.device, query.dtype)
    found = launch(query, processes.candidates(), processes.own, k=k, temperature=temperature)
    return statistics_like(found, given.target)


class _InfoNCE(NamedTuple):
    """One process's call, whose rows are on their way."""

    launch: Launcher
    query: Tensor
    temperature: Tensor
    processes: Processes
    reduction: str
    options: tuple[bool, int]  # symmetric, workspace_mb

    def factor(self) -> Tensor:
        """[] of each query's loss in the sum of all processes' losses; inf over no query."""
        target = self.processes.batch.target
        factor = target.new_ones((), dtype=torch.float64)
        if self.reduction != "none":
            factor = factor * self.processes.world
        return factor / counted(target) if self.reduction == "mean" else factor

    def weight(self) -> Tensor:
        """[B] of all queries' losses."""
        factor = self.factor()
        factor = torch.where(factor.isfinite(), factor, 0.0)
        return factor.expand(len(self.processes.batch.target)).contiguous()

    def reduced(self, loss: Tensor) -> Tensor:
        """Its losses [b] as `reduction` says."""
        if self.reduction == "none":
            return loss
        return (loss.sum() * self.factor()).to(loss.dtype)

    def results(self, weight: Tensor, wrt: Sequence[bool], rounded: bool) -> Gradients:
        """Loss, statistics and gradients of its own rows."""
        if wrt[1]:
            self.processes.ask_for_queries()  # they come while the first product is made
        everyone = (self.processes.candidates(), self.processes.batch)
        contrast = Contrast(self.query, *everyone, self.temperature, *self.options)
        return self.launch(contrast, weight, tuple(wrt), rounded, self.processes)


def _info_nce_call(
    query: Tensor,
    candidates: Tensor,
    given: Given,
    group: ProcessGroup,
    temperature: Tensor,
    symmetric: bool,
    workspace_mb: int,
    reduction: str,
    backend: str,
    wrt: Sequence[bool],
) -> _InfoNCE:
    spec = f"max_score {given.max_score}, symmetric {symmetric}, reduction {reduction}"
    processes = Processes("info_nce", group, query, candidates, given, wrt, spec)
    if symmetric:
        processes.ask_for_queries()
    launch = launcher("info_nce_share", backend, query.device, query.dtype)
    rows = (query.detach(), temperature.detach())
    return _InfoNCE(launch, *rows, processes, reduction, (symmetric, workspace_mb))


class _InfoNCEShare(torch.autograd.Function):
    """(call, query, candidates, temperature) -> the reduced loss and the statistics."""

    @staticmethod
    def forward(ctx: Any, call: _InfoNCE, *inputs: Tensor) -> Tensors:
        ctx.call = call
        if call.reduction == "none":
            results = call.results(call.weight(), (False, False), True)
            ctx.save_for_backward(*inputs)
        else:
            results = call.results(call.weight(), call.processes.wrt, False)
            ctx.save_for_backward(*inputs, *results[-3:])
        loss, *statistics = (x for x in results[:-3] if x is not None)
        ctx.mark_non_differentiable(*statistics)
        return call.reduced(loss), *statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            refuse_second_derivative("info_nce", "loss")
        call, upstream = ctx.call, grads[0]
        inputs, gradients = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        if call.reduction == "none":
            weight = call.processes.of_rows(upstream.double())
            gradients = call.results(weight, call.processes.wrt, True)[-3:]
        else:
            gradients = [
                None if x is None else (x * upstream.to(x.dtype)).to(like.dtype)
                for x, like in zip(gradients, inputs, strict=True)
            ]
        return None, *(
            x if needed else None
            for x, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)
        )


@outside_graphs
def info_nce(
    query: Tensor,
    candidates: Tensor,
    given: Given,
    group: ProcessGroup,
    temperature: Tensor,
    symmetric: bool,
    workspace_mb: int,
    reduction: str,
    backend: str,
) -> Tensors:
    """Its reduced loss, and the statistics of its own queries."""
    watched = is_watched(query, candidates, temperature)
    wrt = [watched and x.requires_grad for x in (query, candidates)]
    arguments = (symmetric, workspace_mb, reduction, backend, wrt)
    call = _info_nce_call(query, candidates, given, group, temperature, *arguments)
    share: Callable[..., Tensors] = _InfoNCEShare.apply
    loss, *statistics = share(call, query, candidates, temperature)
    return loss, *statistics_like(statistics, given.target)


@outside_graphs
def info_nce_and_grad(
    query: Tensor,
    candidates: Tensor,
    given: Given,
    group: ProcessGroup,
    temperature: Tensor,
    symmetric: bool,
    workspace_mb: int,
    reduction: str,
    backend: str,
    wrt: Sequence[bool],
) -> tuple[Tensor, Gradients]:
    """Its reduced loss, and the gradients on its own rows and on the temperature."""
    arguments = (symmetric, workspace_mb, reduction, backend, wrt)
    call = _info_nce_call(query, candidates, given, group, temperature, *arguments)
    loss, *found = call.results(call.weight(), call.processes.wrt, True)
    assert loss is not None
    return call.reduced(loss), tuple(found[-3:])


class _Reward(NamedTuple):
    """One process's call, whose candidates have come."""

    query: Tensor
    candidates: Tensor  # its own
    processes: Processes
    head: int
    weights: Weights
    backend: str

    def values(self) -> Tensors:
        """The values and the index of its own queries, per positive of the widest."""
        launch = self._launcher("in_batch_ranking_reward")
        everyone = self.processes.candidates()
        found: Tensors = launch(self.query, everyone, self.processes.own, self.head, self.weights)
        return found

    def gradients(self, index: Tensor, scores: Tensor, rank: Tensor, upstream: Tensor) -> Gradients:
        """Of sum(upstream * reward) over all processes, on its own rows."""
        launch = self._launcher("in_batch_ranking_reward_backward")
        processes, scalars = self.processes, (self.head, self.weights)
        grad_query = grad_candidates = None
        if processes.wrt[1]:
            processes.ask_for_queries()
        if processes.wrt[0]:
            inputs = (self.query, processes.candidates(), index, scores, rank, upstream)
            grad_query = launch(*inputs, *scalars, (True, False))[0]
        if processes.wrt[1]:
            index, scores, rank, upstream = (
                processes.of_rows(x) for x in (index, scores, rank, upstream)
            )
            columns = processes.columns
            inside = (index >= columns.start) & (index < columns.stop)
            index = torch.where(inside, index - columns.start, NO_POSITIVE)
            inputs = (processes.queries(), self.candidates, index, scores, rank, upstream)
            grad_candidates = launch(*inputs, *scalars, (False, True))[1]
        return grad_query, grad_candidates

    def _launcher(self, op: str) -> Launcher:
        return launcher(op, self.backend, self.query.device, self.query.dtype)


class _RewardShare(torch.autograd.Function):
    """(call, query, candidates) -> the values, per positive of the widest."""

    @staticmethod
    def forward(ctx: Any, call: _Reward, *inputs: Tensor) -> Tensors:
        *values, index = call.values()
        ctx.call = call
        rank, scores = values[3:]
        ctx.save_for_backward(index, scores, rank, *inputs)
        ctx.mark_non_differentiable(*values[1:])
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            refuse_second_derivative("in_batch_ranking_reward", "reward")
        gradients = ctx.call.gradients(*ctx.saved_tensors[:3], grads[0].contiguous())
        return None, *(
            x if needed else None
            for x, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)
        )


def _reward_call(
    query: Tensor,
    candidates: Tensor,
    given: Given,
    group: ProcessGroup,
    head: int | None,
    weights: Weights,
    backend: str,
    wrt: Sequence[bool],
) -> _Reward:
    op = "in_batch_ranking_reward"
    spec = f"max_score {given.max_score}, head {head}, {weights}"
    processes = Processes(op, group, query, candidates, given, wrt, spec)
    head = max(1, sum(processes.sizes.candidates)) if head is None else head
    query, candidates = query.detach(), candidates.detach()
    return _Reward(query, candidates, processes, head, weights, backend)


@outside_graphs
def in_batch_ranking_reward(
    query: Tensor,
    candidates: Tensor,
    given: Given,
    group: ProcessGroup,
    head: int | None,
    weights: Weights,
    backend: str,
) -> Tensors:
    """The fields of `reference.RankingReward` of its own queries."""
    watched = is_watched(query, candidates)
    wrt = [watched and x.requires_grad for x in (query, candidates)]
    call = _reward_call(query, candidates, given, group, head, weights, backend, wrt)
    share: Callable[..., Tensors] = _RewardShare.apply
    return _narrowed(share(call, query, candidates), given.target)


@outside_graphs
def in_batch_ranking_reward_and_grad(
    query: Tensor,
    candidates: Tensor,
    given: Given,
    group: ProcessGroup,
    head: int | None,
    weights: Weights,
    backend: str,
    wrt: Sequence[bool],
    weight: Tensor | None,
) -> tuple[Tensors, Gradients]:
    """The fields of `reference.RankingReward`, and the gradients on its own rows."""
    call = _reward_call(query, candidates, given, group, head, weights, backend, wrt)
    *values, index = call.values()
    upstream = torch.ones_like(values[0]) if weight is None else weight.expand(len(query))
    rank, scores = values[3:]
    gradients = call.gradients(index, scores, rank, upstream.contiguous())
    return _narrowed(tuple(values), given.target), wanted(gradients, wrt)


def _narrowed(values: Tensors, target: Tensor | None) -> Tensors:
    """Without the padding up to the process with the most positives."""
    *rewards, rank, scores = values
    own = 1 if target is None or target.dim() == 1 else target.shape[1]
    scores = torch.cat([scores[:, :own], scores[:, rank.shape[1] :]], dim=1)
    return *rewards, like_target(rank, target), scores
