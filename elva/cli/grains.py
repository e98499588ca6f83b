"""`elva grains`."""

from pathlib import Path
from typing import Annotated

import typer

from elva.cli import options
from elva.cli.console import one_line_errors, out, print_json, progress, quiet_libraries

EXAMPLES = (
    "Examples:  elva grains runs/one --data data/emoji --output grains   |   "
    "elva grains runs/one/stage-2/model runs/one/stage-3/model --data data/emoji --output grains"
)


def grains(
    models: Annotated[
        list[str], typer.Argument(help="Runs, checkpoints or hub names: before, after, ...")
    ],
    data: Annotated[Path, typer.Option(help="Data in M-BEIR's layout with grains.jsonl.")],
    output: Annotated[Path, typer.Option(help="Directory for grains.json and two charts.")],
    split: options.Split = "test",
    task: Annotated[str, typer.Option(help="Task (t2i) or set of the queries.")] = "t2i",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Queries to probe at most, 1 or more.")
    ] = None,
    delta: Annotated[
        float, typer.Option(help="Cosine distance below which a grain is not seen.")
    ] = 0.05,
    show: Annotated[
        int, typer.Option(min=0, help="Queries to print, the least seen first, 0 or more.")
    ] = 10,
    max_completion_length: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens of a summary at most; the model's setting by default."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Mask one grain a query: how far does the embedding move?"""
    with one_line_errors():
        quiet_libraries()
        from elva.commands import grains as probe
        from elva.model.encoder import open_encoder

        opened = [
            (name, open_encoder(name, max_completion_length=max_completion_length))
            for name in models
        ]
        with progress(as_json) as bars:
            found = probe.grains(
                opened, data, output, split=split, task=task, limit=limit, delta=delta,
                reporter=bars,
            )  # fmt: skip
        if as_json:
            print_json(found)
            return
        out.print(probe.table(found))
        last = found["models"][models[-1]]
        for one in last["queries"][:show]:
            out.print_line(
                f"{one['distance']:.3f}  {one['text']}  without  {one['grain']} ({one['type']})"
            )
        out.print_line(f"figures and pictures: {output}")
