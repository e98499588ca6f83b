"""One of two processes: losses of sentence-transformers and ours that gather each other's rows."""

from pathlib import Path

import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from elva.integrations.sentence_transformers import InfoNCELoss

ROWS = 5
CASES = {
    "plain": {},
    "both ways": {
        "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction",
    },
    "all ways": {
        "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        "hardness_mode": "all_negatives", "hardness_strength": 5.0,
    },
}  # fmt: skip


def both(case, columns):
    """(loss, gradients) of theirs and of ours."""
    found = []
    for loss in (MultipleNegativesRankingLoss, InfoNCELoss):
        own = [column.clone().requires_grad_() for column in columns]
        value = loss(None, gather_across_devices=True, **CASES[case]).compute_loss_from_embeddings(
            own, None
        )
        found.append((value.detach(), torch.autograd.grad(value, own)))
    return found


def run(rank, directory: Path):
    """Leaves DIRECTORY/RANK.pt: {case: ((loss, gradients) of theirs, of ours)}."""
    torch.set_num_threads(1)  # of a fork, whose threads stayed behind
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2
    )
    drawn = torch.randn(2, 3, ROWS, 8, dtype=torch.float64, generator=torch.manual_seed(0))
    torch.save({case: both(case, [*drawn[rank]]) for case in CASES}, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()
