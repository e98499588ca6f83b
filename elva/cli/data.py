"""`elva data`: what is in a data directory, and how other formats become one."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from elva.cli import options
from elva.cli.console import (
    check_sheet,
    choose,
    named_path,
    one_line_errors,
    out,
    print_json,
    progress,
    say,
)
from elva.errors import UserError, counted

PROVED = 1000
"""Ours: queries of a set that `--prove` embeds; its pool's first so many, and their answers."""

app = typer.Typer(help="Data in M-BEIR's layout: made, checked, shown.", no_args_is_help=True)


@app.command("emoji", epilog="Example:  elva data emoji --output data/emoji")
def emoji_corpus(
    output: Annotated[Path, typer.Option(help="Directory to write; absent or empty so far.")],
    size: Annotated[
        int, typer.Option(min=16, max=512, help="Pixels a side of every picture, 16 to 512.")
    ] = 64,
    as_json: options.AsJson = False,
) -> None:
    """Write the embedded emoji corpus in M-BEIR's layout."""
    with one_line_errors():
        from elva.data import emoji

        counts = emoji.write(output, size=size)
        lines = [f"{counts['pictures']} pictures of {counts['entities']} entities in {output}"]
        for task, splits in counts["queries"].items():
            shares = ", ".join(f"{split} {count}" for split, count in splits.items())
            lines.append(f"{task}: {shares}")
        say(counts, [*lines, *counts["notices"], emoji.ATTRIBUTION], as_json)


