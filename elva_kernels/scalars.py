"""What numbers, flags and names must hold, and the sentence that refuses what they do not."""

import contextlib
import decimal
import math
import numbers
import operator
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

_Types = tuple[Any, ...]
try:
    import numpy
except ModuleNotFoundError:  # a kernel of a hub has torch alone to ask for, and torch no NumPy
    _NUMPY: _Types = ()
    _ARRAY: _Types = ()
    _FLAG: _Types = (bool,)
else:
    _NUMPY, _ARRAY, _FLAG = (numpy.generic,), (numpy.ndarray,), (bool, numpy.bool_)

LARGEST = sys.float_info.max
LARGEST_INT = 2**63 - 1

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SHOWN = (str, int, float, complex, decimal.Decimal, type(None), *_NUMPY)
_BITS_SHOWN = 128
_LETTERS_SHOWN = 100


def refuse(
    error: type[Exception], op: str, argument: str, rule: str, got: Any, todo: str = ""
) -> NoReturn:
    """The one form that a refusal has."""
    raise error(f"{op}: {argument} must {rule}, got {got}{'; ' if todo else ''}{todo}")


def number(op: str, argument: str, value: float, least: float, most: float) -> float:
    """A real number in [least, most], of any type, as a float."""
    if type(value) is float and least <= value <= most:
        return value
    try:
        number = _real(value)
    except (OverflowError, ValueError):  # beyond a float; a signalling NaN
        refuse(ValueError, op, argument, f"be {_range(least, most)}", shown(value))
    if number is None:
        advice = "use .item()" if isinstance(value, Tensor) else ""
        refuse(TypeError, op, argument, "be a number", typed(value), advice)
    if not math.isfinite(number) or not least <= number <= most:
        refuse(ValueError, op, argument, f"be {_range(least, most)}", repr(number))
    return number


def _real(value: Any) -> float | None:
    """A real number of any type as a float; None for what is none."""
    if isinstance(value, Tensor):
        # Another device would have to be waited for, and a gradient would be lost.
        if value.device.type != "cpu" or value.requires_grad or value.is_nested:
            return None
        if value.dim() > 0 or value.dtype not in _FLOATS + _INTEGERS:
            return None
    elif isinstance(value, _ARRAY):
        if value.ndim > 0 or value.dtype.kind not in "iuf":
            return None
    elif isinstance(value, bool) or not isinstance(value, (numbers.Real, decimal.Decimal)):
        return None
    return float(value)


def integer(op: str, argument: str, value: Any) -> int:
    """Whatever Python takes for an index, but a bool; traced, a SymInt."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    # Of tensors another device would have to be waited for, and torch takes a bool for an index.
    if not isinstance(value, (bool, Tensor)) and hasattr(type(value), "__index__"):
        with contextlib.suppress(TypeError):  # an array has the method, and seldom an integer
            return operator.index(value)
    advice = "use .item()" if isinstance(value, Tensor) else ""
    refuse(TypeError, op, argument, "be an int", typed(value), advice)


def one_of(op: str, argument: str, value: Any, names: tuple[str, ...]) -> None:
    """One of `names`."""
    if not isinstance(value, str) or value not in names:
        refuse(ValueError, op, argument, f"be one of {', '.join(names)}", shown(value))


def typed(value: Any) -> str:
    """The type of what is refused, and its value where that is short."""
    name = type(value).__name__
    return f"{name} {shown(value)}" if isinstance(value, _SHOWN) else name


def shown(value: Any) -> str:
    """What is refused, on one short line: of most types nothing but their name."""
    if not isinstance(value, _SHOWN):
        return type(value).__name__
    if isinstance(value, int) and value.bit_length() > _BITS_SHOWN:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LETTERS_SHOWN else f"{text[:_LETTERS_SHOWN]}..."


def _range(least: float, most: float) -> str:
    if most < LARGEST:
        return f"in [{least:g}, {most:g}]"
    return "finite" if least < 0 else f"finite and at least {least:g}"


def flag(op: str, argument: str, value: bool) -> bool:
    """A bool, NumPy's too."""
    if not isinstance(value, _FLAG):
        refuse(TypeError, op, argument, "be a bool", typed(value))
    return bool(value)
