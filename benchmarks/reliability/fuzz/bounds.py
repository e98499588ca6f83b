"""What becomes of reading a file that somebody else wrote: a value or one line, within bounds."""

from __future__ import annotations

import contextlib
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from elva.errors import MAX_MESSAGE, UserError, printable

MOST_SECONDS, MOST_ASLEEP = 5.0, 120.0
"""Ours: of a core, for a file of a megabyte at most; and of waiting, on a machine that does much
beside."""

CLOCKS = (
    (signal.ITIMER_PROF, signal.SIGPROF, MOST_SECONDS),
    (signal.ITIMER_REAL, signal.SIGALRM, MOST_ASLEEP),
)

MOST_BYTES = 1 << 30
"""Ours: of address space beyond what the process has."""


class Endless(BaseException):
    """It takes longer than it may; no `Exception`, so that no reader passes it over."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """A block that ends in `Endless` or a MemoryError where it goes beyond the bounds."""

    def late(number: int, frame: object) -> None:
        raise Endless(f"takes over {MOST_SECONDS:.0f} s")

    memory = resource.getrlimit(resource.RLIMIT_AS)
    before = {number: signal.signal(number, late) for _, number, _ in CLOCKS}
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MOST_BYTES, memory[1]))
    for clock, _, seconds in CLOCKS:
        signal.setitimer(clock, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for clock, number, _ in CLOCKS:
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])
        resource.setrlimit(resource.RLIMIT_AS, memory)


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def came_of(read: Callable[[], object]) -> str:
    """`read` or `refused`.

    Raises:
        AssertionError: an error that is no plain line, or that people cannot mend.
        BaseException: whatever else the reader raises, as it is.
    """
    with bounded():
        try:
            read()
        except UserError as error:
            check_line(str(error))
            return "refused"
    return "read"


def check_line(said: str) -> None:
    """An error is one line of bounded length, and plain text wherever it is shown."""
    assert said == printable(said), f"an error holds hidden characters: {said!r}"
    assert 0 < len(said) <= MAX_MESSAGE + 3, f"an error of {len(said):,} characters"


def report(where: str, error: BaseException) -> str:
    """A line on what a reader should not have raised; a person's Ctrl-C goes on its way."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return f"{where}: {type(error).__name__} {str(error)[:300]!r} at {place}"
