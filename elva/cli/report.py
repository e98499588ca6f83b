"""`elva report`."""

from pathlib import Path
from typing import Annotated

import typer

from elva.cli import options
from elva.cli.console import one_line_errors, out, print_json

EXAMPLES = "Examples:  elva report runs/one   |   elva report runs/one runs/two --output two.html"


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories of elva train.", metavar="RUN...")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The page; by default report.html of the first run.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a run's page again from its files, or one that compares several runs.

    The page is one file and fetches nothing. With several runs it has their figures side by side
    with steps and intervals, paired differences from the first, what differs in their recipes, and
    curves over each other.
    """
    with one_line_errors():
        from elva.commands.report import figures
        from elva.commands.report import report as write
        from elva.errors import UserError
        from elva.files import check_file
        from elva.run import Run

        if output is not None:
            if output.suffix.lower() not in (".html", ".htm"):
                raise UserError(f"--output: must end in .html, got {output}; name an HTML file")
            check_file(output, "--output")
        places = [path.resolve() for path in runs]
        if len(set(places)) < len(places):
            twice = next(
                p for p, place in zip(runs, places, strict=True) if places.count(place) > 1
            )
            raise UserError(f"report: runs must differ, got {twice} twice; name each once")
        known = [Run.open(path) for path in runs]
        page = write(known, output)
        if as_json:
            print_json({"page": str(page), **figures(known)})
        else:
            out.print_line(f"report: {page}")
