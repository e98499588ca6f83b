"""Every command's help: an example that parses, and words that say what each option is."""

import json
import re
import shlex
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

import elva
from elva.cli import app

ROOT = typer.main.get_command(app)


def commands(
    group: click.Command = ROOT, path: str = "elva"
) -> Iterator[tuple[str, click.Command]]:
    inner = getattr(group, "commands", None)
    if inner is None:
        yield path, group
    for name, command in (inner or {}).items():
        yield from commands(command, f"{path} {name}")


VAGUE = r"How many\.$|^(Of|What|Only|At most|How many|Leave out|Look at|Below|More|Less) "
COMMANDS = dict(commands())


def test_the_walk_finds_every_command() -> None:
    assert len(COMMANDS) >= 20
    assert {"elva train", "elva index build", "elva mrbench review", "elva doctor"} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_says_what_it_is(path: str) -> None:
    for parameter in COMMANDS[path].params:
        words = getattr(parameter, "help", None) or ""
        shown = f"{path}: {parameter.name} {words!r}"
        assert len(words.split()) >= 2 and words.endswith("."), shown
        assert not re.search(VAGUE, words), shown


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_an_example_that_parses(path: str) -> None:
    head, _, rest = (COMMANDS[path].epilog or "").partition(":")
    examples = [one.strip() for one in rest.split("   |   ")]
    assert head == ("Example" if len(examples) == 1 else "Examples")
    for example in examples:
        words = shlex.split(example)[shlex.split(example).index("elva") + 1 :]
        command, taken = ROOT, ["elva"]
        while hasattr(command, "commands"):
            taken.append(words[0])
            command = command.commands[words.pop(0)]
        assert " ".join(taken) == path, example
        command.make_context(path, words)  # raises for an option or argument that is not there


def test_without_a_command_it_shows_what_people_come_for() -> None:
    """Its commands parse, but for what a reader must fill in."""
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 0
    shown = [line.split()[1:] for line in done.output.splitlines() if line.startswith("  elva ")]
    assert {words[0] for words in shown} == {"train", "index", "search", "demo"}
    for words in (shlex.split(" ".join(words)) for words in shown):
        command = ROOT
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("elva", words)


def test_the_version_is_the_packages() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output == f"elva {elva.__version__}\n"


def test_the_shells_can_complete() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output
    done = CliRunner().invoke(
        app, [], prog_name="elva",
        env={"_ELVA_COMPLETE": "complete_bash", "COMP_WORDS": "elva doc", "COMP_CWORD": "1"},
    )  # fmt: skip
    assert done.output.split() == ["doctor"]


def test_doctor_knows_versions_backends_and_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    from elva.commands import doctor

    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert {"python", "torch", "transformers", "elva"} <= set(told["versions"])
    assert told["versions"]["elva"] == elva.__version__
    assert told["backends"]["reference"] is None  # None: runs here
    assert {"emoji", "faiss", "milvus", "test", "dev"} <= set(told["extras"])
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "faiss-cpu" else known(n))
    words = CliRunner().invoke(app, ["doctor"]).stdout
    assert re.search(r"extra faiss: pip install 'elva\[faiss\]' \(lacks faiss-cpu>=1\.9\)", words)
    assert "faiss-cpu" in re.search(r"extra test: .*", words)[0]  # test names elva[faiss,milvus]
