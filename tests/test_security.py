"""What no file of ours does: evaluate text, start a shell, unpack an archive, ask the network at
import, or take YAML and templates at their word. What opens pickles: tests/test_architecture.py;
paths in data: tests/elva/test_data_*.py; uploads: test_demo.py; servers: test_judges.py."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path for room in ("elva", "elva_kernels") for path in (ROOT / room).rglob("*.py"))
OURS = [*PACKAGES, ROOT / "setup.py", *sorted((ROOT / "benchmarks").rglob("*.py"))]

EVALUATES = {"eval", "exec", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
UNPACKS = {"extract", "extractall", "unpack_archive"}
BELIEVES = {
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader",
    "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "marshal.loads", "marshal.load",
    "xml.etree.ElementTree.fromstring", "tempfile.mktemp",
}  # fmt: skip
SWITCHES = {"shell": False, "autoescape": True}
"""Keywords of calls, and the only constant that they may have."""


def names_taken(nodes):
    """A name in the file -> what it is."""
    taken = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                taken[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            taken |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
    return taken


def believed(source):
    """What in a file's code takes foreign text or files at their word; its texts may name it."""
    nodes = [*ast.walk(ast.parse(source))]
    taken = names_taken(nodes)
    found = [x for x in taken.values() if x in SHELLS | BELIEVES]
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            found += {f"{taken.get(first, first)}.{rest}"} & (SHELLS | BELIEVES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        bare = taken.get(called, called)
        found += {bare} & EVALUATES
        found += [called] * (bare.rpartition(".")[2] in UNPACKS)
        found += [
            x.arg for x in node.keywords
            if x.arg in SWITCHES and isinstance(x.value, ast.Constant)
            and x.value.value is not SWITCHES[x.arg]
        ]  # fmt: skip
        if called.rpartition(".")[2] == "Environment":  # jinja2's own default is off
            found += ["Environment"] * ("autoescape" not in {x.arg for x in node.keywords})
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)", "exec(x, {})", "__import__(name)", "import os\nos.system(x)",
        "from os import popen", "import subprocess as s\ns.run(x, shell=True)",
        "import tarfile\ntarfile.open(x).extractall(y)", "archive.extract(member)",
        "from shutil import unpack_archive as u\nu(x)", "import yaml\nyaml.load(x, L)",
        "import yaml as y\ndef f(): return y.unsafe_load(x)", "from yaml import full_load",
        "Environment(loader=x)", "jinja2.Environment(autoescape=False)",
        "import xml.etree.ElementTree as e\ne.fromstring(x)", "import marshal\nmarshal.loads(x)",
    ],
)  # fmt: skip
def test_what_takes_foreign_text_at_its_word_is_found(source):
    assert len(believed(source)) == 1


def test_no_file_takes_foreign_text_at_its_word():
    allowed = '"""eval(x)"""\nmodel.eval()\nre.compile(x)\nrun(x, shell=False)'
    assert believed(allowed) == []
    assert len(OURS) > 300
    found = {path.relative_to(ROOT).as_posix(): believed(path.read_text()) for path in OURS}
    assert {path: what for path, what in found.items() if what} == {}


ALONE = """
import importlib, sys

def refuse(event, given):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise SystemExit(f"the network was asked: {event} {given}")

sys.addaudithook(refuse)
missing = set()
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # a framework that is not installed
        if error.name.split(".")[0] in ("elva", "elva_kernels"):
            raise
        missing.add(error.name)
print("imported", *sorted(missing))
"""


def imported_alone(names, where):
    return subprocess.run(
        [sys.executable, "-c", ALONE, *names], cwd=where, capture_output=True, text=True
    )


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_no_module_asks_the_network_when_it_is_imported(others, tmp_path):
    """Every module of both packages in one process, and all that they import; those of other
    people's frameworks, which take half a minute, in another."""
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in PACKAGES)
    names = [".".join(x[:-1] if x[-1] == "__init__" else x) for x in parts]
    chosen = [x for x in names if x.startswith("elva.integrations") == others]
    done = imported_alone([x for x in chosen if not x.endswith("__main__")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("imported")


def test_a_module_that_asks_is_found(tmp_path):
    (tmp_path / "asks.py").write_text("import socket\nsocket.create_connection(('127.0.0.1', 9))")
    done = imported_alone(["json", "asks"], tmp_path)
    assert done.returncode == 1 and "the network was asked: socket.getaddrinfo" in done.stderr
