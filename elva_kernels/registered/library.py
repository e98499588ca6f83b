"""How an op becomes torch's: its schema, what computes and what traces it, its gradient's rules.

Registered by `Library.define`, which costs a few microseconds a call (`custom_op` costs several
times that), and opaque to `torch.compile`, so a compiled program runs the same kernels and gets the
same bits.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from elva_kernels.backends.boundary import in_default_float_mode

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LIBRARY = torch.library.Library("elva_kernels", "DEF")


class Registered(NamedTuple):
    """An op: its arguments and results in torch's schema language, and its two kernels."""

    schema: str
    compute: Callable[..., Any]
    trace: Callable[..., Any]  # empty results of the right shapes


def register(ops: dict[str, Registered]) -> None:
    """Define every op under `torch.ops.elva_kernels`."""
    for name, op in ops.items():
        _LIBRARY.define(name + op.schema)
        _LIBRARY.impl(name, in_default_float_mode(op.compute), "CompositeExplicitAutograd")
        torch.library.register_fake(f"elva_kernels::{name}", op.trace, lib=_LIBRARY)


def outside_graphs(function: _Function) -> _Function:
    """`function`, where `torch.compile` breaks its graph; its compiler is not imported here."""

    @functools.wraps(function)
    def eager(*arguments: Any, **named: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(function)(*arguments, **named)
        return function(*arguments, **named)

    return cast(_Function, eager)


def is_watched(*tensors: Tensor) -> bool:
    """Whether autograd follows `tensors`; forward mode too, which autograd functions refuse."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in tensors:  # a generator would double the time
            if x.requires_grad:
                return True
    return False


def gradient_op(op: Any, *arguments: Any) -> Any:
    """The backward op `op` of these arguments, as a backward has to call it."""
    if torch.is_grad_enabled():
        return _differentiated_once(op, *arguments)
    return op(*arguments)


def present(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A launcher's gradients as an op returns them: empty for one that was not wanted."""
    return tuple(like.new_empty(0) if x is None else x for x in gradients)


def wanted(gradients: Sequence[Tensor | None], wrt: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """An op's gradients as autograd and users take them: None for one that was not wanted."""
    return tuple(x if is_wanted else None for x, is_wanted in zip(gradients, wrt, strict=True))


class _DifferentiatedOnce(torch.autograd.Function):
    """Runs a backward op while a graph is being made of it, and refuses to be its gradient."""

    @staticmethod
    def forward(op: Any, *arguments: Any) -> Any:
        return op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0].name().split("::")[1].removesuffix("_backward")

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second_derivative(ctx.name, "loss" if ctx.name == "info_nce" else "reward")


def refuse_second_derivative(op: str, result: str) -> NoReturn:
    """What every backward's backward does."""
    raise RuntimeError(
        f"{op}: the {result} must be differentiated once, got a second derivative; its backward "
        "is a closed form without a gradient of its own"
    )


_differentiated_once: Callable[..., Any] = _DifferentiatedOnce.apply
