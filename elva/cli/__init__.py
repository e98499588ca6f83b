"""The command line: parses, calls one function, prints. Bad input is one line and exit code 2."""

from __future__ import annotations

import typer

from elva.cli import data, grains, mine, mrbench, retrieval, training

app = typer.Typer(
    help="Train multimodal models to retrieve by ranking (ELVA, arXiv:2606.20280).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
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
