"""`elva inspect`."""

import time
from typing import Annotated

import typer

from elva.cli import options
from elva.cli.console import one_line_errors, out, print_json

EVERY_S = 30
"""Seconds between two lines in a pipe."""

EXAMPLES = "Examples:  elva inspect runs/one   |   elva inspect runs/one --json"


def inspect(
    run: options.Run,
    once: Annotated[bool, typer.Option("--once", help="Print where it stands, and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where it stands as one JSON object, and end.")
    ] = False,
) -> None:
    """Follow a training: stage, step, rate, time left, and the values of its steps.

    Ends when the training does, with exit code 1 where that died. In a pipe, a line every 30
    seconds.
    """
    with one_line_errors("the training goes on"):
        from rich.live import Live

        from elva.commands import follow
        from elva.run import Run

        known = Run.open(run)
        if once or as_json:
            standing = follow.Follower(known).look()
            if as_json:
                print_json(follow.as_json(standing))
            elif out.is_terminal:
                out.print(follow.panel(standing))
            else:
                out.print_line(follow.line(standing))
        elif out.is_terminal:
            with Live(console=out, auto_refresh=False) as live:
                for standing in follow.follow(known, 1.0):
                    live.update(follow.panel(standing), refresh=True)
        else:
            last = -float(EVERY_S)
            for standing in follow.follow(known, 1.0):
                ended = standing.state not in ("training", "starting")
                if ended or time.monotonic() - last >= EVERY_S:
                    out.print_line(follow.line(standing))
                    last = time.monotonic()
        if standing.state == "died":
            raise typer.Exit(1)
