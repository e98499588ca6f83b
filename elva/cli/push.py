"""`elva push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elva.cli.console import one_line_errors, out

EXAMPLES = (
    "Examples:  elva push models/one me/one --dry-run   |   elva push models/one me/one --public"
)


def push(
    model: Annotated[Path, typer.Argument(help="Directory of elva export.", metavar="MODEL")],
    repository: Annotated[
        str, typer.Argument(help="Name on the hub, as in user/name.", metavar="REPOSITORY")
    ],
    public: Annotated[
        bool, typer.Option(help="Let everybody read a repository that is made.")
    ] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "",
    dry_run: Annotated[
        bool, typer.Option(help="Print what would be uploaded, and ask no hub.")
    ] = False,
) -> None:
    """Upload a checkpoint and its model card to a model hub."""
    with one_line_errors("run it again: what was uploaded is not uploaded twice"):
        from elva.commands import push as command

        files = command.files_to_push(model)
        command.check_repository(repository)
        if dry_run:
            for path in files:
                size = path.stat().st_size / 1e6
                out.print_line(f"{size:12.3f} MB  {path.relative_to(model)}")
            out.print_line(f"{len(files)} files would go to {repository}")
            return
        address = command.push(model, repository, public=public, message=message)
        out.print_line(f"pushed: {address}")
