"""What prints to a terminal, and what may come out: no control but a line's end and our styles."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from rich.table import Table
from rich.text import Text

from benchmarks import reported
from elva.errors import UserError
from elva.index import Index
from elva.model.identity import Identity
from elva.progress import Bars
from elva.search import Hit
from elva.terminal import Terminal

Show = Callable[[str, str, Path], None]

COMMANDS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
"""What no terminal may get: controls, bidi and zero-width marks, tags, halves of surrogates."""

STYLES = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\d*[AK]|\x1b\[\?25[lh]|\r")
"""Those that rich itself sends to a terminal: colours, a line up or cleared, the cursor."""


def harmless(printed: str, terminal: bool = False) -> bool:
    """Whether what was printed moves, hides and turns nothing."""
    return not COMMANDS.search(STYLES.sub("", printed) if terminal else printed)


def check(printed: str, marker: str, *, terminal: bool = False, lines: int | None = None) -> None:
    assert harmless(printed, terminal), ascii(printed)
    assert marker in printed.replace("\n", ""), f"{marker} is lost: {printed!a}"
    if lines is not None:
        assert printed.count("\n") == lines, f"{lines} lines: {printed!a}"


def consoles(text: str, marker: str, place: Path) -> None:
    """A line, a string, cells, a bar: in a pipe and on a terminal."""
    for terminal in (False, True):
        file = io.StringIO()
        shown = Terminal(file=file, width=4000, force_terminal=terminal)
        shown.print_line(text)
        check(file.getvalue(), marker, terminal=terminal, lines=1)
        table = Table(text, title=text)
        table.add_row(text)
        table.add_row(Text(text, "bold"))
        with Bars(shown) as bars:
            bars.start(text, 3)
            bars.advance(2)
            shown.print(text, table)
            bars.finish(text)
        check(file.getvalue(), marker, terminal=terminal)


def errors(text: str, marker: str, place: Path) -> None:
    """An error of ours is one line."""
    import typer

    from elva.cli import console

    printed = io.StringIO()
    ours = mock.patch.object(console, "err", Terminal(file=printed))
    with ours, contextlib.suppress(typer.Exit), console.one_line_errors():
        raise UserError(f"{place}: must be shown, got {text}")
    check(printed.getvalue(), marker, lines=1)


def command(*words: object, code: int | None = 0) -> str:
    """What `elva WORDS` prints, of both streams."""
    from typer.testing import CliRunner

    from elva.cli import app

    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert code is None or done.exit_code == code, done.output
    return done.output


def usage(text: str, marker: str, place: Path) -> None:
    """A word that is no command, option or file."""
    for words in (["index", text], ["report", f"--{text}"], ["report", place / "a", text]):
        assert harmless(command(*words, code=2))


def index(text: str, marker: str, place: Path) -> None:
    """An index whose ids, fields and model have the text, and commands that name them."""
    made = Index.build(
        place / "i", [_plain(text)], torch.ones(1, 4), model=Identity(_plain(text), "r", "p"),
        columns={_plain(text): [1]},
    )  # fmt: skip
    check(command("index", "info", made.directory), marker)
    check(command("index", "info", made.directory, "--json"), marker, lines=1)
    check(command("index", "delete", made.directory, f"x{text}", code=2), marker, lines=1)


def answers(text: str, marker: str, place: Path) -> None:
    """Answers of a search, as lines and as JSON, whatever found them."""
    hits = [Hit(1, f"9:{at}", text, 0.5, text, Path("x.png"), text=text) for at in range(2)]
    made = Index.build(place / "i", ["a"], torch.ones(1, 4), model=Identity("m", "r", "p"))
    with mock.patch("elva.commands.search.search", lambda *_, **__: hits):
        check(command("search", made.directory, "dog"), marker, lines=2)
        printed = command("search", made.directory, "dog", "--json")
    check(printed, marker, lines=1)
    read = json.loads(json.dumps(text))  # JSON makes one of two halves of a surrogate pair
    assert [hit["name"] for hit in json.loads(printed)] == [read, read]


def data(text: str, marker: str, place: Path) -> None:
    """Rows that are wrong, as `elva data check` lists them."""
    root = reported.write_data(place / "data", first=_plain(text))
    for file in root.rglob("*_cand_pool.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        rows[0]["modality"], rows[1]["img_path"] = _plain(text), f"../{_plain(text)}"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(command("data", "check", root, code=None), marker)
    check(command("data", "check", root, "--json", code=None), marker)


def followed(text: str, marker: str, place: Path) -> None:
    """A training as `elva inspect` follows it, whose files have the text."""
    from elva.commands import follow
    from elva.recipe import Recipe, StageConfig
    from elva.run import Run

    run = Run.create(place / "run", Recipe("tiny", stages={"1": StageConfig()}))
    status = {"what": text, "done": 1, "total": 2, "rate": 1.0, "unit": text, "time": 1.0, "pid": 1}
    run.status_file.write_text(json.dumps(status))
    with mock.patch.object(Run, "is_training", True):
        printed = command("inspect", run.directory, "--once")
        standing = follow.Follower(run).look()
    assert harmless(printed)
    file = io.StringIO()
    Terminal(file=file, width=4000, force_terminal=True).print(follow.panel(standing))
    check(file.getvalue(), marker, terminal=True)


def _plain(text: str) -> str:
    """Without halves of surrogate pairs, which no file of ours takes."""
    return re.sub("[\ud800-\udfff]", "", text)


TERMINALS: dict[str, tuple[int, Show]] = {
    "console": (1, consoles),
    "error": (1, errors),
    "usage": (4, usage),
    "search": (4, answers),
    "index": (8, index),
    "data": (8, data),
    "inspect": (8, followed),
}
"""A surface -> how many texts come to one that it is shown, and what shows it."""
