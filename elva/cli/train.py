"""`elva train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elva.cli import options
from elva.cli.console import out, print_json, progress, quiet_libraries, together

if TYPE_CHECKING:
    from collections.abc import Callable

    from elva.processes import Processes
    from elva.recipe import Recipe
    from elva.run import Run


EXAMPLES = (
    "Examples:  elva train   |   elva train --seed 1 --output runs/one   |   "
    "elva train --output runs/one --resume   |   elva train --recipe elva-2b --dry-run   |   "
    "elva train --recipe elva-2b --model Qwen2-VL-2B-Instruct --data data/M-BEIR   |   "
    "elva train --stages 3 --from runs/one --set stages.3.learning_rate=1e-4   |   "
    "elva train --recipe booster --model Qwen/Qwen3-VL-Embedding-2B --data data/M-BEIR   |   "
    "torchrun --nproc-per-node 8 -m elva train --recipe elva-2b --model ..."
)


def train(
    recipe: Annotated[
        str, typer.Option(help="Recipe to train: emoji, quick, smoke, elva-2b, elva-7b or booster.")
    ] = "emoji",
    model: Annotated[
        str | None, typer.Option(help="Checkpoint to start from: a directory or a hub name.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub name in --model.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data of every stage: a directory in M-BEIR's layout.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run directory; a fresh dated one under runs/ by default.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of recipe fields to change.")
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Recipe field to change, such as stages.3.steps=80.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of every draw, 0 or more: --set seed=N.")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Stages to train, such as 3 or 2,3; all by default.")
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Run whose model the first stage starts from."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Steps a stage at most, 1 or more.")
    ] = None,
    controls: Annotated[
        bool, typer.Option(help="Train what the last stage is compared with.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print steps, hours, memory and disk of a training; train a few steps to measure.",
        ),
    ] = False,
    callback: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:CLASS",
            help="Callback of your own, a subclass of elva.training.callbacks.Callback.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Train every stage of a recipe, evaluate after each, and write a report.

    On several GPUs: torchrun --nproc-per-node 8 -m elva train ..., or accelerate launch.
    """
    with together() as processes:
        from elva.recipes import resolve

        changes = [*(assign or []), *([] if seed is None else [f"seed={seed}"])]
        wanted = None if stages is None else stages.split(",")
        given = {"model": model, "revision": revision, "data": data}
        quiet_libraries()
        from elva.run import Run

        began = None if start_from is None else Run.open(start_from)
        if dry_run:
            _print_plan(
                resolve(recipe, config, changes, **given), wanted, began, controls, limit, as_json,
                processes,
            )  # fmt: skip
            return
        from elva.commands.train import train as run_stages
        from elva.training.callbacks import callbacks_of

        added = callbacks_of(callback or ())
        run = None
        with processes.first_alone() as mine:
            if mine:
                run = _run_to_train(
                    Run, lambda: resolve(recipe, config, changes, **given), output, resume, wanted,
                    began, controls, changed=any((config, changes, model, revision, data)),
                )  # fmt: skip
        directory = processes.agreed(None if run is None else run.directory)
        run = run or Run.open(directory)
        with progress(as_json) as bars:
            if processes.first:
                bars.say(f"run directory: {run.directory}")
            run_stages(
                run, bars, stages=wanted, start_from=began, limit=limit, controls=controls,
                callbacks=added, processes=processes,
            )  # fmt: skip
        if processes.first:
            _print_result(run, as_json)


def _print_result(run: Run, as_json: bool) -> None:
    from elva.commands.report import report
    from elva.report.table import as_json as figures
    from elva.report.table import table

    page = report(run)
    if as_json:
        print_json(figures(run))
    else:
        out.print(table(run))
        out.print_line(f"report: {page}")


def _run_to_train(
    kind: type[Run],
    resolved: Callable[[], Recipe],
    output: Path | None,
    resume: bool,
    stages: list[str] | None,
    start_from: Run | None,
    controls: bool,
    *,
    changed: bool,
) -> Run:
    from elva.errors import UserError
    from elva.training.readiness import check

    if not resume:
        recipe = resolved()
        check(recipe, stages, start_from, controls=controls, output=output or Path("runs"))
        return kind.create(output, recipe)
    if output is None:
        raise UserError("train: --resume must name the run; pass --output RUN too")
    if changed:
        raise UserError(
            "train: --resume goes on with the run's own recipe, got --config, --set, --seed, "
            "--model, --revision or --data; leave them out or start a new run"
        )
    run = kind.open(output)
    check(run.recipe, stages, start_from or run, controls=controls, output=output)
    return run


def _print_plan(
    recipe: Recipe,
    stages: list[str] | None,
    start_from: Run | None,
    controls: bool,
    limit: int | None,
    as_json: bool,
    processes: Processes,
) -> None:
    from elva.training.estimate import describe
    from elva.training.measure import measure
    from elva.training.readiness import look

    ready = None
    with processes.first_alone() as mine:
        if mine:  # what it reads, the others then find read
            ready = look(recipe, stages, start_from, controls=controls)
    ready = ready or look(recipe, stages, start_from, controls=controls)
    every = {**dict(recipe.stages), **dict(recipe.controls)}
    kinds = {name: every[name] for name in ready.stages if every[name].steps or every[name].epochs}
    measured = measure(recipe, kinds, ready.data, start_from)  # not of a control by the clock
    plan = {
        **describe(recipe, limit, ready.stages, measured),
        "evaluation": ready.evaluation,
        "problems": ready.problems,
    }
    if not processes.first:
        return
    if as_json:
        print_json(plan)
        return
    import yaml

    out.print(yaml.safe_dump(plan, sort_keys=False, width=100), end="")