@app.command(
    "convert",
    epilog="Examples:  elva data convert folder ~/Pictures --output data/mine --split test "
    "--sheet mine.png   |   "
    "elva data convert nli nli_for_simcse.csv --output data/nli   |   "
    "elva data convert mteb mbeir_cirr_task7 --output data/cirr --split test   |   "
    "elva data convert circo CIRCO --output data/circo --split val",
)
def convert(
    format: Annotated[
        str,
        typer.Argument(
            help="Format: beir, folder, mmeb, mmeb-test, mteb, nli or tevatron; or a set that the "
            "paper evaluates on: ccneg, circo, flickr30k, sugarcrepe or urban1k."
        ),
    ],
    source: Annotated[Path, typer.Argument(help="A file, or a folder of them.", parser=named_path)],
    output: Annotated[Path, typer.Option(help="Directory to write; absent or empty so far.")],
    split: options.Split = "train",
    name: Annotated[str | None, typer.Option(help="Name of the dataset, in file names.")] = None,
    number: Annotated[
        int | None,
        typer.Option(
            min=0, max=99_999_999, help="Number of the dataset in M-BEIR's ids, 0 to 99,999,999."
        ),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Instruction before every query: what it looks for.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder that pictures' paths start from (ccneg, circo, flickr30k, mmeb, "
            "mmeb-test, sugarcrepe, tevatron)."
        ),
    ] = None,
    skip_bad: options.SkipBad = 0,
    duplicates: Annotated[
        str,
        typer.Option(help="Pictures of a folder that show what another one shows: keep or drop."),
    ] = "keep",
    list_left_out: options.LeftOut = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Contact sheet (PNG) to write of the pictures that are in.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write another format's data in M-BEIR's layout, which every command reads."""
    with one_line_errors("nothing is written"):
        from elva.data.formats import convert_file
        from elva.data.formats.scan import write_list
        from elva.files import check_file

        if list_left_out is not None and format != "folder":
            raise UserError(f"--list-left-out is for folder, got it for {format}; leave it out")
        if list_left_out is not None:
            check_file(list_left_out, "--list-left-out")
        if sheet is not None:
            check_sheet(sheet)
        with progress(as_json) as bars:
            counts = convert_file(
                format, source, output, split=split, name=name, number=number,
                instruction=instruction, images=images, skip_bad=skip_bad, duplicates=duplicates,
                reporter=bars,
            )  # fmt: skip
        left_out = counts["left_out"]
        if list_left_out is not None:
            write_list(list_left_out, left_out)
        if sheet is not None:
            from elva.commands.inspect import write_sheet

            write_sheet(output, split, sheet, str(source))
        counts |= {"left_out": {why: len(names) for why, names in left_out.items()}}
        found = ", ".join(f"{task} {count:,}" for task, count in counts["queries"].items())
        line = (
            f"{output}: queries {found}; {counted(counts['candidates'], 'candidate')}, "
            f"{counted(counts['pictures'], 'picture')}"
        )
        several = len(counts["sets"]) > len(counts["queries"])
        sets = [f"  {stem}: {n:,}" for stem, n in counts["sets"].items() if several]
        bad = counts["bad"]
        rows = (
            [f"{counted(len(bad), 'bad row')} left out:", *(f"  {row}" for row in bad)]
            if bad
            else []
        )
        made = [f"contact sheet: {sheet}"] if sheet else []
        say(counts, [line, *sets, *counts["notices"], *rows, *made], as_json)


DataArgument = Annotated[Path, typer.Argument(help="Data directory in M-BEIR's layout.")]
AnySplit = Annotated[
    str | None, typer.Option(help="Split of the data: train, val or test; all by default.")
]


@app.command("check", epilog="Examples:  elva data check data/mine   |   "
             "elva data check data/M-BEIR --split test --decode --json   |   "
             "elva data check data/M-BEIR --split test --prove")  # fmt: skip
def check(
    data: DataArgument,
    split: AnySplit = None,
    task: options.Tasks = None,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Decode every picture whole, and count equal ones."),
    ] = False,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Evaluate random embeddings of a part of every set too."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """List bad rows, missing pictures, copies, and what of M-BEIR is not there; exit code 2 for bad
    rows."""
    with one_line_errors():
        from elva.commands import inspect as inspection
        from elva.commands.survey import survey

        card = survey(data)
        with progress(as_json) as bars:
            found = inspection.check(data, split=split, tasks=task, decode=decode, reporter=bars)
            if prove and not found["bad"]:
                found["proof"] = {
                    s: _proof(data, s, task, bars) for s in inspection.splits(data, split)
                }
        found |= {"card": card}
        if as_json:
            print_json(found)
        else:
            out.print(_table(found["sets"]))
            say(found, _lines(found, decode), as_json)
            if "proof" in found:
                out.print(_proof_table(found["proof"]))
        if found["bad"]:
            raise typer.Exit(2)


def _proof(data: Path, split: str, tasks: list[str] | None, bars: Any) -> dict[str, Any]:
    """Figures of random embeddings, read as a model's would be."""
    from elva.commands.evaluate import evaluate_embeddings
    from elva.commands.survey import random_embeddings

    with tempfile.TemporaryDirectory() as place:
        embeddings = Path(place) / "embeddings"
        counts = random_embeddings(data, embeddings, split=split, tasks=tasks, most=PROVED)
        figures = evaluate_embeddings(
            embeddings, data, Path(place) / "evaluation", split=split, tasks=tasks, reporter=bars
        )
    return {"embedded": counts, "sets": figures["sets"]}


def _lines(found: dict[str, Any], decode: bool) -> list[str]:
    compared = "" if decode else " (texts; --decode compares pictures too)"
    rows = [
        f"{counted(len(found['bad']), 'bad row')}, {found['missing_pictures']} of them missing "
        f"pictures; {counted(found['copies'], 'candidate is a copy', 'candidates are copies')} of "
        f"others{compared}",
        *(f"  {line}" for line in found["bad"]),
        *found["notices"],
        *found["missing_folders"],
    ]
    card = found["card"]
    if card:
        rows.append(f"M-BEIR: {len(card['sets'])} of its 16 test sets are whole")
        rows += [f"  {line}" for line in card["missing"]]
        if card["archives"] and found["missing_folders"]:
            rows.append(f"  archives that lie here: {', '.join(card['archives'])}; unpack them")
    return rows


