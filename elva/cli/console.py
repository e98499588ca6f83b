"""What every command shares: where it prints, and what becomes of errors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False)
if not out.is_terminal:
    out.width = 120  # a file or a pipe has no width: the table's own
err = Console(stderr=True, highlight=False)

RunArgument = Annotated[Path, typer.Argument(help="A run directory of elva train.", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
"""System errors that a person can mend: a full, read-only or foreign disk."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend is one line and exit code 2; a defect of ours keeps its traceback."""
    from elva.errors import DataError, UserError

    try:
        yield
    except (DataError, UserError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or "the output directory"
        _fail(f"{where}: cannot write, {error.strerror}; free space or choose another directory")
    except KeyboardInterrupt:
        err.print("elva: interrupted; go on with --resume")
        raise typer.Exit(130) from None


def _fail(line: str) -> None:
    err.print(f"elva: {line}", soft_wrap=True, markup=False)
    raise typer.Exit(2) from None


def quiet_libraries() -> None:
    """Progress is ours to show: transformers' own bars would write over it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
