"""`elva data`: what is in a data directory, and how other formats become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elva.cli.console import AsJson, one_line_errors, out

app = typer.Typer(help="Data in M-BEIR's layout.", no_args_is_help=True)


@app.command("emoji", epilog="Example:  elva data emoji --output data/emoji")
def emoji_corpus(
    output: Annotated[Path, typer.Option(help="An absent or empty directory.")],
    size: Annotated[int, typer.Option(min=16, max=512, help="Pixels a side.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Write the embedded emoji corpus in M-BEIR's layout."""
    with one_line_errors():
        from elva.data import emoji

        counts = emoji.write(output, size=size)
        if as_json:
            print(json.dumps(counts))
            return
        out.print(f"{counts['pictures']} pictures of {counts['entities']} entities in {output}")
        for task, splits in counts["queries"].items():
            shares = ", ".join(f"{split} {count}" for split, count in splits.items())
            out.print(f"{task}: {shares}", markup=False)
        for notice in counts["notices"]:
            out.print(notice, soft_wrap=True, markup=False)
        out.print(emoji.ATTRIBUTION, soft_wrap=True, markup=False)
