"""`elva export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elva.cli import options
from elva.cli.console import one_line_errors, out, quiet_libraries

EXAMPLES = (
    "Examples:  elva export runs/one --output models/one   |   "
    "elva export runs/one --stage 2 --output models/two"
)


def export(
    model: Annotated[str, typer.Argument(help="Run, checkpoint or hub name.", metavar="MODEL")],
    output: Annotated[Path, typer.Option(help="Directory to write; it must not exist yet.")],
    stage: options.Stage = None,
) -> None:
    """Write a model as one ordinary checkpoint in fp32, its adapter merged, which transformers and
    sentence-transformers load, with a model card."""
    with one_line_errors():
        quiet_libraries()
        from elva.commands.export import export as write

        out.print_line(f"model: {write(model, output, stage=stage)}")
