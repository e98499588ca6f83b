"""`elva demo`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from elva.cli import options
from elva.cli.console import one_line_errors, out, progress, quiet_libraries

EXAMPLES = (
    "Examples:  elva demo   |   elva demo runs/one   |   elva demo my.index --port 8080 --no-open"
)


def demo(
    target: Annotated[
        Path | None,
        typer.Argument(
            help="An index, or a run: its test pictures; the newest run in runs/ by default.",
            metavar="[INDEX|RUN]",
        ),
    ] = None,
    stage: options.Stage = None,
    model: options.MovedModel = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data whose grains.jsonl names grains; a run's own by default."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Answers a query, 1 to 100.")] = 12,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port; the first free one from 7860 on by default.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Tunnel the page to a public address, by gradio.")
    ] = False,
    show: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open a browser; on a terminal by default."),
    ] = None,
    limit: Annotated[
        int, typer.Option(help="Searches that may wait, 1 or more; further ones are turned away.")
    ] = 16,
    verify: options.Verify = True,
) -> None:
    """Search in a browser, and see which ranks move when a grain of the query is off."""
    with one_line_errors("nothing was changed"):
        quiet_libraries()
        from elva.commands.demo import Server, check, newest_run
        from elva.commands.demo import demo as serve
        from elva.index import Index
        from elva.run import Run

        check()
        target = newest_run() if target is None else target
        is_run = (target / "recipe.yaml").is_file()
        opened = Run.open(target) if is_run else Index(target, verify=verify)
        show = sys.stdout.isatty() if show is None else show
        with progress() as bars:
            serve(
                opened, stage=stage, model=model, data=data, k=k,
                server=Server(host, port, share, show, limit),
                ready=lambda url: bars.say(f"{target}: {url}   (Ctrl-C ends it)"), reporter=bars,
            )  # fmt: skip
        out.print_line("demo: ended")
