"""Arguments and options that several verbs take."""

from pathlib import Path
from typing import Annotated

import typer

from elva.cli.console import named_path

Run = Annotated[Path, typer.Argument(help="A run directory of elva train.", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Index = Annotated[
    Path, typer.Argument(help="An index directory.", metavar="INDEX", parser=named_path)
]
Data = Annotated[Path, typer.Option("--data", help="Data directory in M-BEIR's layout.")]
Split = Annotated[str, typer.Option(help="Split of the data: train, val or test.")]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="Task (t2i) or set (cirr_task7); all by default.")
]
Stage = Annotated[
    str | None, typer.Option(help="Stage or control of a run; the last stage by default.")
]
MovedModel = Annotated[
    Path | None, typer.Option(help="Checkpoint of the index's model, if it was moved.")
]
Verify = Annotated[bool, typer.Option(help="Compare all of the index with its checksums first.")]
SkipBad = Annotated[
    int,
    typer.Option(
        min=0, help="Bad rows and pictures left out and listed, at most; one more is an error."
    ),
]
LeftOut = Annotated[
    Path | None,
    typer.Option(help="File to list what of a folder is left out, and why: a line a file."),
]
Pools = Annotated[str, typer.Option(help="Candidate pools: local (a set's) or global.")]
