"""What a checkpoint holds of a model and its optimiser: whole tensors by parameter name, however
many processes shared them, so that another number can go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from elva.training import zero


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of its weights alone (FSDP2)."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What trains, whole; every process calls it."""
    return {name: _weight(p) for name, p in trained(model).items()}


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model what `weights_of` gave, of the names that it has."""
    parameters = trained(model)
    with torch.no_grad():
        for name, value in weights.items():  # in one order: a sharded one is an exchange
            if name not in parameters:
                continue
            if zero.is_held(parameters[name]):
                zero.put_weight(parameters[name], value)
            else:
                parameters[name].copy_(_like(value, parameters[name]))


def bound_weight(model: nn.Module, name: str, least: float) -> None:
    """Keep a parameter from falling below a value, wherever it is held; every process calls it."""
    put_weights(model, {name: _weight(trained(model)[name]).clamp(min=least)})


def moments_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, wrapped: Any
) -> dict[str, Tensor]:
    """An optimiser's state, whole: `name|key` -> tensor; every process calls it.

    Args:
        wrapped: the optimiser as accelerate gave it back.
    """
    parameters = trained(model)
    if any(map(zero.is_held, parameters.values())):
        return zero.moments_of(parameters, wrapped.optimizer, optimizer)
    return {
        f"{name}|{key}": whole(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def put_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, wrapped: Any, moments: Mapping[str, Tensor]
) -> None:
    """Give an optimiser what `moments_of` gave."""
    parameters = trained(model)
    if any(map(zero.is_held, parameters.values())):
        zero.put_moments(parameters, wrapped.optimizer, optimizer, moments)
        return
    groups: dict[Any, Any] = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, value in moments.items():
        name, key = name.rsplit("|", 1)
        parameter = parameters[name]
        if key == "step":  # a number; on the device only where the kernel reads it there
            on_device = groups[parameter].get("fused") or groups[parameter].get("capturable")
            value = value.to(parameter.device if on_device else "cpu")
        else:
            value = _like(value, parameter)
        optimizer.state[parameter][key] = value


def _weight(parameter: nn.Parameter) -> Tensor:
    held = zero.is_held(parameter)
    return zero.weight_of(parameter) if held else whole(parameter.detach())


def whole(value: Tensor) -> Tensor:
    """A tensor, or all of one that is sharded; every process calls it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor where and as a parameter lies."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
