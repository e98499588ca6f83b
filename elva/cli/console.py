"""What every command shares: where it prints, and what becomes of errors."""

import atexit
import contextlib
import errno
import json
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from elva.errors import UserError, refused_by_kernels, torchvision_is_foreign
from elva.processes import Processes
from elva.terminal import Terminal

out = Terminal()
if not out.is_terminal:
    out.width = 120  # a file or a pipe has no width: the table's own
err = Terminal(stderr=True)

RunArgument = Annotated[Path, typer.Argument(help="A run directory of elva train.", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

DataOption = Annotated[Path, typer.Option("--data", help="Data directory in M-BEIR's layout.")]
SplitOption = Annotated[str, typer.Option(help="Split of the data: train, val or test.")]
TaskOption = Annotated[
    list[str] | None, typer.Option("--task", help="Task (t2i) or set (cirr_task7); all by default.")
]
PoolsOption = Annotated[str, typer.Option(help="Candidate pools: local (a set's) or global.")]

UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EISDIR,
)  # fmt: skip
"""System errors that a person can mend: a full, read-only or foreign disk."""


@contextlib.contextmanager
def one_line_errors(interrupted: str = "go on with --resume") -> Iterator[None]:
    """What a user can mend is one line and exit code 2; a defect of ours keeps its traceback.

    Args:
        interrupted: what to do after Ctrl-C.
    """
    try:
        yield
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # what is done stays done
    except (TypeError, ValueError) as error:
        if not isinstance(error, UserError) and not refused_by_kernels(error):
            raise
        _fail(str(error))
    except (ImportError, RuntimeError) as error:
        if not torchvision_is_foreign(error):
            raise
        _fail(
            "torchvision must be of this torch's build, got one that does not load; "
            "pip uninstall torchvision, or install the one of its build"
        )
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or "the output directory"
        _fail(f"{where}: cannot write, {error.strerror}; free space or choose another directory")
    except KeyboardInterrupt:
        err.print(f"elva: interrupted; {interrupted}")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def together() -> Iterator[Processes]:
    """The processes that a launcher has started, which end together, with one line where one of
    them meets an error; the first one prints."""
    processes = None
    try:
        with one_line_errors():
            out.quiet = err.quiet = os.environ.get("RANK", "0") != "0"  # what all refuse, one says
            processes = Processes()
            err.quiet = False
            with processes.ending_together():
                yield processes
    finally:
        if processes is not None:
            processes.see_off()


def _fail(line: str) -> None:
    err.print_line(f"elva: {line}")
    raise typer.Exit(2) from None


def quiet_libraries() -> None:
    """Progress is ours to show: transformers' own bars would write over it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def choose(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """UserError for a value that is not among those allowed."""
    if value not in allowed:
        raise UserError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def say(data: Any, lines: list[str], as_json: bool) -> None:
    """Print lines, or the data as JSON."""
    if as_json:
        print(json.dumps(data))
        return
    for line in lines:
        out.print_line(line)
