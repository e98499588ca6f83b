"""`elva search`."""

from pathlib import Path
from typing import Annotated

import typer

from elva.cli import options
from elva.cli.console import (
    check_sheet,
    one_line_errors,
    out,
    print_json,
    progress,
    quiet_libraries,
)

EXAMPLES = (
    'Examples:  elva search runs/one "woman firefighter"   |   '
    'elva search my.index "with dark skin tone" --image hand.png -k 5 --json   |   '
    'elva search my.index "a dog" --where modality=image'
)


def search(
    target: Annotated[
        Path, typer.Argument(help="An index, or a run: its test pictures.", metavar="INDEX|RUN")
    ],
    query: Annotated[
        str, typer.Argument(help="Query words: what the item should show or say.")
    ] = "",
    image: Annotated[
        Path | None,
        typer.Option(help="Query picture: a file of any format that pictures are read from."),
    ] = None,
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
    stage: options.Stage = None,
    model: options.MovedModel = None,
    verify: options.Verify = True,
    engine: Annotated[
        str, typer.Option(help="Engine: exact, or an exported faiss-ivf, faiss-hnsw or milvus:URI.")
    ] = "exact",
    sheet: Annotated[
        Path | None, typer.Option(help="Contact sheet (PNG) to write; RUN/search.png by default.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the best items for a text, a picture, or both."""
    with one_line_errors():
        quiet_libraries()
        from elva.commands.search import condition, write_sheet
        from elva.commands.search import search as find
        from elva.index import Index
        from elva.run import Run

        if sheet is not None:
            check_sheet(sheet)
        is_run = (target / "recipe.yaml").is_file()
        opened = Run.open(target) if is_run else Index(target, verify=verify)
        conditions = [condition(text) for text in where or []]
        with progress(as_json) as bars:
            hits = find(
                opened, query, k=k, stage=stage, image=image, where=conditions,
                instruction=instruction, model=model, engine=engine, reporter=bars,
            )  # fmt: skip
        page = sheet or (target / "search.png" if is_run else None)
        if page is not None:
            write_sheet(hits, page, query)
        if as_json:
            print_json([hit.as_json() for hit in hits])
            return
        for hit in hits:
            out.print_line(f"{hit.rank:3d}  {hit.score:.3f}  {hit.title(hits)}")
        if not hits:
            out.print_line(
                f"nothing found: {'no item is as --where says' if where else 'the index is empty'}"
            )
        if page is not None:
            out.print_line(f"contact sheet: {page}")
