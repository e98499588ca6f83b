"""`elva embed`, `index`, `search` and `evaluate`: from files to ranked answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from elva.cli.console import AsJson, err, one_line_errors, out, quiet_libraries

ModelArgument = Annotated[
    str, typer.Argument(help="A run, a Qwen2-VL checkpoint or a hub name.", metavar="MODEL")
]
DataOption = Annotated[Path, typer.Option("--data", help="Data directory in M-BEIR's layout.")]
SplitOption = Annotated[str, typer.Option(help="Split of the data: train, val or test.")]
TaskOption = Annotated[
    list[str] | None, typer.Option("--task", help="Task (t2i) or set (cirr_task7); all by default.")
]
PoolsOption = Annotated[str, typer.Option(help="Candidate pools: local (a set's) or global.")]
IndexArgument = Annotated[Path, typer.Argument(help="An index directory.", metavar="INDEX")]

EMBED_EXAMPLES = (
    "Examples:  elva embed runs/one --data data/emoji --output embeddings   |   "
    "elva embed runs/one --data data/M-BEIR --task cirr_task7 --output embeddings --resume   |   "
    "torchrun --nproc-per-node 8 -m elva embed Qwen/Qwen2-VL-2B-Instruct --data data/M-BEIR "
    "--output embeddings"
)


def embed(
    model: ModelArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Directory for one of each pool and query file.")],
    split: SplitOption = "test",
    task: TaskOption = None,
    sides: Annotated[str, typer.Option(help="Sides to embed: queries, pools or both.")] = "both",
    pools: PoolsOption = "local",
    stage: Annotated[
        str | None, typer.Option(help="Stage or control of a run; the last stage by default.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(help="Embedding: generative (at [RET] after a summary) or prompt (after it)."),
    ] = "generative",
    read: Annotated[
        str, typer.Option(help="Place read: at_ret, or before_ret as LamRA.")
    ] = "at_ret",
    max_completion_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a summary at most; the model's setting by default."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Format: float16, bfloat16 or float32.")] = "float16",
    metadata: Annotated[
        bool,
        typer.Option("--metadata", help="Store src_content's fields, for elva search --where."),
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Items a forward pass.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Items a shard file, 1 or more.")] = 8192,
    skip_bad: Annotated[
        int,
        typer.Option(min=0, help="Bad items to leave out at most."),
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the counts only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Embed the queries and pools of a data directory."""
    with one_line_errors():
        _choose("--sides", sides, ("both", "queries", "pools"))
        _choose("--pools", pools, ("local", "global"))
        _choose("--mode", mode, ("generative", "prompt"))
        _choose("--read", read, ("at_ret", "before_ret"))
        _choose("--dtype", dtype, ("float16", "bfloat16", "float32"))
        quiet_libraries()
        from elva.commands import embed as command
        from elva.model.encoder import Encoder
        from elva.progress import Bars

        which: dict[str, Any] = {"split": split, "tasks": task, "sides": sides, "pools": pools}
        if dry_run:
            counts = command.plan(data, **which)
            _say(counts, [f"{name}: {count:,} items" for name, count in counts.items()], as_json)
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


index_app = typer.Typer(help="Embeddings on disk, searched where they lie.", no_args_is_help=True)


