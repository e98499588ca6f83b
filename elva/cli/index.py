"""`elva index`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from elva.cli import options, sync
from elva.cli.console import (
    choose,
    named_path,
    one_line_errors,
    out,
    progress,
    quiet_libraries,
    say,
)
from elva.errors import UserError, counted
from elva.files import check_file

app = typer.Typer(help="Embeddings on disk, searched where they lie.", no_args_is_help=True)


@app.command(
    "build",
    epilog="Examples:  elva index build my.index embeddings/mbeir_emoji_task0_cand_pool   |   "
    "elva index build my.index --folder ~/Pictures --model runs/one   |   "
    "elva index build my.index --npy vectors.npy --ids ids.txt --model my-model",
)
def build(
    index: options.Index,
    embeddings: Annotated[
        list[Path] | None, typer.Argument(help="Directories that elva embed wrote.")
    ] = None,
    npy: Annotated[
        Path | None, typer.Option(help="Embeddings of any origin: a [n, D] .npy file.")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Ids of the .npy's rows: a text file, one a line.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures to embed, under their own names.",
            parser=named_path,
            metavar="PATH",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that embeds the folder: a run, a checkpoint or a hub name; of a .npy the "
            "name of the model that made it."
        ),
    ] = None,
    skip_bad: options.SkipBad = 0,
    list_left_out: options.LeftOut = None,
    dtype: Annotated[
        str,
        typer.Option(help="Number format of a .npy or folder: float16, bfloat16 or float32."),
    ] = "float16",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index that is there, in one step.")
    ] = False,
    codes: Annotated[
        bool,
        typer.Option(
            help="8-bit codes beside the rows: a byte a number more, read in their place."
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what of the folder is embedded; embed nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make an index: of embeddings, whose shards are linked, not copied, or of a folder's pictures,
    which are embedded; a killed one goes on where it was."""
    with one_line_errors("call it again, and a folder's goes on where it was"):
        if folder is not None:
            if embeddings or npy or ids:
                raise UserError("index: --folder must come alone, got embeddings too; leave one")
            _build_folder(
                index, folder, model, dtype=dtype, overwrite=overwrite, codes=codes,
                skip_bad=skip_bad, list_left_out=list_left_out, dry_run=dry_run, as_json=as_json,
            )  # fmt: skip
            return
        if skip_bad or list_left_out or dry_run:
            raise UserError("index: --skip-bad, --list-left-out and --dry-run are for --folder")
        from elva.commands import build_index as indexing

        with progress(as_json) as bars:
            made = indexing.build(
                index, embeddings or [], npy=npy, ids=ids, model=model, dtype=dtype,
                overwrite=overwrite, codes=codes, reporter=bars,
            )  # fmt: skip
        _say_index(made.info(), as_json)


def _build_folder(
    index: Path,
    folder: Path,
    model: str | None,
    *,
    list_left_out: Path | None,
    dry_run: bool,
    as_json: bool,
    dtype: str,
    **options: Any,
) -> None:
    choose("--dtype", dtype, ("float16", "bfloat16", "float32"))
    if model is None:
        raise UserError("index: --folder must come with --model, got none; name the model")
    from elva.data.formats.scan import write_list

    if list_left_out is not None:
        check_file(list_left_out, "--list-left-out")
    if dry_run:
        from elva.data.formats.folder import contents
        from elva.data.strict import Faults

        there = contents(folder, Faults(options["skip_bad"]))
        if list_left_out is not None:
            write_list(list_left_out, there.left_out)
        counts = {why: len(names) for why, names in there.left_out.items()}
        line = f"{counted(len(there.pictures), 'picture')} to embed"
        say({"pictures": len(there.pictures), "left_out": counts}, [line, *there.notices], as_json)
        return
    quiet_libraries()
    from elva.commands.index_folder import build as build_folder
    from elva.commands.index_folder import check
    from elva.model.encoder import open_encoder

    check(index, folder, overwrite=options["overwrite"])
    with progress(as_json) as bars:
        made, found = build_folder(
            index, folder, open_encoder(model), dtype=dtype, reporter=bars, **options
        )
    if list_left_out is not None:
        write_list(list_left_out, found["left_out"])
    found["left_out"] = {why: len(names) for why, names in found["left_out"].items()}
    bad = [
        f"{counted(len(found['bad']), 'bad one')} left out:",
        *(f"  {row}" for row in found["bad"]),
    ]
    _say_index({**made.info(), **found}, as_json, bad if found["bad"] else [])


