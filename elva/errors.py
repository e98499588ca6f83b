"""Errors that a person can mend, one family: one line each, `<what>: <rule>; <what to do>`."""

import traceback

MAX_MESSAGE = 600
"""Ours, characters: what is wrong in a cell of megabytes is still a line to read."""


class UserError(ValueError):
    """Bad input or a state that the user can change, in one line.

    Args:
        message: Shortened in its middle: it begins with the place and ends with what to do.
    """

    def __init__(self, message: object = "") -> None:
        text, half = str(message), MAX_MESSAGE // 2
        super().__init__(text if len(text) <= MAX_MESSAGE else f"{text[:half]}...{text[-half:]}")


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