@index_app.command(
    "build",
    epilog="Examples:  elva index build my.index embeddings/mbeir_emoji_task0_cand_pool   |   "
    "elva index build my.index --npy vectors.npy --ids ids.txt --model my-model",
)
def index_build(
    index: IndexArgument,
    embeddings: Annotated[
        list[Path] | None, typer.Argument(help="Directories that elva embed wrote.")
    ] = None,
    npy: Annotated[Path | None, typer.Option(help="Embeddings as a [n, D] .npy file.")] = None,
    ids: Annotated[Path | None, typer.Option(help="Ids of the .npy's rows, one a line.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model that made the .npy.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format to store a .npy in: float16, bfloat16 or float32.")
    ] = "float16",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index that is there, in one step.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make an index of embeddings; nothing is embedded and shards are linked, not copied."""
    with one_line_errors():
        from elva.commands import build_index as indexing

        made = indexing.build(
            index, embeddings or [], npy=npy, ids=ids, model=model, dtype=dtype, overwrite=overwrite
        )
        _say_index(made.info(), as_json)


@index_app.command(
    "add", epilog="Example:  elva index add my.index embeddings/more/mbeir_mine_task0_cand_pool"
)
def index_add(
    index: IndexArgument,
    embeddings: Annotated[list[Path], typer.Argument(help="Directories that elva embed wrote.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace items that are there already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add embeddings; what is there is not written again."""
    with one_line_errors():
        from elva.commands import build_index as indexing

        _say_index(indexing.add(index, embeddings, overwrite=overwrite).info(), as_json)


@index_app.command("delete", epilog="Example:  elva index delete my.index 10:17 10:18")
def index_delete(
    index: IndexArgument,
    ids: Annotated[list[str], typer.Argument(help="Ids of the items to delete.")],
    as_json: AsJson = False,
) -> None:
    """Delete items; their bytes go when the index is built again."""
    with one_line_errors():
        from elva.index import Index

        _say_index(Index(index, verify=False).delete(ids).info(), as_json)


@index_app.command("info", epilog="Example:  elva index info my.index --json")
def index_info(index: IndexArgument, as_json: AsJson = False) -> None:
    """Print what an index holds and which model made it."""
    with one_line_errors():
        from elva.index import Index

        _say_index(Index(index, verify=False).info(), as_json)


@index_app.command("verify", epilog="Example:  elva index verify my.index")
def index_verify(index: IndexArgument, as_json: AsJson = False) -> None:
    """Read every byte of an index and compare it with its checksum."""
    with one_line_errors():
        from elva.index import Index

        info = Index(index).info()
        _say(
            {"whole": True, "bytes": info["bytes"]},
            [f"{index}: {info['items']:,} items, {info['bytes']:,} bytes, every one as written"],
            as_json,
        )


@index_app.command(
    "export",
    epilog="Examples:  elva index export my.index --to faiss-hnsw   |   "
    "elva index export my.index --to milvus:items.db   |   "
    "elva index export my.index --to milvus:http://localhost:19530",
)
def index_export(
    index: IndexArgument,
    to: Annotated[str, typer.Option(help="Engine: faiss-ivf, faiss-hnsw or milvus:URI.")],
    as_json: AsJson = False,
) -> None:
    """Make an approximate or a remote copy, for elva search --engine."""
    with one_line_errors():
        from elva.index import Index
        from elva.index.engines import export

        place = export(Index(index), to)
        _say({"engine": to, "place": place}, [f"{to}: {place}"], as_json)


SEARCH_EXAMPLES = (
    'Examples:  elva search runs/one "woman firefighter"   |   '
    'elva search my.index "with dark skin tone" --image hand.png -k 5 --json   |   '
    'elva search my.index "a dog" --where modality=image'
)


def search(
    target: Annotated[
        Path, typer.Argument(help="An index, or a run: its test pictures.", metavar="INDEX|RUN")
    ],
    query: Annotated[str, typer.Argument(help="Words that the item should show or say.")] = "",
    image: Annotated[Path | None, typer.Option(help="Query picture: JPEG, PNG or WebP.")] = None,
    k: Annotated[int, typer.Option("-k", help="Answers a query, 1 or more.")] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Condition FIELD=VALUE (or != < <= > >=) on a field of the index; all must hold."
        ),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Instruction before the query; the index's by default.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Stage or control of a run; the last stage by default.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint, if it was moved.")] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare all of the index with its checksums first.")
    ] = True,
    engine: Annotated[
        str, typer.Option(help="Engine: exact, or an exported faiss-ivf, faiss-hnsw or milvus:URI.")
    ] = "exact",
    sheet: Annotated[
        Path | None, typer.Option(help="Contact sheet (PNG) to write; RUN/search.png by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the best items for a text, a picture, or both."""
    with one_line_errors():
        quiet_libraries()
        from elva.index import Index
        from elva.progress import Bars
        from elva.run import Run
        from elva.search import condition, write_sheet
        from elva.search import search as find

        is_run = (target / "recipe.yaml").is_file()
        opened = Run.open(target) if is_run else Index(target, verify=verify)
        conditions = [condition(text) for text in where or []]
        with Bars(err if as_json else out) as bars:
            hits = find(
                opened, query, k=k, stage=stage, image=image, where=conditions,
                instruction=instruction, model=model, engine=engine, reporter=bars,
            )  # fmt: skip
        page = sheet or (target / "search.png" if is_run else None)
        if page is not None:
            write_sheet(hits, page, query)
        if as_json:
            print(json.dumps([hit.as_json() for hit in hits]))
            return
        for hit in hits:
            out.print(f"{hit.rank:3d}  {hit.score:.3f}  {hit.name}", markup=False)
        if page is not None:
            out.print(f"contact sheet: {page}", soft_wrap=True)


EVALUATE_EXAMPLES = (
    "Examples:  elva evaluate runs/one   |   elva evaluate runs/one --stage 3 --json   |   "
    "elva evaluate --embeddings embeddings --data data/M-BEIR --output evaluation   |   "
    "elva evaluate --run a.run.trec --qrels a.qrels.txt"
)


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="A run directory of elva train.", metavar="RUN")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Stage or control; all that are trained by default.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Embeddings of elva embed, measured by M-BEIR's protocol.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Embedded data in M-BEIR's layout.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory of TREC runs, qrels and figures; in --embeddings by default."),
    ] = None,
    split: SplitOption = "test",
    task: TaskOption = None,
    pools: PoolsOption = "local",
    skip_bad: Annotated[
        int,
        typer.Option(min=0, help="Bad rows to leave out at most."),
    ] = 0,
    run_file: Annotated[
        Path | None,
        typer.Option("--run", help="Ranked answers to measure: a file in TREC's run format."),
    ] = None,
    qrels: Annotated[Path | None, typer.Option(help="TREC or M-BEIR qrels for --run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a training run's models, embeddings by M-BEIR's protocol, or a TREC run."""
    with one_line_errors():
        from elva.errors import UserError

        if sum(x is not None for x in (run, embeddings, run_file)) != 1:
            raise UserError("evaluate: must be given one of RUN, --embeddings or --run")
        _choose("--pools", pools, ("local", "global"))
        if run_file is not None:
            _evaluate_files(run_file, qrels, as_json)
        elif embeddings is not None:
            which: dict[str, Any] = {
                "split": split,
                "tasks": task,
                "pools": pools,
                "skip_bad": skip_bad,
            }
            _evaluate_embeddings(embeddings, data, output, which, as_json)
        else:
            assert run is not None
            _evaluate_run(run, stage, split, as_json)


def _evaluate_files(run: Path, qrels: Path | None, as_json: bool) -> None:
    from elva.errors import UserError
    from elva.evaluation.protocol import evaluate_files

    if qrels is None:
        raise UserError("evaluate: --run must come with --qrels, got none; name the right answers")
    figures = evaluate_files(run, qrels)
    warnings = figures["ties"]
    rows = [
        f"{k:>14}  {v:.4f}" if isinstance(v, float) else f"{k:>14}  {v}"
        for k, v in figures.items()
        if k != "ties"
    ]
    _say(figures, [*rows, *(f"warning: {line}" for line in warnings)], as_json)


def _evaluate_embeddings(
    embeddings: Path, data: Path | None, output: Path | None, which: dict[str, Any], as_json: bool
) -> None:
    from elva.errors import UserError
    from elva.evaluation.protocol import evaluate_embeddings, table
    from elva.progress import Bars

    if data is None:
        raise UserError("evaluate: --embeddings must come with --data, got none; name the data")
    where = output or embeddings / f"evaluation-{which['split']}-{which['pools']}"
    with Bars(err if as_json else out) as bars:
        result = evaluate_embeddings(embeddings, data, where, **which, reporter=bars)
    if as_json:
        print(json.dumps(result))
        return
    out.print(table(result))
    for line in result["ties"]:
        out.print(f"warning: {line}", markup=False, soft_wrap=True)
    for line in result["skipped"]:
        out.print(f"skipped: {line}", markup=False, soft_wrap=True)
    out.print(f"runs, qrels and figures: {where}", soft_wrap=True)


def _evaluate_run(run: Path, stage: list[str] | None, split: str, as_json: bool) -> None:
    quiet_libraries()
    from elva.evaluation.trained import evaluate as measure
    from elva.progress import Bars
    from elva.report.table import as_json as figures
    from elva.report.table import table
    from elva.run import Run

    opened = Run.open(run)
    with Bars(err if as_json else out) as bars:
        measure(opened, bars, stage or None, split=split)
    if as_json:
        print(json.dumps(figures(opened)))
    else:
        out.print(table(opened))


def _choose(option: str, value: str, allowed: tuple[str, ...]) -> None:
    from elva.errors import UserError

    if value not in allowed:
        raise UserError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def _say(data: Any, lines: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(data))
        return
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def _say_index(info: dict[str, Any], as_json: bool) -> None:
    model = info["model"]
    lines = [
        f"{info['directory']}: {info['items']:,} items of {info['dim']} {info['dtype']}, "
        f"{info['segments']} segments, {info['bytes']:,} bytes, {info['deleted']:,} deleted",
        f"model: {model['name']} ({model['revision'][:12]}, {model['preprocessing'][:12]})",
        "fields: " + ", ".join(f"{name} ({kind})" for name, kind in info["fields"].items()),
    ]
    _say(info, lines, as_json)
