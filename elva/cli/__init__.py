"""The command line: parses, calls one function, prints. Bad input is one line and exit code 2."""

import logging
import os
import warnings
from typing import Annotated

import typer

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
    mine,
    mrbench,
    report,
    search,
    train,
)
from elva.cli.console import one_line_errors

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"elva {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train multimodal models to retrieve by ranking (ELVA, arXiv:2606.20280)."""
    # What is wrong with a picture we say ourselves.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    if os.environ.get("ELVA_MAX_PIXELS"):
        with one_line_errors():
            from elva.data.pictures import most_pixels

            most_pixels()


app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog="Example:  elva report runs/one")(report.report)
app.command(epilog=embed.EXAMPLES)(embed.embed)
app.add_typer(index.app, name="index")
app.command(epilog=search.EXAMPLES)(search.search)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=mine.EXAMPLES)(mine.mine)
app.command(epilog=grains.EXAMPLES)(grains.grains)
app.add_typer(mrbench.app, name="mrbench")
app.add_typer(data.app, name="data")
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
