"""The in-batch ops' steps that every GPU backend leaves to torch."""

import math

import torch
from torch import Tensor

from elva_kernels.backends.gpu.topk import best_of
from elva_kernels.backends.steps import Steps, Sums, Terms


class GpuSteps(Steps):
    """Small ones: nothing here walks over the scores but the choice of the best."""

    def keep_best(self, scores: Tensor, rows: slice) -> None:
        """The k hardest negatives, of masked scores."""
        if self.k > 0:
            best, index = best_of(scores[:, : self.n_candidates], self.k)
            self.topk_scores[rows] = best
            self.topk_index[rows] = torch.where(best > -math.inf, index, -1)

    def set_terms(self, terms: Terms, rows: slice, sums: Sums, at: Tensor | None = None) -> None:
        sums = Sums(*(x.unsqueeze(1) if at is None else x[at] for x in sums))
        assert self.temperature is not None
        given = self.target_score[rows].double()
        sound = given.isfinite()
        target = torch.where(sound, given, 0.0)
        peak = torch.where(sums.peak > -math.inf, sums.peak.double(), target)
        top = torch.maximum(peak, target)
        weight = ((peak - top) / self.temperature).exp()
        rest = weight * sums.total
        whole = rest + ((target - top) / self.temperature).exp()
        # A small loss is the logarithm of a number near 1.
        behind = whole.log() + (top - target) / self.temperature
        loss = torch.where(top == target, torch.log1p(rest), behind)
        share = torch.where(sound, weight / whole, 0.0)
        gap = sums.moment + sums.total * (peak - target)
        none = given == -math.inf
        terms.loss[rows] = torch.where(sound, loss, torch.where(none, 0.0, math.nan))
        terms.share[rows] = share
        terms.others[rows] = share * sums.total
        slope = -share * gap / self.temperature**2
        terms.grad_temperature[rows] = torch.where(none, 0.0, slope)

    def add_targets(self) -> None:
        """`slope_rows` had them."""
