"""How a stage's model and optimiser are wrapped for several processes, by accelerate: by DDP, by
FSDP2 or by DeepSpeed's ZeRO-1 or 2, as its configuration says."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType

from elva.errors import RunError
from elva.recipe import StageConfig


def accelerator_of(stage: StageConfig, *, leaves_unused: bool) -> Accelerator:
    """accelerate, with what a stage asks of a wrapper; the arithmetic is the stage's own.

    Args:
        leaves_unused: whether a backward may not reach every parameter.

    Raises:
        RunError: accelerate's configuration asks for what is not to be had.
    """
    wrapping = DistributedDataParallelKwargs(find_unused_parameters=leaves_unused)
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), kwargs_handlers=[wrapping], mixed_precision="no"
        )
    except (ValueError, ImportError) as error:
        raise RunError(f"train: accelerate: {' '.join(str(error).split())}") from None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage not in (1, 2):  # those that leave each process its weights whole
            raise RunError(
                f"train: DeepSpeed's zero_stage must be 1 or 2, got {plugin.zero_stage}; FSDP2 "
                "shards weights"
            )
        plugin.deepspeed_config.update(
            gradient_clipping=stage.max_grad_norm,
            gradient_accumulation_steps=1,  # a step's micro-batches are the stage's own
            train_micro_batch_size_per_gpu=1,  # of its logs alone, as is the next
            train_batch_size=accelerator.num_processes,
        )
    return accelerator
