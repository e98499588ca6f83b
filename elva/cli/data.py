"""`elva data`: what is in a data directory, and how other formats become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from elva.cli.console import AsJson, err, one_line_errors, out

app = typer.Typer(help="Data in M-BEIR's layout: made, checked, shown.", no_args_is_help=True)


@app.command("emoji", epilog="Example:  elva data emoji --output data/emoji")
def emoji_corpus(
    output: Annotated[Path, typer.Option(help="Directory to write; absent or empty so far.")],
    size: Annotated[int, typer.Option(min=16, max=512, help="Pixels a side, 16 to 512.")] = 64,
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
    output: Annotated[Path, typer.Option(help="Directory to write; absent or empty so far.")],
    split: Annotated[str, typer.Option(help="Split of the data: train, val or test.")] = "train",
    name: Annotated[str | None, typer.Option(help="Name of the dataset, in file names.")] = None,
    number: Annotated[
        int | None,
        typer.Option(min=0, max=99, help="Number of the dataset in M-BEIR's ids, 0 to 99."),
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Instruction of the queries.")] = None,
    skip_bad: Annotated[
        int,
        typer.Option(min=0, help="Bad rows to leave out at most."),
    ] = 0,
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


DataArgument = Annotated[Path, typer.Argument(help="Data directory in M-BEIR's layout.")]
AnySplit = Annotated[
    str | None, typer.Option(help="Split of the data: train, val or test; all by default.")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="Task (t2i) or set (cirr_task7); all by default.")
]


@app.command("check", epilog="Examples:  elva data check data/mine   |   "
             "elva data check data/M-BEIR --split test --decode --json")  # fmt: skip
def check(
    data: DataArgument,
    split: AnySplit = None,
    task: Tasks = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture whole.")] = False,
    as_json: AsJson = False,
) -> None:
    """List every bad row, missing picture and copy; exit code 2 if a row is bad."""
    with one_line_errors():
        from elva.commands import inspect as inspection
        from elva.progress import Bars

        with Bars(err if as_json else out) as bars:
            found = inspection.check(data, split=split, tasks=task, decode=decode, reporter=bars)
        if as_json:
            print(json.dumps(found))
        else:
            out.print(_table(found["sets"]))
            out.print(
                f"{len(found['bad'])} bad rows, {found['missing_pictures']} of them missing "
                f"pictures; {found['copies']} candidates are copies of others"
            )
            for line in found["bad"]:
                out.print(f"  {line}", markup=False, soft_wrap=True)
        if found["bad"]:
            raise typer.Exit(2)


@app.command("stats", epilog="Example:  elva data stats data/emoji --split test")
def stats(
    data: DataArgument, split: AnySplit = None, task: Tasks = None, as_json: AsJson = False
) -> None:
    """Count queries, pools, answers and words of every set."""
    with one_line_errors():
        from elva.commands import inspect as inspection

        found = inspection.stats(data, split=split, tasks=task)
        if as_json:
            print(json.dumps(found))
        else:
            out.print(_table(found))


@app.command("sample", epilog="Example:  elva data sample data/emoji --task it2i --count 8")
def sample(
    data: DataArgument,
    sheet: Annotated[Path, typer.Option(help="Contact sheet (PNG) to write.")] = Path("sample.png"),
    split: Annotated[str, typer.Option(help="Split of the data: train, val or test.")] = "test",
    task: Annotated[
        str | None, typer.Option(help="Task (t2i) or set (cirr_task7); all by default.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Queries to show, 1 or more.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show some queries with their answers."""
    with one_line_errors():
        from elva.commands import inspect as inspection

        rows = inspection.sample(data, sheet, split=split, task=task, count=count, seed=seed)
        if as_json:
            print(json.dumps(rows))
            return
        for row in rows:
            shown = row["query"] if row["image"] is None else f"{row['image']} {row['query']}"
            out.print(f"{row['set']} {row['id']}: {shown} -> {row['answer']}",
                      markup=False, soft_wrap=True)  # fmt: skip
        out.print(f"contact sheet: {sheet}", soft_wrap=True)


def _table(sets: dict[str, dict[str, Any]]) -> Table:
    shown = Table()
    shown.add_column("set")
    for name in ("queries", "pool", "of", "answers", "negatives", "words"):
        shown.add_column(name, justify="right")
    for stem, row in sets.items():
        shown.add_row(
            stem, f"{row['queries']:,}", f"{row['pool']:,}", row["pool_modality"],
            f"{row['answers']:.1f}", f"{row['negatives']:.1f}", f"{row['words']:.1f}",
        )  # fmt: skip
    return shown


def _say_bad(bad: list[str]) -> None:
    if bad:
        out.print(f"{len(bad)} bad rows left out:")
    for line in bad:
        out.print(f"  {line}", markup=False, soft_wrap=True)