@app.command(
    "add", epilog="Example:  elva index add my.index embeddings/more/mbeir_mine_task0_cand_pool"
)
def add(
    index: options.Index,
    embeddings: Annotated[list[Path], typer.Argument(help="Directories that elva embed wrote.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace items that are there already.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Add embeddings; what is there is not written again."""
    with one_line_errors():
        from elva.commands import build_index as indexing

        with progress(as_json) as bars:
            made = indexing.add(index, embeddings, overwrite=overwrite, reporter=bars)
        _say_index(made.info(), as_json)


@app.command("delete", epilog="Example:  elva index delete my.index 10:17 10:18")
def delete(
    index: options.Index,
    ids: Annotated[list[str], typer.Argument(help="Ids of the items to delete.")],
    as_json: options.AsJson = False,
) -> None:
    """Delete items; their bytes go by elva index compact."""
    with one_line_errors():
        from elva.index import Index

        _say_index(Index(index, verify=False).delete(ids).info(), as_json)


app.command("sync", epilog=sync.EXAMPLES)(sync.sync)


@app.command("compact", epilog="Example:  elva index compact my.index")
def compact(
    index: options.Index,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would save and write nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an index anew as one segment without its deleted items, in one step: killed at any
    moment it is as it was, and the next call does it."""
    with one_line_errors():
        from elva.index import Index
        from elva.index import compact as compacting

        before = Index(index, verify=False).info()
        if dry_run:
            line = (
                f"{index}: {before['segments']} segments, {before['deleted']:,} deleted items of "
                f"{_size(before['deleted_bytes'])}"
            )
            say(before, [line], as_json)
            return
        with progress(as_json) as bars:
            after = compacting.compact(index, bars).info()
        if not as_json:
            out.print_line(
                f"{index}: {_size(before['bytes'])} and {before['segments']} segments before, "
                f"{_size(after['bytes'])} and {after['segments']} now"
            )
        _say_index(after, as_json)


@app.command("codes", epilog="Example:  elva index codes my.index")
def codes(index: options.Index, as_json: options.AsJson = False) -> None:
    """Put 8-bit codes beside all rows, which exact search reads in their place; damaged ones are
    made again."""
    with one_line_errors():
        from elva.index import Index

        with progress(as_json) as bars:
            made = Index.with_codes(index, bars)
        _say_index(made.info(), as_json)


@app.command("info", epilog="Example:  elva index info my.index --json")
def info(index: options.Index, as_json: options.AsJson = False) -> None:
    """Print what an index holds and which model made it."""
    with one_line_errors():
        from elva.index import Index

        _say_index(Index(index, verify=False).info(), as_json)


@app.command("verify", epilog="Example:  elva index verify my.index")
def verify(index: options.Index, as_json: options.AsJson = False) -> None:
    """Read every byte of an index and compare it with its checksum."""
    with one_line_errors():
        from elva.index import Index

        began = time.perf_counter()
        opened = Index(index, verify=False)
        with progress(as_json) as bars:
            opened.verify(bars)
            bars.finish("")
        info, seconds = opened.info(), time.perf_counter() - began
        say(
            {"whole": True, "bytes": info["bytes"], "seconds": seconds},
            [
                f"{index}: {info['items']:,} items, {info['bytes']:,} bytes, every one as written; "
                f"{info['bytes'] / seconds / 1e6:,.0f} MB/s"
            ],
            as_json,
        )


@app.command(
    "export",
    epilog="Examples:  elva index export my.index --to faiss-hnsw   |   "
    "elva index export my.index --to milvus:items.db   |   "
    "elva index export my.index --to milvus:http://localhost:19530",
)
def export(
    index: options.Index,
    to: Annotated[
        str, typer.Option(help="Engine to copy to: faiss-ivf, faiss-hnsw or milvus:URI.")
    ],
    as_json: options.AsJson = False,
) -> None:
    """Make an approximate or a remote copy, for elva search --engine."""
    with one_line_errors():
        from elva.index import Index
        from elva.index.engines import export

        place = export(Index(index), to)
        engine = to.partition(":")[0]  # an address may hold a password
        say({"engine": engine, "place": place}, [f"{engine}: {place}"], as_json)


def _say_index(info: dict[str, Any], as_json: bool, more: Sequence[str] = ()) -> None:
    model = info["model"]
    parts = {"rows": "rows", "fields": "ids and fields", "codes": "codes"}
    sizes = [f"{_size(info[f'{key}_bytes'])} {words}" for key, words in parts.items()]
    deleted = f"{info['deleted']:,} deleted"
    if info["deleted"]:
        deleted += f" ({_size(info['deleted_bytes'])}, elva index compact frees them)"
    lines = [
        f"{info['directory']}: {info['items']:,} items of {info['dim']} {info['dtype']}, "
        f"{info['segments']} segments, {info['bytes']:,} bytes, {deleted}",
        "sizes: " + ", ".join(sizes),
        f"model: {model['name']} ({model['revision'][:12]}, {model['preprocessing'][:12]})",
        "fields: " + ", ".join(f"{name} ({kind})" for name, kind in info["fields"].items()),
    ]
    if isinstance(info["trained_on"], list) and info["trained_on"]:
        lines.insert(3, f"trained on: {', '.join(map(str, info['trained_on']))} alone")
    if info["folder"]:
        lines.insert(3, f"folder: {info['folder']}")
    for name, kinds in info["conflicts"].items():
        lines.append(f"field {name} is left out: {kinds}; delete the items of one of them")
    say(info, [*lines, *more], as_json)


def _size(count: int) -> str:
    """Bytes as people read them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
