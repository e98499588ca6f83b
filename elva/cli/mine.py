"""`elva mine`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from elva.cli import options
from elva.cli.console import one_line_errors, progress, say

EXAMPLES = (
    "Examples:  elva mine --embeddings embeddings --data data/emoji --output data/mined   |   "
    "elva mine --embeddings embeddings --data data/M-BEIR --max-score 0.9 --num-negatives 50 "
    "--num-random 50 --output data/mined --dry-run"
)


def mine(
    data: options.Data,
    embeddings: Annotated[Path, typer.Option(help="Embeddings of --data by elva embed.")],
    output: Annotated[
        Path, typer.Option(help="Directory to write the mined data to; absent so far.")
    ],
    split: options.Split = "train",
    task: options.Tasks = None,
    num_negatives: Annotated[int, typer.Option(help="Hard negatives a query, 0 or more.")] = 50,
    num_random: Annotated[int, typer.Option(help="Random negatives a query, 0 or more.")] = 50,
    max_score: Annotated[
        float, typer.Option(help="Cosine similarity above which a candidate is no negative.")
    ] = 0.99,
    min_score: Annotated[
        float | None,
        typer.Option(help="Cosine similarity below which a candidate is no hard negative."),
    ] = None,
    absolute_margin: Annotated[
        float | None,
        typer.Option(help="Cosine similarity by which a hard negative is below the positive."),
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="The same margin as a share of the positive's similarity.")
    ] = None,
    range_min: Annotated[
        int, typer.Option(help="Most similar negatives to leave out, 0 or more.")
    ] = 0,
    range_max: Annotated[
        int | None, typer.Option(help="Most similar negatives to choose from, at most.")
    ] = None,
    sampling_strategy: Annotated[
        str, typer.Option(help="Hard negatives to take: top, or random in range.")
    ] = "top",
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    skip_bad: options.SkipBad = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the work and its size; mine nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the data again with each query's hardest and some random negatives."""
    with one_line_errors():
        from elva.commands import mine as command

        settings = command.Mining(
            num_negatives, num_random, max_score, min_score, absolute_margin, relative_margin,
            range_min, range_max, sampling_strategy, seed,
        )  # fmt: skip
        if dry_run:
            planned = command.plan(data, settings, split=split, tasks=task, skip_bad=skip_bad)
            lines = [
                f"{stem}: {row['queries']:,} queries x {row['pool']:,} candidates, "
                f"{row['negatives']:,} negatives, {row['multiply_adds'] / 1e12:.3g} T "
                f"multiply-adds at D = 1536, {row['bytes'] / 1e9:.2f} GB at most"
                for stem, row in planned.items()
            ]
            say(planned, lines, as_json)
            return
        with progress(as_json) as bars:
            counts = command.mine(
                embeddings, data, output, settings, split=split, tasks=task, skip_bad=skip_bad,
                reporter=bars,
            )  # fmt: skip
        lines = [
            f"{stem}: {c.queries:,} queries, {c.hard:,} hard and {c.random:,} random "
            f"negatives; {c.same_content:,} copies left out; {c.short:,} queries with fewer hard "
            "ones than asked"
            for stem, c in counts.items()
        ]
        lines.append(f"{output}: load it as --data, or train with --set stages.3.data={output}")
        say({stem: asdict(c) for stem, c in counts.items()}, lines, as_json)
