"""Functions that a trainer's configuration names: `module:function` or `file.py:function`."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elva.errors import UserError


def named(what: str, argument: str, name: str) -> Callable[..., Any]:
    """The function of that name.

    Args:
        what: the framework, for an error's first word.
        argument: the setting that holds the name.
        name: a module that can be imported, or a file's path, then `:` and the function.

    Raises:
        UserError: no such file, module or function, in one line.
    """
    place, _, function = name.rpartition(":")
    rule = f"{what}: {argument} must be module:function or file.py:function, got {name!r}"
    if not place:
        raise UserError(rule)
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UserError(f"{rule}; there is no such file")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UserError(f"{rule}; {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{rule}; {place} has no function {function!r}")
    return found
