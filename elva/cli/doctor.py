"""`elva doctor`."""

from __future__ import annotations

from elva.cli import options
from elva.cli.console import one_line_errors, out, print_json

EXAMPLES = "Examples:  elva doctor   |   elva doctor --json"


def doctor(as_json: options.AsJson = False) -> None:
    """Print versions, the backends that run here, and the extras that are installed."""
    with one_line_errors():
        from elva.commands import doctor as command

        found = command.doctor()
        if as_json:
            print_json(found, default=str)
            return
        for line in command.lines(found):
            out.print_line(line)
