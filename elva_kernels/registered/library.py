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
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from elva_kernels.backends.boundary import in_default_float_mode
from elva_kernels.registered.batched import Rule, looped

_Function = TypeVar("_Function", bound=Callable[..., Any])
# The package's own name: a copy loaded under another name keeps its ops apart from this one's.
_NAMESPACE = __name__.partition(".")[0]
_LIBRARY = torch.library.Library(_NAMESPACE, "DEF")
_RULES: dict[Any, Rule] = {}  # of each op, for the backwards of which a graph is being made


class Registered(NamedTuple):
    """An op: arguments and results in torch's schema language, its two kernels, `vmap`'s rule."""

    schema: str
    compute: Callable[..., Any]
    trace: Callable[..., Any]  # empty results of the right shapes
    batched: Rule = looped


def register(ops: dict[str, Registered]) -> Any:
    """`torch.ops.elva_kernels`, under which every op is defined now."""
    namespace = getattr(torch.ops, _NAMESPACE)
    for name, op in ops.items():
        qualified = f"{_NAMESPACE}::{name}"
        _LIBRARY.define(name + op.schema)
        _LIBRARY.impl(name, in_default_float_mode(op.compute), "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, op.trace, lib=_LIBRARY)
        overload = getattr(namespace, name).default
        _RULES[overload] = op.batched
        rule = functools.partial(op.batched, overload)
        torch.library.register_vmap(qualified, rule, lib=_LIBRARY)
    return namespace


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
        if torch._C._are_functorch_transforms_active():
            return any(map(requires_grad, tensors))
    return False


def requires_grad(x: Tensor) -> bool:
    """Whether a gradient on `x` is wanted: a batch of `torch.vmap` does not say so itself."""
    if not torch._C._are_functorch_transforms_active():
        return x.requires_grad
    if torch.compiler.is_compiling():
        return True  # nobody can look into `x`
    functorch: Any = torch._C._functorch
    while not x.requires_grad and functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x.requires_grad


def in_reverse(
    function: type[torch.autograd.Function], refuse: Callable[..., Any]
) -> Callable[..., Any]:
    """What calls `function`; in forward mode `refuse` is its derivative.

    A class of its own holds that, since `torch.compile` takes no function that has one.
    """
    name, jvp = function.__name__, {"jvp": staticmethod(refuse)}
    in_forward_mode = cast(Any, type(name, (function,), jvp))
    # Behind `function.apply`, which looks at the signature of `forward` each time, in 20 us.
    apply_positional = cast(Any, super(torch.autograd.Function, function)).apply

    def apply(*arguments: Any) -> Any:
        is_compiling = torch.compiler.is_compiling()
        if is_compiling:
            if torch._C._are_functorch_transforms_active():
                _refuse_compiled_transform()
            # Inside a transform that is not: torch takes our `*arguments` for a context's place.
            if not is_watched(*(x for x in arguments if isinstance(x, Tensor))):
                return function.forward(*arguments)
        if forward_ad._current_level >= 0:
            return in_forward_mode.apply(*arguments)
        if is_compiling:
            return function.apply(*_each_once(arguments))
        if torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)
        return apply_positional(*unwrap_dead_wrappers(arguments))

    return apply


def _each_once(arguments: Sequence[Any]) -> list[Any]:
    """The arguments, a tensor among them a second time as a view: Dynamo traces no other."""
    once: list[Any] = []
    for x in arguments:
        repeated = isinstance(x, Tensor) and any(x is y for y in once)
        once.append(x.view_as(x) if repeated else x)
    return once


def _refuse_compiled_transform() -> NoReturn:
    """It would inline the forward and lose the backward: the gradient would be 0.

    Without `fullgraph` this is a reason for `torch.compile` to call the transform uncompiled.
    """
    raise RuntimeError(
        "elva_kernels: a transform of torch.func must be outside torch.compile(fullgraph=True), "
        "got one that is being compiled; leave fullgraph out"
    )


def gradient_op(op: Any, *arguments: Any) -> Any:
    """The backward op `op` of these arguments, as a backward has to call it."""
    if torch.is_grad_enabled():
        return _differentiated_once(op, *arguments)
    return op(*arguments)


def no_gradients(ctx: Any) -> tuple[None, ...]:
    """What a backward returns whose upstream gradient does not exist."""
    return (None,) * len(ctx.needs_input_grad)


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
    def vmap(info: Any, in_dims: Any, op: Any, *arguments: Any) -> Any:
        call = functools.partial(_differentiated_once, op)
        return _RULES[op](call, info, in_dims[1:], *arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse_second_derivative(ctx.name, "loss" if ctx.name == "info_nce" else "reward")


def refuse_second_derivative(op: str, result: str) -> NoReturn:
    """What every backward's backward does."""
    raise RuntimeError(
        f"{op}: the {result} must be differentiated once, got a second derivative; its backward "
        "is a closed form without a gradient of its own"
    )


def refuse_forward_mode(op: str, result: str, *_: Any) -> NoReturn:
    """What every forward-mode derivative is; `_` is what torch passes to it."""
    raise RuntimeError(
        f"{op}: the {result} must be differentiated in reverse mode, got a forward-mode "
        "derivative; use backward(), torch.func.grad, vjp or jacrev"
    )


_differentiated_once = in_reverse(_DifferentiatedOnce, _DifferentiatedOnce.backward)
