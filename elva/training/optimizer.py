"""The optimiser of a stage, its schedule, and the arithmetic of its forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from elva.recipe import StageConfig
from elva.training.states import trained


def make_optimizer(model: nn.Module, stage: StageConfig, arguments: Mapping[str, Any]) -> Optimizer:
    """AdamW or SGD; biases, norms and scalars are not decayed, as by transformers' Trainer.

    Args:
        arguments: the recipe's `trainer`: optim, adam_beta1, adam_beta2, adam_epsilon.
    """
    found = [*trained(model).values()]
    groups = [
        {"params": [p for p in found if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in found if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind = arguments.get("optim", "adamw_torch_fused")
    if kind == "sgd":
        return SGD(groups, lr=stage.learning_rate)
    betas = (arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999))
    eps = arguments.get("adam_epsilon", 1e-8)
    fused = kind == "adamw_torch_fused"
    return AdamW(groups, lr=stage.learning_rate, betas=betas, eps=eps, fused=fused)


def make_schedule(
    optimizer: Optimizer,
    stage: StageConfig,
    steps: int,
    arguments: Mapping[str, Any],
) -> LambdaLR:
    """transformers' schedule over `steps`.

    Args:
        arguments: the recipe's `trainer`: lr_scheduler_kwargs.
    """
    found: LambdaLR = get_scheduler(
        stage.schedule,
        optimizer,
        max(1, round(stage.warmup_ratio * steps)),
        steps,
        arguments.get("lr_scheduler_kwargs"),
    )
    return found


def put_schedule(schedule: LambdaLR, step: int) -> None:
    """Go on with a schedule from after so many steps."""
    schedule.last_epoch = step
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, (base, factor) in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = base * factor(step)


def autocast(device: torch.device, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The arithmetic of a stage's every forward: bf16 where its recipe's trainer asks for it."""
    bf16 = bool(arguments.get("bf16"))
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def checkpoint_gradients(model: Any, arguments: Mapping[str, Any]) -> None:
    """Keep fewer activations of a transformers model, where the recipe's trainer asks for it."""
    if arguments.get("gradient_checkpointing"):
        further = {"use_reentrant": False, **(arguments.get("gradient_checkpointing_kwargs") or {})}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=further)
