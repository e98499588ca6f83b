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


@app.command(
    "convert",
    epilog="Examples:  elva data convert folder ~/Pictures --output data/mine --split test   |   "
    "elva data convert nli nli_for_simcse.csv --output data/nli   |   "
    "elva data convert mteb mbeir_cirr_task7 --output data/cirr --split test",
)
def convert(
    format: Annotated[str, typer.Argument(help="folder, mmeb, mmeb-test, mteb, nli or tevatron.")],
    source: Annotated[Path, typer.Argument(help="A file, or a folder of them.")],
    output: Annotated[Path, typer.Option(help="An absent or empty directory.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    name: Annotated[str | None, typer.Option(help="Of the dataset, in file names.")] = None,
    number: Annotated[int | None, typer.Option(min=0, max=99, help="M-BEIR's number.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What the queries look for.")] = None,
    skip_bad: Annotated[int, typer.Option(min=0, help="Leave out so many bad rows.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write another format's data in M-BEIR's layout, which every command reads."""
    with one_line_errors():
        from elva.data.formats import convert_file

        counts = convert_file(
            format, source, output, split=split, name=name, number=number,
            instruction=instruction, skip_bad=skip_bad,
        )  # fmt: skip
        if as_json:
            print(json.dumps(counts))
            return
        found = ", ".join(f"{task} {count:,}" for task, count in counts["queries"].items())
        out.print(
            f"{output}: queries {found}; {counts['candidates']:,} candidates, "
            f"{counts['pictures']:,} pictures",
            soft_wrap=True,
        )
        _say_bad(counts["bad"])


def _say_bad(bad: list[str]) -> None:
    if bad:
        out.print(f"{len(bad)} bad rows left out:")
    for line in bad:
        out.print(f"  {line}", markup=False, soft_wrap=True)
