"""The command line: parses, calls one function, prints. Bad input is one line and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from elva.run import Run

app = typer.Typer(
    help="Train multimodal models to retrieve by ranking (ELVA, arXiv:2606.20280).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Data in M-BEIR's layout.", no_args_is_help=True)
app.add_typer(data_app, name="data")

out = Console(highlight=False)
if not out.is_terminal:
    out.width = 120  # a file or a pipe has no width: the table's own
err = Console(stderr=True, highlight=False)

RunArgument = Annotated[Path, typer.Argument(help="A run directory of elva train.", metavar="RUN")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
"""System errors that a person can mend: a full, read-only or foreign disk."""


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can mend is one line and exit code 2; a defect of ours keeps its traceback."""
    from elva.data import DataError
    from elva.errors import UserError

    try:
        yield
    except (DataError, UserError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or "the output directory"
        _fail(f"{where}: cannot write, {error.strerror}; free space or choose another directory")
    except KeyboardInterrupt:
        err.print("elva: interrupted; go on with --resume")
        raise typer.Exit(130) from None


def _fail(line: str) -> None:
    err.print(f"elva: {line}", soft_wrap=True, markup=False)
    raise typer.Exit(2) from None


@app.command(
    epilog="Examples:  elva train   |   elva train --seed 1 --output runs/one   |   "
    "elva train --output runs/one --resume   |   elva train --recipe elva-2b --dry-run   |   "
    "elva train --stages 3 --from runs/one --set stages.3.learning_rate=1e-4"
)
def train(
    recipe: Annotated[str, typer.Option(help="emoji, smoke, elva-2b or elva-7b.")] = "emoji",
    output: Annotated[
        Path | None, typer.Option(help="Run directory; a fresh dated one under runs/ by default.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with recipe fields to change.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change one field.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=N.")] = None,
    stages: Annotated[str | None, typer.Option(help="Only these, e.g. 3 or 2,3.")] = None,
    start_from: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Run to start the stages from.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many steps a stage.")] = None,
    controls: Annotated[bool, typer.Option(help="Train what stage 3 is compared with.")] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe, steps and memory; train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train every stage of a recipe, evaluate after each, and write a report."""
    with _one_line_errors():
        from elva.config import resolve

        changes = [*(assign or []), *([] if seed is None else [f"seed={seed}"])]
        if dry_run:
            from elva.plan import describe

            _print_plan(describe(resolve(recipe, config, changes), limit), as_json)
            return
        _quiet_libraries()
        from elva.progress import Bars
        from elva.run import Run
        from elva.train import train as run_stages

        began = None if start_from is None else Run.open(start_from)
        wanted = None if stages is None else stages.split(",")
        run = _run_to_train(Run, recipe, output, config, changes, resume)
        console = err if as_json else out
        console.print(f"run directory: {run.directory}", soft_wrap=True)
        with Bars(console) as bars:
            run_stages(
                run,
                bars,
                stages=wanted,
                start_from=began,
                limit=limit,
                controls=controls,
            )
        from elva.report import as_json as figures
        from elva.report import report, table

        page = report(run)
        if as_json:
            print(json.dumps(figures(run)))
        else:
            out.print(table(run))
            out.print(f"report: {page}", soft_wrap=True)


def _run_to_train(
    kind: type[Run],
    recipe: str,
    output: Path | None,
    config: Path | None,
    changes: list[str],
    resume: bool,
) -> Run:
    from elva.config import resolve
    from elva.errors import UserError

    if not resume:
        return kind.create(output, resolve(recipe, config, changes))
    if output is None:
        raise UserError("train: --resume must name the run; pass --output RUN too")
    if config is not None or changes:
        raise UserError(
            "train: --resume goes on with the run's own recipe, got --config, --set or --seed; "
            "leave them out or start a new run"
        )
    return kind.open(output)


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan))
        return
    import yaml

    out.print(yaml.safe_dump(plan, sort_keys=False, width=100), markup=False, end="")


def _quiet_libraries() -> None:
    """Progress is ours to show: transformers' own bars would write over it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command(
    epilog="Examples:  elva evaluate runs/one   |   elva evaluate runs/one --stage 3 --json"
)
def evaluate(
    run: RunArgument,
    stage: Annotated[
        list[str] | None, typer.Option(help="Stage or control; all that are trained by default.")
    ] = None,
    split: Annotated[str, typer.Option(help="test or val.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Measure a run's models again: recall, minimal pairs, grain distance."""
    with _one_line_errors():
        _quiet_libraries()
        from elva.evaluate import evaluate as measure
        from elva.progress import Bars
        from elva.report import as_json as figures
        from elva.report import table
        from elva.run import Run

        opened = Run.open(run)
        with Bars(err if as_json else out) as bars:
            measure(opened, bars, stage or None, split=split)
        if as_json:
            print(json.dumps(figures(opened)))
        else:
            out.print(table(opened))


@app.command(
    epilog='Examples:  elva search runs/one "woman firefighter"   |   '
    'elva search runs/one "with dark skin tone" --image hand.png -k 5 --json'
)
def search(
    run: RunArgument,
    query: Annotated[str, typer.Argument(help="What the picture should show.")] = "",
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many pictures.")] = 10,
    stage: Annotated[
        str | None, typer.Option(help="Stage or control; the last by default.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Contact sheet; RUN/search.png by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the corpus' best pictures for a text, a picture, or both."""
    with _one_line_errors():
        _quiet_libraries()
        from elva.progress import Bars
        from elva.run import Run
        from elva.search import search as find
        from elva.search import write_sheet

        with Bars(err if as_json else out) as bars:
            hits = find(Run.open(run), query, k=k, stage=stage, image=image, reporter=bars)
        page = sheet or run / "search.png"
        write_sheet(hits, page, query)
        if as_json:
            print(json.dumps([hit.as_json() for hit in hits]))
            return
        for hit in hits:
            out.print(f"{hit.rank:3d}  {hit.score:.3f}  {hit.name}", markup=False)
        out.print(f"contact sheet: {page}", soft_wrap=True)


@app.command(epilog="Example:  elva report runs/one")
def report(run: RunArgument) -> None:
    """Write RUN/report.html and its pictures again from the run's files."""
    with _one_line_errors():
        from elva.report import report as write
        from elva.run import Run

        out.print(f"report: {write(Run.open(run))}", soft_wrap=True)


@data_app.command("emoji", epilog="Example:  elva data emoji --output data/emoji")
def data_emoji(
    output: Annotated[Path, typer.Option(help="An absent or empty directory.")],
    size: Annotated[int, typer.Option(min=16, max=512, help="Pixels a side.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Write the embedded emoji corpus in M-BEIR's layout."""
    with _one_line_errors():
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
