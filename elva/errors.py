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


def torchvision_is_foreign(error: BaseException) -> bool:
    """Whether it began where torchvision, which transformers imports where it is installed, does
    not load: PyPI's was built for another torch than, say, a CPU's."""
    link: BaseException | None = error
    while link is not None:
        for frame, _ in traceback.walk_tb(link.__traceback__):
            module = str(frame.f_globals.get("__name__", ""))
            if module.split(".")[0] == "torchvision" and frame.f_code.co_name == "<module>":
                return True
        link = link.__cause__ or link.__context__
    return False


def refused_by_kernels(error: BaseException) -> bool:
    """Whether `elva_kernels` raised it: a value out of its range or a shape that does not fit."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__", ""))
    return isinstance(error, (TypeError, ValueError)) and module.split(".")[0] == "elva_kernels"
