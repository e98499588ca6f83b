"""The command line: parses, calls one function, prints. Bad input is one line and exit code 2."""

import typer

from elva.cli import data, embed, evaluate, grains, index, mine, mrbench, report, search, train

app = typer.Typer(
    help="Train multimodal models to retrieve by ranking (ELVA, arXiv:2606.20280).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog="Example:  elva report runs/one")(report.report)
app.command(epilog=embed.EXAMPLES)(embed.embed)
app.add_typer(index.app, name="index")
app.command(epilog=search.EXAMPLES)(search.search)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=mine.EXAMPLES)(mine.mine)
app.command(epilog=grains.EXAMPLES)(grains.grains)
app.add_typer(mrbench.app, name="mrbench")
app.add_typer(data.app, name="data")
