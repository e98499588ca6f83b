"""`elva mrbench`."""

from pathlib import Path
from typing import Annotated

import typer

from elva.cli import options
from elva.cli.console import one_line_errors, progress, quiet_libraries, say

app = typer.Typer(
    help="Queries of two and more grains, judged and reviewed (rebuilt, not the paper's list).",
    no_args_is_help=True,
)


@app.command(
    "build",
    epilog="Examples:  elva mrbench build --data data/emoji --output data/mrbench   |   "
    "elva mrbench build --data data/M-BEIR --judge http://localhost:8000/v1 "
    "--judge-model Qwen/Qwen2.5-VL-7B-Instruct --output data/mrbench",
)
def build(
    data: options.Data,
    output: Annotated[Path, typer.Option(help="Directory to write; absent so far.")],
    judge: Annotated[
        str, typer.Option(help="Judge: rules (offline), local, or the URL of an OpenAI server.")
    ] = "rules",
    judge_model: Annotated[
        str | None,
        typer.Option(
            help="Model of the judge: for local a checkpoint or hub name, else the server's."
        ),
    ] = None,
    describe: Annotated[
        str | None, typer.Option(help="Run or checkpoint whose summaries put pictures in words.")
    ] = None,
    split: options.Split = "test",
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Set (cirr_task7); the paper's four by default."),
    ] = None,
    per_set: Annotated[int, typer.Option(min=1, help="Queries a set to keep, 1 or more.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    skip_bad: options.SkipBad = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a build that was interrupted.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Judge queries, sample them, and write data with a page to review."""
    with one_line_errors():
        quiet_libraries()
        from elva.commands import mrbench
        from elva.model.encoder import RetrieverEncoder
        from elva.mrbench.judges import judge_of
        from elva.mrbench.review import PAGE

        asked = judge_of(judge, judge_model)
        words = None
        if describe is not None:
            encoder = RetrieverEncoder.open(describe)
            words = lambda query: encoder([query]).summaries[0]  # noqa: E731
        with progress(as_json) as bars:
            notes = mrbench.build(
                data, output, asked, split=split, sets=task, per_set=per_set, seed=seed,
                resume=resume, skip_bad=skip_bad, describe=words, reporter=bars,
            )  # fmt: skip
        lines = [
            f"{stem}: {c['kept']} kept; {c['judged']} judged, {c['one_grain']} of one grain, "
            f"{c['without_words']} without words"
            for stem, c in notes["sets"].items()
        ]
        say(notes, [*lines, f"review: {output / PAGE}"], as_json)


@app.command(
    "review",
    epilog="Examples:  elva mrbench review data/mrbench   |   "
    "elva mrbench review data/mrbench --decisions ~/Downloads/review.tsv",
)
def review(
    directory: Annotated[Path, typer.Argument(help="Directory that elva mrbench build wrote.")],
    decisions: Annotated[
        Path | None, typer.Option(help="Decisions: a review.tsv as the page saves it.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Take decisions: dropped queries leave the data until a later review keeps them."""
    with one_line_errors():
        from elva.commands import mrbench
        from elva.mrbench.review import PAGE

        tally = mrbench.review(directory, decisions)
        line = f"{tally['keep']} kept, {tally['drop']} dropped, {tally['undecided']} to decide"
        say(tally, [f"{line}: {directory / PAGE}"], as_json)
