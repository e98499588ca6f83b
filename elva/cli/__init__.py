"""The command line: parses, calls one function, prints. Bad input is one line and exit code 2."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from elva import __version__
from elva.cli import (
    data,
    demo,
    doctor,
    embed,
    evaluate,
    export,
    grains,
    index,
    inspect,
    mine,
    mrbench,
    push,
    report,
    search,
    train,
)
from elva.cli.console import one_line_errors, out
from elva.errors import printable

WAYS_IN = f"""\
elva {__version__}: train multimodal models to retrieve by ranking (arXiv:2606.20280)

Train a model, first a small one on pictures that come with it:
  elva train
  elva train --recipe elva-2b --model CHECKPOINT --data M-BEIR --output RUN

Search your own pictures and texts:
  elva index build my.index --folder PICTURES --model MODEL
  elva search my.index "a dog on a beach"
  elva demo my.index

Use the reward in your own trainer, in Python:
  elva_kernels.ranking_reward(query, positive, negatives).reward

Every command: elva --help.  What can run here: elva doctor.
"""


class Commands(TyperGroup):
    """All commands. What is wrong with a command's words is shown as all other text is: typer would
    print the words themselves, which may be names of files."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _shown():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _shown():
            return super().invoke(ctx)


@contextmanager
def _shown() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # typer brings a click of its own, whose errors have no other name
        if hasattr(error, "format_message"):
            line = printable(error.format_message(), "\n")
            error.format_message = lambda: line
        raise


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        print(f"elva {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train multimodal models to retrieve by ranking (ELVA, arXiv:2606.20280)."""
    if context.invoked_subcommand is None:
        out.print(WAYS_IN, end="", soft_wrap=True)
        return
    # What is wrong with a picture we say ourselves.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    if os.environ.get("ELVA_MAX_PIXELS"):
        with one_line_errors():
            from elva.data.pictures import most_pixels

            most_pixels()


app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=embed.EXAMPLES)(embed.embed)
app.add_typer(index.app, name="index")
app.command(epilog=search.EXAMPLES)(search.search)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=push.EXAMPLES)(push.push)
app.command(epilog=mine.EXAMPLES)(mine.mine)
app.command(epilog=grains.EXAMPLES)(grains.grains)
app.add_typer(mrbench.app, name="mrbench")
app.add_typer(data.app, name="data")
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
