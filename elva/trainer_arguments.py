"""Arguments of transformers' TrainingArguments that a stage follows, as a recipe's `trainer` holds
them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from elva.settings import Name, Plain, Rule

TAKEN = (
    "bf16", "tf32", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "lr_scheduler_kwargs",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "dataloader_num_workers",
)  # fmt: skip
"""Arguments of transformers' TrainingArguments that a stage can follow. Every other one is said by
a field of the recipe already, or would be ignored, or would train something else."""

_OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Those whose state is tensors a weight, which a checkpoint holds."""


MOST_WORKERS = 64
"""Ours: threads that cut pictures, of each process."""


def _are_taken(values: Mapping[str, Any]) -> bool:
    return set(values) <= set(TAKEN) and values.get("optim", _OPTIMISERS[0]) in _OPTIMISERS


def _are_in_range(values: Mapping[str, Any]) -> bool:
    """What transformers itself takes without a look."""
    switches = ("bf16", "tf32", "gradient_checkpointing")
    rates = (values.get(name, 0.0) for name in ("adam_beta1", "adam_beta2"))
    return (
        all(isinstance(values.get(name, True), bool) for name in switches)
        and all(isinstance(rate, int | float) and 0 <= rate < 1 for rate in rates)
        and not (isinstance(e := values.get("adam_epsilon", 0.0), int | float) and e < 0)
    )


def _has_workers(values: Mapping[str, Any]) -> bool:
    workers = values.get("dataloader_num_workers", 0)
    return type(workers) is int and 0 <= workers <= MOST_WORKERS


def _are_trainer_arguments(values: Mapping[str, Any]) -> bool:
    """Whether TrainingArguments takes them; transformers is imported only where there are any."""
    if not values or not _are_taken(values) or not _has_workers(values):
        return True
    if not _are_in_range(values):
        return False
    from transformers import TrainingArguments

    numbers = {f.name for f in dataclasses.fields(TrainingArguments) if type(f.default) is float}
    if any(isinstance(value, str) for name, value in values.items() if name in numbers):
        return False
    try:
        TrainingArguments(**{"output_dir": ".", "use_cpu": True, **values})
    except (TypeError, ValueError, ImportError):
        return False
    return True


TrainerArguments = Annotated[
    Mapping[Name, Plain],
    Rule(
        f"hold no more than {', '.join(TAKEN)}, optim one of {', '.join(_OPTIMISERS)} (batch size: "
        "stages.N.batch_size, memory: stages.N.micro_batch_size)",
        _are_taken,
    ),
    Rule(f"have a dataloader_num_workers from 0 to {MOST_WORKERS}", _has_workers),
    Rule("be arguments of transformers' TrainingArguments", _are_trainer_arguments),
]