def _proof_table(proof: dict[str, Any]) -> Table:
    shown = Table(title="random embeddings, read as a model's")
    shown.add_column("set")
    for name in ("queries", "hit@k"):
        shown.add_column(name, justify="right")
    for split, found in proof.items():
        for stem, row in found["sets"].items():
            count = found["embedded"][f"mbeir_{stem}_{split}"]
            hit = row.get(f"hit_at_{row['k']}")  # none where the answers are not published
            words = "" if hit is None else f"{100 * hit:.1f}"
            shown.add_row(f"{split} {stem} (k = {row['k']})", f"{count:,}", words)
    return shown


@app.command("subset", epilog="Examples:  elva data subset data/M-BEIR --share 0.01 "
             "--output data/part   |   elva data subset data/M-BEIR --count 500 --per set "
             "--split test --output data/quick")  # fmt: skip
def subset(
    data: DataArgument,
    output: Annotated[Path, typer.Option(help="Directory to write; absent so far.")],
    share: Annotated[
        float | None, typer.Option(help="Share of each group's queries, above 0, at most 1.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Queries of each group instead of a share, 1 or more.")
    ] = None,
    per: Annotated[str, typer.Option(help="Group to draw from: dataset, task or set.")] = "dataset",
    split: AnySplit = None,
    task: options.Tasks = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Write a drawn part of the queries; pools and pictures are links to the whole."""
    with one_line_errors():
        choose("--per", per, ("dataset", "task", "set"))
        from elva.commands.subset import subset as command

        counts = command(
            data, output, share=share, count=count, per=per,  # type: ignore[arg-type]
            split=split, tasks=task, seed=seed,
        )  # fmt: skip
        lines = [
            f"{split} {stem}: {counted(drawn, 'query', 'queries')}"
            for split, sets in counts.items() for stem, drawn in sets.items()
        ]  # fmt: skip
        say(counts, [*lines, f"{output}: pools and pictures are links to {data}"], as_json)


@app.command("stats", epilog="Example:  elva data stats data/emoji --split test")
def stats(
    data: DataArgument,
    split: AnySplit = None,
    task: options.Tasks = None,
    as_json: options.AsJson = False,
) -> None:
    """Count queries, pools, answers and words of every set."""
    with one_line_errors():
        from elva.commands import inspect as inspection

        found = inspection.stats(data, split=split, tasks=task)
        if as_json:
            print_json(found)
        else:
            out.print(_table(found))
            say(found, [line for row in found.values() for line in row["notices"]], as_json)


@app.command("sample", epilog="Example:  elva data sample data/emoji --task it2i --count 8")
def sample(
    data: DataArgument,
    sheet: Annotated[Path, typer.Option(help="Contact sheet (PNG) to write.")] = Path("sample.png"),
    split: options.Split = "test",
    task: Annotated[
        str | None, typer.Option(help="Task (t2i) or set (cirr_task7); all by default.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Queries to show, 1 or more.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Show some queries with their answers."""
    with one_line_errors():
        check_sheet(sheet)
        from elva.commands import inspect as inspection

        rows = inspection.sample(data, sheet, split=split, task=task, count=count, seed=seed)
        lines = []
        for row in rows:
            shown = row["query"] if row["image"] is None else f"{row['image']} {row['query']}"
            lines.append(f"{row['set']} {row['id']}: {shown} -> {row['answer']}")
        say(rows, [*lines, f"contact sheet: {sheet}"], as_json)


def _table(sets: dict[str, dict[str, Any]]) -> Table:
    shown = Table()
    shown.add_column("set")
    for name in ("queries", "pool", "of", "answers", "outside", "negatives", "words"):
        shown.add_column(name, justify="right")
    for stem, row in sets.items():
        shown.add_row(
            stem, f"{row['queries']:,}", f"{row['pool']:,}", row["pool_modality"],
            f"{row['answers']:.1f}", f"{row['outside']:.1f}", f"{row['negatives']:.1f}",
            f"{row['words']:.1f}",
        )  # fmt: skip
    return shown
