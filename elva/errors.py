"""Errors that a person can mend, one family: one line each, `<what>: <rule>; <what to do>`."""

import traceback


class UserError(ValueError):
    """Bad input or a state that the user can change, in one line."""


class DataError(UserError):
    """Bad data: `file:line: rule`."""


class RunError(UserError):
    """A run directory that cannot be used as asked."""


class IndexFault(UserError):
    """An index that is damaged, foreign or busy, or what does not fit into it."""


def refused_by_kernels(error: BaseException) -> bool:
    """Whether `elva_kernels` raised it: a value out of its range or a shape that does not fit."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__", ""))
    return isinstance(error, (TypeError, ValueError)) and module.split(".")[0] == "elva_kernels"
