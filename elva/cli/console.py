"""What every command shares: where it prints, and what becomes of errors."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from elva.errors import UserError, refused_by_kernels, torchvision_is_foreign
from elva.files import PARTIAL, check_file
from elva.processes import Processes
from elva.terminal import Terminal

if TYPE_CHECKING:
    from elva.progress import Bars

out = Terminal()
if not out.is_terminal:
    out.width = 120  # a file or a pipe has no width: the table's own
err = Terminal(stderr=True)

ADVICE = {
    errno.ENOSPC: "cannot write, {}; free space or choose another directory",
    errno.EDQUOT: "cannot write, {}; free space or choose another directory",
    errno.EFBIG: "cannot write, {}; raise the limit or choose another directory",
    errno.EROFS: "cannot write, {}; choose another directory",
    errno.EIO: "{}; see to the disk",
    errno.EACCES: "{}; change its rights or choose another",
    errno.EPERM: "{}; change its rights or choose another",
    errno.EEXIST: "{}; choose another name",
    errno.EISDIR: "{}; name a file, or choose another name",
    errno.ENOTDIR: "{}; a file lies where a directory must be, choose another place",
    errno.ELOOP: "{}; its links lead in a circle, choose another",
    errno.ENAMETOOLONG: "{}; choose a shorter name",
}
"""System errors that a person can mend -> the line, with the system's word at {}. A file that is
not there is none: those that a person names are looked for where they are named."""


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
        if error.errno not in ADVICE:
            raise
        where = error.filename2 or error.filename or "the output directory"
        line = ADVICE[error.errno].format(error.strerror)
        _fail(str(UserError(f"{str(where).removesuffix(PARTIAL)}: {line}")))
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


def named_path(text: str) -> Path:
    """A path with a name: an empty one, as of a variable that is not set, would be `.`."""
    if not text:
        _fail("a path must name a file or directory, got ''; is a variable not set?")
    return Path(text)


def quiet_libraries() -> None:
    """Progress is ours to show: transformers' own bars would write over it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress(as_json: bool = False) -> Bars:
    """Bars that leave standard output to a verb's JSON."""
    from elva.progress import Bars

    return Bars(err if as_json else out)


def choose(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """UserError for a value that is not among those allowed."""
    if value not in allowed:
        raise UserError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def check_sheet(path: Path) -> None:
    """UserError for a contact sheet that could not be written, before work starts."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet: must end in .png, got {path}; name a PNG file")
    check_file(path, "--sheet")


def print_json(data: Any, **options: Any) -> None:
    """Print one line of JSON, in ASCII; json.dumps leaves its last character, DEL, as it is."""
    print(json.dumps(data, **options).replace("\x7f", "\\u007f"))


def say(data: Any, lines: list[str], as_json: bool) -> None:
    """Print lines, or the data as JSON."""
    if as_json:
        print_json(data)
        return
    for line in lines:
        out.print_line(line)
