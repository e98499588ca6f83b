"""Weights and moments of DeepSpeed's ZeRO-1 and 2, whole, by parameter.

An optimiser there steps on one flat fp32 piece a group, of which a parameter knows its fragment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_held(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps a parameter's fp32 value and moments, each process a part of them."""
    return hasattr(parameter, "_hp_mapping")


def weight_of(parameter: nn.Parameter) -> Tensor:
    """A parameter's fp32 value, whole; every process calls it."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor = safe_get_full_fp32_param(parameter)
    return found


def put_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter, and the fp32 value that its optimiser steps on."""
    from deepspeed.utils import safe_set_full_fp32_param

    with torch.no_grad():
        parameter.copy_(value)
    safe_set_full_fp32_param(parameter, value.to(parameter.device))


def moments_of(
    parameters: Mapping[str, nn.Parameter], engine: Any, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """`name|key` -> what an optimiser keeps of a parameter, whole; every process calls it.

    Args:
        engine: DeepSpeed's optimiser, around `optimizer`.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    kept: dict[str, Any] = optimizer.state[engine.single_partition_of_fp32_groups[0]]
    _link(engine, optimizer)
    for name, parameter in parameters.items():
        for key, value in kept.items():
            of_group = key == "step"
            whole = value if of_group else safe_get_full_optimizer_state(parameter, key)
            found[f"{name}|{key}"] = whole
    return found


def put_moments(
    parameters: Mapping[str, nn.Parameter],
    engine: Any,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Tensor],
) -> None:
    """Give an optimiser what `moments_of` gave of its parameters."""
    from deepspeed.utils import safe_set_full_optimizer_state

    keys = {name.rsplit("|", 1)[1] for name in moments}
    step = next((value for name, value in moments.items() if name.endswith("|step")), None)
    for flat in engine.single_partition_of_fp32_groups:
        state = optimizer.state[flat]
        state.update({key: torch.zeros_like(flat) for key in keys - {"step"}})
        if step is not None:
            state["step"] = step.to(flat.device, copy=True)
    _link(engine, optimizer)
    for name, value in moments.items():
        name, key = name.rsplit("|", 1)
        if key != "step":
            place = parameters[name]
            safe_set_full_optimizer_state(place, value.to(place.device), key)


def _link(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Tell each parameter where its moments lie: DeepSpeed (0.19) does it once, after the step of
    the first group, when those of the others are not there yet."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    pieces = engine.single_partition_of_fp32_groups
    for group, flat in zip(engine.bit16_groups, pieces, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, optimizer.state)
