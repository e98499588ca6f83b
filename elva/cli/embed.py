"""`elva embed`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from elva.cli import options
from elva.cli.console import (
    choose,
    one_line_errors,
    out,
    print_json,
    progress,
    quiet_libraries,
    say,
)
from elva.errors import counted

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A run, a checkpoint or a hub name: ELVA's, Qwen-VL's, or of sentence-transformers.",
        metavar="MODEL",
    ),
]

EXAMPLES = (
    "Examples:  elva embed runs/one --data data/emoji --output embeddings   |   "
    "elva embed runs/one --data data/M-BEIR --task cirr_task7 --output embeddings --resume   |   "
    "torchrun --nproc-per-node 8 -m elva embed Qwen/Qwen2-VL-2B-Instruct --data data/M-BEIR "
    "--output embeddings"
)


def embed(
    model: ModelArgument,
    data: options.Data,
    output: Annotated[
        Path, typer.Option(help="Directory for a subdirectory a pool and query file.")
    ],
    split: options.Split = "test",
    task: options.Tasks = None,
    sides: Annotated[str, typer.Option(help="Sides to embed: queries, pools or both.")] = "both",
    pools: options.Pools = "local",
    stage: options.Stage = None,
    mode: Annotated[
        str,
        typer.Option(help="Embedding: generative (at [RET] after a summary) or prompt (after it)."),
    ] = "generative",
    read: Annotated[
        str, typer.Option(help="Hidden state to read: at_ret, or before_ret as in LamRA.")
    ] = "at_ret",
    max_completion_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a summary at most; the model's setting by default."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format to store: float16, bfloat16 or float32.")
    ] = "float16",
    metadata: Annotated[
        bool,
        typer.Option("--metadata", help="Store src_content's fields, for elva search --where."),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Items a forward pass, 1 or more.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Items a shard file, 1 or more.")] = 8192,
    skip_bad: options.SkipBad = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what was interrupted in --output.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the items to embed; embed nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Embed the queries and pools of a data directory."""
    with one_line_errors():
        choose("--sides", sides, ("both", "queries", "pools"))
        choose("--pools", pools, ("local", "global"))
        choose("--mode", mode, ("generative", "prompt"))
        choose("--read", read, ("at_ret", "before_ret"))
        choose("--dtype", dtype, ("float16", "bfloat16", "float32"))
        quiet_libraries()
        from elva.commands import embed as command
        from elva.model.encoder import open_encoder

        which: dict[str, Any] = {"split": split, "tasks": task, "sides": sides, "pools": pools}
        if dry_run:
            counts = command.plan(data, **which)
            say(
                counts,
                [f"{name}: {counted(count, 'item')}" for name, count in counts.items()],
                as_json,
            )
            return
        first = os.environ.get("RANK", "0") == "0"
        out.quiet = not first  # of a launcher's processes, which take shards in turns
        encoder = open_encoder(
            model,
            stage=stage,
            max_completion_length=0 if mode == "prompt" else max_completion_length,
            read=read,  # type: ignore[arg-type]
            batch_size=batch_size,
        )
        with progress(as_json) as bars:
            done = command.embed(
                encoder, data, output, **which, dtype=dtype, metadata=metadata, resume=resume,
                shard_rows=shard_size, skip_bad=skip_bad, reporter=bars,
            )  # fmt: skip
        if as_json and first:
            print_json({str(one.directory): one.items for one in done})
