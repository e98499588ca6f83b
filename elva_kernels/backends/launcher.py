"""What a launcher is: an op on a backend, as `table` lists them and `registered` calls them.

Its tensors arrive checked, on one device, of one dtype out of bfloat16, float16, float32 and
float64, with any strides; those of `Groups` are expanded to one leading shape `*`. They are read
where they lie and never written. Results are contiguous and have no graph. With `groups` a
`Groups`, `contrast` a `Contrast`, `weights` a `reference.Weights`, `batch` a `reference.Batch`, and
None where an argument is optional:

    ranking_reward            (groups, weights) -> reward, margin_reward, rank_reward [*], rank
                              int32 [*], scores [*, N + 1]
    ranking_reward_saved      the same, and saved: all that the backward needs beside the inputs
    ranking_reward_backward   (groups, saved, grad_reward, weights, wrt) -> the gradients of
                              sum(grad_reward * reward) on query, positive and negatives
    ranking_reward_and_grad   (groups, upstream, weights, wrt) -> the values and the gradients of
                              sum(upstream * reward); None is 1
    reward_from_scores        (scores, mask, relevance, weights) -> the values, with the live scores
    reward_from_scores_backward  (scores, mask, relevance, grad_reward, weights) -> grad_scores
    group_advantages          (reward, *, scale, std_eps) -> advantages
    topk                      (query, corpus, k, *, metric) -> scores, index
    row_codes                 (rows, fine) -> the fields of `reference.FineCodes`; the second is
                              [P, 0] without `fine`
    nearest_codes             (query, rows, depth, *, mask, floor) -> bounds, index; `query` is
                              `reference.FineCodes`, `rows` `reference.RowCodes`
    rank_statistics           (query, candidates, batch, *, k, temperature) -> the fields of
                              `reference.RankStatistics`; logsumexp is [0] without a temperature
    in_batch_ranking_reward   (query, candidates, batch, head, weights) -> the values, index
    in_batch_ranking_reward_backward  (query, candidates, index, scores, rank, grad_reward, head,
                              weights, wrt, *, diagonal) -> grad_query, grad_candidates;
                              diagonal: query i has the positive i and no other
    info_nce                  (contrast) -> loss, the statistics
    info_nce_and_grad         (contrast, weight, wrt, rounded) -> the same, and the gradients of
                              sum(weight * loss) on query, candidates and temperature
    info_nce_share            (contrast, weight, wrt, rounded, exchange) -> the same of one
                              process's queries and candidates: `query` are its own, `candidates`,
                              `batch` and `weight` those of all (`shares.Exchange`)

With `index` (int64 [*, N], any strides) `negatives` is a bank [M, D], any strides: a group's
negative i is row index[..., i], read where it lies. -1: masked, so that `mask` is None; -2: a row
that does not exist and is taken for one that is not finite. The bank's gradient is [M, D]: for each
row the sum over its occurrences in order, scaled and rounded once; 0 for a row that nobody names.

`relevance` [*, N] is contiguous, in the values' dtype. A live one that is NaN or outside [0, 1]
makes its group's rewards and gradients NaN; one behind the mask, or of an index -1, is not looked
at.

Values are float32 (float64 for float64 inputs); what exists per positive is [B, P], as the batch's
target. `wrt` says which gradients are wanted; in place of another is None: neither computed nor
written. Gradients come in the inputs' dtype; those of `info_nce_and_grad` that are not `rounded` in
the scores', and on the temperature in float64: a factor is still to come.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elva_kernels.reference import Batch, Wanted

Tensors = tuple[Tensor, ...]
Gradients = tuple[Any, ...]  # tensors, and None for each that is not wanted
Launcher = Callable[..., tuple[Any, ...]]


class Groups(NamedTuple):
    """The inputs of a grouped op, on one leading shape where a launcher takes them."""

    query: Tensor  # [*, D]
    positive: Tensor  # [*, D]
    negatives: Tensor  # [*, N, D]; with an index a bank [M, D]
    mask: Tensor | None = None  # bool [*, N]
    negative_index: Tensor | None = None  # int64 [*, N]
    relevance: Tensor | None = None  # [*, N]

    @property
    def leading(self) -> torch.Size:
        return self.query.shape[:-1]

    @property
    def n(self) -> int:
        return (
            self.negatives.shape[-2]
            if self.negative_index is None
            else self.negative_index.shape[-1]
        )

    @property
    def dim(self) -> int:
        return self.query.shape[-1]

    @property
    def sizes(self) -> tuple[tuple[int, ...], int, int, int]:
        """The leading shape, N, D, and the rows of a bank or 0: as the compiled module is told."""
        rows = 0 if self.negative_index is None else len(self.negatives)
        return tuple(self.leading), self.n, self.dim, rows

    def in_groups(self, wrt: Wanted) -> Wanted:
        """Those in `wrt` but a bank's, which is no sum over one group: it is made of `saved`."""
        return wrt[0], wrt[1], wrt[2] and self.negative_index is None

    def empty_saved(self, empty: Callable[..., Tensor] = torch.empty) -> Tensor:
        shape = saved_shape((*self.leading, self.n + 1))
        return empty(shape, dtype=torch.float64, device=self.query.device)


class Contrast(NamedTuple):
    """The inputs of InfoNCE."""

    query: Tensor  # [B, D]
    candidates: Tensor  # [M, D]
    batch: Batch
    temperature: Tensor  # []
    symmetric: bool
    workspace_mb: int


def saved_shape(scores: Sequence[int]) -> tuple[int, ...]:
    """The shape of `saved`, float64, beside scores [*, C]: two numbers a candidate, one a query."""
    *leading, candidates = scores
    return *leading, 2 * candidates + 1


def detached(results: Iterable[Tensor]) -> Tensors:
    """Results as every launcher returns them: contiguous and without a graph."""
    return tuple(tensor.detach().contiguous() for tensor in results)
