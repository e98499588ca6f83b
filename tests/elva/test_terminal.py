"""What names, captions and errors may do to a terminal or a page: nothing."""

import ast
import io
import json
import re
from pathlib import Path

import pytest
import torch
import typer
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from benchmarks.reliability.shown import pages, terminals
from benchmarks.reliability.shown.terminals import harmless
from elva.cli import app, console
from elva.errors import UserError, printable
from elva.index import Index
from elva.model.identity import Identity
from elva.progress import Bars
from elva.report.render import render
from elva.terminal import Terminal

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\x7f\x9b31m\u202egnp\u200b\u2028[link=http://evil]b[/a]:cat:"
CAFE, FIREFIGHTER = (
    "caf\u00e9 \u732b\u00a0\u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f692",
)
I_WANT = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # which is spelt with a joiner


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [b] text", "plain [b] text"),
        *((text, text) for text in (CAFE, FIREFIGHTER, I_WANT)),
        ("ad\u200dmin", "ad\\u200dmin"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\r\n\tb", "a\\r\\n\\tb"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\u200bb\ufeff\u00ad", "a\\u200bb\\ufeff\\xad"),
        ("\ud800", "\\ud800"),
    ],
)  # fmt: skip
def test_what_hides_is_shown_and_what_is_read_stays(text, shown):
    assert printable(text) == shown and printable(shown) == shown


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_is_printed_reaches_the_terminal_as_a_command(terminal):
    """A string, a line, cells, a title, a bar: with the escapes that rich's own styles need."""
    file = io.StringIO()
    shown = Terminal(file=file, width=200, force_terminal=terminal,
                     color_system="standard" if terminal else None)  # fmt: skip
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, "bold"))
    with Bars(shown) as bars:
        bars.start(HOSTILE, 3)
        bars.advance(2)
        bars.say(HOSTILE)
        shown.print(HOSTILE, table)
        bars.finish(HOSTILE)
    printed = file.getvalue()
    assert harmless(printed, terminal)
    assert "\x1b[2J" not in printed and "\x1b]" not in printed
    assert printed.count("[link=http://evil]b[/a]:cat:") >= 5
    assert (":cat:" in printed) and "\U0001f431" not in printed


def test_an_error_is_one_harmless_line(capsys):
    with pytest.raises(typer.Exit), console.one_line_errors():
        raise UserError(f"{HOSTILE}\nforged: all is well")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and harmless(printed) and "\\nforged" in printed


@pytest.mark.parametrize(
    "words",
    [
        ["index", HOSTILE], ["report", "a", f"--{HOSTILE}"], ["search", "i", "q", "-k", HOSTILE],
        [f"{HOSTILE}\ud800"],
    ],
)  # fmt: skip
def test_a_wrong_word_of_a_command_is_shown_harmlessly(words):
    """typer would print it as it is; names of files may begin with a dash."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and harmless(done.output) and "Error" in done.output


def test_json_is_ascii_without_its_last_character(capsys):
    console.print_json({HOSTILE: "\ud800\x7f"})
    printed = capsys.readouterr().out
    assert harmless(printed) and printed.isascii()
    assert json.loads(printed) == {HOSTILE: "\ud800\x7f"}


def test_no_command_prints_beside_the_terminal():
    """By `print`, which shows text as it is; `print_json` alone does, and the version."""
    found = [
        (path.name, ast.unparse(node.args[0]))
        for path in (ROOT / "elva" / "cli").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert sorted(name for name, _ in found) == ["__init__.py", "console.py"]


def test_a_surface_that_shows_a_text_as_it_is_is_found(monkeypatch, tmp_path):
    """The row `terminal` of benchmarks/reliability can fail, by a terminal and by a page."""
    text = f"{HOSTILE} <b>k1k</b>"
    terminals.consoles(text, "k1k", tmp_path)
    pages.stays_text(pages.demo)(text, "k1k", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr("elva.terminal.printable", lambda text, keep="": text)
        terminals.consoles(text, "k1k", tmp_path)
    plain = render.__globals__["_PAGES"]
    monkeypatch.setattr(plain, "autoescape", False)
    monkeypatch.setattr(plain, "cache", None)
    with pytest.raises(AssertionError, match="it became HTML"):
        pages.stays_text(pages.demo)(text, "k1k", tmp_path)


def test_ids_and_fields_of_an_index_are_shown_as_they_are(tmp_path):
    index = Index.build(
        tmp_path / "i[/a]", [HOSTILE], torch.ones(1, 4), model=Identity(HOSTILE, "r", "p"),
        columns={HOSTILE: [1]},
    )  # fmt: skip
    for words, code in (
        (["info"], 0), (["verify"], 0), (["delete", "x" + HOSTILE], 2), (["delete", HOSTILE], 0),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["index", words[0], str(index.directory), *words[1:]])
        assert done.exit_code == code, done.output
        assert harmless(done.output) and ("i[/a]" in done.output or code)


def test_pages_escape_every_value():
    row = [
        "",
        '<script>alert("1")</script>',
        "s",
        "<img src=x onerror=y>",
        "g' onload='z &lt;",
        'j:x"',
    ]
    page = render("review.html.j2", title="<b>", rows=[row], credit='"><i>')
    assert not re.search(r"<script>alert|<img src=x|<b>|<i>|' onload='", page)
    assert 'src="j%3Ax%22"' in page
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;" in page and "&amp;lt;" in page


def test_no_template_and_no_command_turns_escaping_off():
    for path in (ROOT / "elva" / "report" / "templates").iterdir():
        assert not re.search(r"\|\s*safe|autoescape", path.read_text()), path
    for path in (ROOT / "elva").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Console"):
                raise AssertionError(f"{path}: prints by a console that is no Terminal")
            if isinstance(node, ast.keyword) and node.arg == "markup":
                assert ast.unparse(node.value) == "False", path


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    """Where no bar can be drawn: every half minute, with counts, rate and figures."""
    clock = [0.0]
    monkeypatch.setattr("elva.progress.time.perf_counter", lambda: clock[0])
    shown = Terminal(file=io.StringIO(), width=120, get_time=lambda: clock[0])
    with Bars(shown) as bars:
        bars.start("stage 2", 2_000)
        for done in range(1, 101):
            clock[0] += 1.0
            bars.advance(done, {"loss": 0.25, "unshown": 1.0})
    assert shown.file.getvalue().splitlines() == [
        f"stage 2: {done} of 2,000 steps  1 steps/s  loss 0.250" for done in (30, 60, 90)
    ]
