"""What a backend must get right before "auto" uses it: search."""

from __future__ import annotations

import torch

from elva_kernels import reference
from elva_kernels.backends.admission.in_batch import inputs_of
from elva_kernels.backends.admission.trial import Launchers, Trial, Wrong, check
from elva_kernels.backends.launcher import Tensors
from elva_kernels.reference import TopK

# Beyond it two scores count as different: more than the arithmetic of either explains.
_GAP = 1e-4


# The queries so many times: more than a backend takes in one pass over the corpus.
_TIMES = 30


def _try_topk(launchers: Launchers, dtype: torch.dtype, device: torch.device, soft: bool) -> None:
    with torch.device("cpu"):  # whatever the default device is
        query, corpus = (x.to(device) for x in inputs_of(dtype)[:2])
    metric = "cosine" if soft else "dot"
    if metric == "dot":
        query, corpus = (x.nan_to_num(posinf=1.0) for x in (query, corpus))
    truth = reference.topk(query.cpu().double(), corpus.cpu().double(), 6, metric=metric)
    for times in (1, _TIMES):
        found = launchers("topk")(query.repeat(times, 1), corpus, 6, metric=metric)
        check_found(found, TopK(*(x.repeat(times, 1) for x in truth)))


def check_found(found: Tensors, truth: TopK, name: str = "scores") -> None:
    """Raises Wrong where scores, or rows whose scores are apart, are not the truth's."""
    scores, index = found
    check(name, scores, truth.scores, 1e-5 * truth.scores.abs().nan_to_num(posinf=0.0))
    gap = truth.scores.diff(dim=1).abs() > _GAP * truth.scores[:, 1:].abs()
    apart = torch.ones_like(truth.index, dtype=torch.bool)
    apart[:, 1:] &= gap
    apart[:, :-1] &= gap
    apart[:, -1] = False  # the next one is not known
    if bool(((index.cpu() != truth.index) & apart).any()):
        raise Wrong("index is not the reference's")


TRIALS: dict[str, Trial] = {"topk": _try_topk}
