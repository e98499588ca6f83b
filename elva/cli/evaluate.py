"""`elva evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elva.cli import options
from elva.cli.console import choose, out, print_json, progress, quiet_libraries, say, together

if TYPE_CHECKING:
    from elva.processes import Processes

EXAMPLES = (
    "Examples:  elva evaluate runs/one   |   elva evaluate runs/one --stage 3 --json   |   "
    "elva evaluate --embeddings embeddings --data data/M-BEIR --output evaluation   |   "
    "elva evaluate --run a.run.trec --qrels a.qrels.txt   |   "
    "elva evaluate --paper --figures evaluation"
)


TAKES = {
    "RUN": {"--stage", "--split"},
    "--embeddings": {"--data", "--output", "--split", "--task", "--pools", "--by-content",
                     "--skip-bad"},
    "--run": {"--qrels"},
    "--paper": {"--figures"},
}  # fmt: skip
"""What is measured -> the options that change how."""


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
    data: Annotated[
        Path | None, typer.Option(help="Data that was embedded, in M-BEIR's layout.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory of TREC runs, qrels and figures; in --embeddings by default."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of the data: train, val or test; by default test, of a RUN else val."
        ),
    ] = None,
    task: options.Tasks = None,
    pools: options.Pools = "local",
    by_content: Annotated[
        bool,
        typer.Option(
            "--by-content", help="Count copies of a right answer as right; M-BEIR does not."
        ),
    ] = False,
    skip_bad: options.SkipBad = 0,
    run_file: Annotated[
        Path | None,
        typer.Option("--run", help="Ranked answers to measure: a file in TREC's run format."),
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Right answers for --run: TREC's or M-BEIR's qrels.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="List the paper's sets: its figures, and --figures'.")
    ] = False,
    figures: Annotated[
        list[Path] | None,
        typer.Option(help="Directory that --embeddings was measured into, for --paper; several."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure a training run's models, embeddings by M-BEIR's protocol, or a TREC run."""
    with together() as processes:
        from elva.errors import UserError

        asked = {"RUN": run is not None, "--embeddings": embeddings is not None,
                 "--run": run_file is not None, "--paper": paper}  # fmt: skip
        if sum(asked.values()) != 1:
            raise UserError("evaluate: must be given one of RUN, --embeddings, --run or --paper")
        mode = next(name for name, is_given in asked.items() if is_given)
        given = {
            "--stage": stage, "--data": data, "--output": output, "--split": split, "--task": task,
            "--pools": pools != "local", "--by-content": by_content, "--skip-bad": skip_bad,
            "--qrels": qrels, "--figures": figures,
        }  # fmt: skip
        if lost := [name for name, value in given.items() if value and name not in TAKES[mode]]:
            raise UserError(f"evaluate: {lost[0]} must not come with {mode}; it would do nothing")
        choose("--pools", pools, ("local", "global"))
        if run is not None:
            _evaluate_run(run, stage, split, as_json, processes)
        elif not processes.first:
            return  # files are measured by one
        elif run_file is not None:
            _evaluate_files(run_file, qrels, as_json)
        elif paper:
            _beside_paper(figures or [], as_json)
        else:
            assert embeddings is not None
            which = {
                "split": split or "test", "tasks": task, "pools": pools, "by_content": by_content,
                "skip_bad": skip_bad,
            }  # fmt: skip
            _evaluate_embeddings(embeddings, data, output, which, as_json)


def _evaluate_files(run: Path, qrels: Path | None, as_json: bool) -> None:
    from elva.commands.evaluate import evaluate_files
    from elva.errors import UserError

    if qrels is None:
        raise UserError("evaluate: --run must come with --qrels, got none; name the right answers")
    figures = evaluate_files(run, qrels)
    warnings = figures["ties"]
    rows = [
        f"{k:>14}  {v:.4f}" if isinstance(v, float) else f"{k:>14}  {v}"
        for k, v in figures.items()
        if k != "ties"
    ]
    say(figures, [*rows, *(f"warning: {line}" for line in warnings)], as_json)


def _beside_paper(files: list[Path], as_json: bool) -> None:
    from elva.commands.evaluate import beside_paper
    from elva.evaluation.protocol import paper_table

    rows = beside_paper(files)
    if as_json:
        print_json(rows)
    else:
        out.print(paper_table(rows, [str(path) for path in files]))


def _evaluate_embeddings(
    embeddings: Path, data: Path | None, output: Path | None, which: dict[str, Any], as_json: bool
) -> None:
    from elva.commands.evaluate import evaluate_embeddings
    from elva.errors import UserError
    from elva.evaluation.protocol import tables

    if data is None:
        raise UserError("evaluate: --embeddings must come with --data, got none; name the data")
    where = output or embeddings / f"evaluation-{which['split']}-{which['pools']}"
    with progress(as_json) as bars:
        result = evaluate_embeddings(embeddings, data, where, **which, reporter=bars)
    if as_json:
        print_json(result)
        return
    for shown in tables(result):
        out.print(shown)
    kinds = (("warning", "ties"), ("note", "no_answer_inside"), ("skipped", "skipped"))
    notes = [f"{kind}: {line}" for kind, key in kinds for line in result[key]]
    taken = [row["submission"] for row in result["sets"].values() if "submission" in row]
    notes += [f"answers that its server takes: {path}" for path in taken]
    say(result, [*notes, f"runs, qrels and figures: {where}"], as_json)


def _evaluate_run(
    run: Path, stage: list[str] | None, split: str | None, as_json: bool, processes: Processes
) -> None:
    quiet_libraries()
    from elva.commands.evaluate import evaluate as measure
    from elva.progress import SILENT
    from elva.report.table import as_json as figures
    from elva.report.table import table
    from elva.run import Run

    opened = Run.open(run)
    with progress(as_json) as bars:
        measure(opened, bars if processes.first else SILENT, stage or None, split=split)
    if not processes.first:
        return
    if as_json:
        print_json(figures(opened))
    else:
        out.print(table(opened))
