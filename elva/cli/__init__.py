"""The command line: parses, calls one function, prints. Bad input is one line and exit code 2."""

from __future__ import annotations

from typing import Annotated

import typer

from elva import __version__
from elva.cli import data, doctor, grains, mine, mrbench, retrieval, training

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


app.command(epilog=training.TRAIN_EXAMPLES)(training.train)
app.command(epilog="Example:  elva report runs/one")(training.report)
app.command(epilog=retrieval.EMBED_EXAMPLES)(retrieval.embed)
app.add_typer(retrieval.index_app, name="index")
app.command(epilog=retrieval.SEARCH_EXAMPLES)(retrieval.search)
app.command(epilog=retrieval.EVALUATE_EXAMPLES)(retrieval.evaluate)
app.command(epilog=mine.EXAMPLES)(mine.mine)
app.command(epilog=grains.EXAMPLES)(grains.grains)
app.add_typer(mrbench.app, name="mrbench")
app.add_typer(data.app, name="data")
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
