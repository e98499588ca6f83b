"""`elva embed`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from elva.cli.console import (
    AsJson,
    DataOption,
    PoolsOption,
    SplitOption,
    TaskOption,
    choose,
    err,
    one_line_errors,
    out,
    quiet_libraries,
    say,
)

ModelArgument = Annotated[
    str, typer.Argument(help="A run, a Qwen2-VL checkpoint or a hub name.", metavar="MODEL")
]

EXAMPLES = (
    "Examples:  elva embed runs/one --data data/emoji --output embeddings   |   "
    "elva embed runs/one --data data/M-BEIR --task cirr_task7 --output embeddings --resume   |   "
    "torchrun --nproc-per-node 8 -m elva embed Qwen/Qwen2-VL-2B-Instruct --data data/M-BEIR "
    "--output embeddings"
)


def embed(
    model: ModelArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Gets a directory for each pool and query file.")],
    split: SplitOption = "test",
    task: TaskOption = None,
    sides: Annotated[str, typer.Option(help="queries, pools or both.")] = "both",
    pools: PoolsOption = "local",
    stage: Annotated[str | None, typer.Option(help="Of a run; the last by default.")] = None,
    mode: Annotated[
        str, typer.Option(help="generative: at [RET] after a summary; prompt: after the prompt.")
    ] = "generative",
    read: Annotated[str, typer.Option(help="at_ret, or before_ret as LamRA does.")] = "at_ret",
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a summary; the model's own by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Keep src_content's fields, for --where.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Items at once.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Items a shard.")] = 8192,
    skip_bad: Annotated[int, typer.Option(min=0, help="Leave out so many bad items.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what it would do.")
    ] = False,
    as_json: AsJson = False,
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
        from elva.model.encoder import Encoder
        from elva.progress import Bars

        which: dict[str, Any] = {"split": split, "tasks": task, "sides": sides, "pools": pools}
        if dry_run:
            counts = command.plan(data, **which)
            say(counts, [f"{name}: {count:,} items" for name, count in counts.items()], as_json)
            return
        encoder = Encoder.open(
            model,
            stage=stage,
            max_completion_length=0 if mode == "prompt" else max_completion_length,
            read=read,  # type: ignore[arg-type]
            batch_size=batch_size,
        )
        with Bars(err if as_json else out) as bars:
            done = command.embed(
                encoder, data, output, **which, dtype=dtype, metadata=metadata, resume=resume,
                shard_rows=shard_size, skip_bad=skip_bad, reporter=bars,
            )  # fmt: skip
        if as_json:
            print(json.dumps({str(one.directory): one.items for one in done}))
