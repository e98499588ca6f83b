"""`elva report`."""

from elva.cli.console import RunArgument, one_line_errors, out


def report(run: RunArgument) -> None:
    """Write RUN/report.html and its pictures again from the run's files."""
    with one_line_errors():
        from elva.commands.report import report as write
        from elva.run import Run

        out.print_line(f"report: {write(Run.open(run))}")
