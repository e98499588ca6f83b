"""InfoNCE by micro-batches: the gradients of one graph over the whole batch."""

import importlib
from pathlib import Path

import torch

from elva.recipe import ScratchModel

contrastive_batch = importlib.import_module("benchmarks.contrastive_batch")  # by conftest

MODEL = ScratchModel(vocabulary=600, hidden_size=32, intermediate_size=64, layers=2, heads=2)
BATCH = 7


def test_micro_batches_give_the_gradients_of_one_graph(tmp_path: Path) -> None:
    """Of every parameter, in float64, beside autograd over plain torch; the loss too."""
    contrastive_batch.write(tmp_path, BATCH, MODEL)
    whole = contrastive_batch.gradients(tmp_path, BATCH, contrastive_batch.WHOLE)
    assert len(whole) > 20 and whole["loss"] > 1
    assert all(value.dtype == torch.float64 for value in whole.values())
    for rows in (1, 4, 2 * BATCH):
        assert contrastive_batch.difference(tmp_path, BATCH, rows, whole) <= 1e-12
    off = {name: value * (1 + 1e-11) for name, value in whole.items()}
    assert contrastive_batch.difference(tmp_path, BATCH, 4, off) > 1e-12, "it can fail"
