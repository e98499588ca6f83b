"""`elva index sync`."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from elva.cli import options
from elva.cli.console import named_path, one_line_errors, progress, quiet_libraries, say
from elva.errors import printable

EXAMPLES = (
    "Examples:  elva index sync my.index --folder ~/Pictures --dry-run   |   "
    "elva index sync my.index   |   "
    "elva index sync my.index --folder ~/Pictures --watch"
)
SHOWN = ("new", "changed", "moved", "relabelled", "gone")


def sync(
    index: options.Index,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures that the index was built of; as it notes, if none.",
            parser=named_path,
            metavar="PATH",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint of the index's model, if it was moved.")
    ] = None,
    skip_bad: options.SkipBad = 0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow the folder's changes until interrupted.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is new, changed and gone; change nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make an index of a folder what the folder is: new pictures are embedded, changed ones
    replaced, gone ones deleted, moved ones keep their embeddings; a killed one goes on."""
    with one_line_errors("call it again to go on"):
        quiet_libraries()
        from elva.commands import sync_index as syncing
        from elva.data.strict import Faults
        from elva.index import Index
        from elva.model.encoder import Encoder
        from elva.search import Searcher

        root = syncing.folder_of(index) if folder is None else folder
        if dry_run:
            faults = Faults(skip_bad)
            there = syncing.compare(index, root, faults)
            told = {
                "left_out": there.found.left_out, "bad": faults.found,
                "notices": there.found.notices,
            }  # fmt: skip
            names = [
                f"  {kind}: {printable(n)}" for kind in SHOWN for n in getattr(there.plan, kind)
            ]
            lines = _synced(index, {**there.plan.counts(), **told})
            _say_synced(
                len(there.index),
                {**vars(there.plan), **told},
                [*there.found.notices, lines[0], *names, *lines[1:]],
                as_json,
            )
            return

        @cache
        def encoder() -> Encoder:
            return Searcher.of(Index(index, verify=False), model).encoder

        if model is not None:
            Index(index, verify=False).check_model(encoder().identity)
        with progress(as_json) as bars:

            def once() -> None:
                made, done = syncing.sync(index, root, encoder, skip_bad=skip_bad, reporter=bars)
                _say_synced(len(made), done, _synced(index, done), as_json)

            if watch:
                syncing.follow(index, root, once, bars)
            else:
                once()


def _synced(index: Path, done: Mapping[str, Any]) -> list[str]:
    """The lines on what a sync did, or would do."""
    parts = [f"{done[kind]:,} {kind}" for kind in (*SHOWN, "unchanged")]
    lines = [f"{index}: {', '.join(parts)}"]
    if done["kept"]:
        lines.append(f"  kept: {done['kept']:,} that cannot be read now")
    if done["unread"]:
        lines.append(f"  unread: {done['unread']:,} new that cannot be read now")
    return [*lines, *(f"  left out: {row}" for row in done["bad"])]


def _say_synced(items: int, done: Mapping[str, Any], lines: list[str], as_json: bool) -> None:
    left_out = {why: len(names) for why, names in done["left_out"].items()}
    say({"items": items, **done, "left_out": left_out}, lines, as_json)
