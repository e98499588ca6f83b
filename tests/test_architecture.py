"""Which room may know which: the import rules, and the public names."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elva_kernels

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "elva_kernels").rglob("*.py"))
ELVA = sorted((ROOT / "elva").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))

# elva's rooms, each knowing only those before it: data flows one way.
ROOMS = (
    "errors", "terminal", "draws", "settings", "files", "progress", "processes",
    "trainer_arguments", "recipe", "recipes", "checkpoint", "data", "run", "model", "index",
    "hardest", "search", "evaluation", "training", "report", "collection", "mrbench", "demo",
    "integrations", "commands", "cli", "__main__",
)  # fmt: skip

# What only elva_kernels should compute, and the calls of such names that elva still has.
KERNELS_OWN = {"argsort", "cosine_similarity", "cross_entropy", "normalize", "topk"}
ORDER = "an order that is no ranking: drawn, of ids, or of a batch's rows"
NAMES = "Unicode's forms of a file's name"
PROOF = "the proof of exact search, in float64: of the query, and of what is rounded of it"
WORDS = "over a vocabulary: words, not scores"
ALLOWED = {
    ("elva.data.formats.named", "normalize"): [NAMES, NAMES],
    ("elva.data.table", "argsort"): [ORDER],
    ("elva.draws", "argsort"): [ORDER],
    ("elva.index.engines.faiss", "normalize"): ["faiss searches unit rows; scores are ours again"],
    ("elva.index.exact", "argsort"): [ORDER],
    ("elva.index.exact", "normalize"): [PROOF, PROOF],
    ("elva.training.summaries", "argsort"): [ORDER],
    ("elva.training.tokens", "cross_entropy"): [WORDS],
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Every module that a file imports, wherever in it, with the names taken from it."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path.parent / "_")
    package = package.removesuffix("._")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join([*base, node.module or ""]).strip(".") if node.level else node.module
            yield from ((module, alias.name) for alias in node.names)


def roots(path):
    return {module.split(".")[0] for module, _ in imports(path)}


def elva_rooms(path):
    """The rooms directly under `elva` that a file imports."""
    for module, name in imports(path):
        parts = module.split(".")
        if parts[0] == "elva":
            yield parts[1] if len(parts) > 1 else name


# A room or file of elva_kernels, and those of elva_kernels that it may import beside itself: data
# flows down this list. The rest of the world is torch, numpy and, for triton's kernels, triton.
KERNEL_ROOMS = {
    "reference": (),
    "backends.launcher": ("reference",),
    "backends.boundary": (),
    "backends.segments": (),
    "backends.skipped": ("reference",),
    "backends.head": ("reference", "backends.launcher"),
    "backends.steps": ("reference", "backends.launcher", "backends.skipped", "backends.head"),
    "backends.gpu": ("reference", "backends.launcher", "backends.steps"),
    "backends.in_batch": ("reference", "backends.launcher", "backends.head", "backends.steps"),
    "backends.shares": (
        "reference",
        "backends.launcher",
        "backends.skipped",
        "backends.steps",
        "backends.in_batch",
    ),
    "backends.reference": (
        "reference",
        "backends.launcher",
        "backends.head",
        "backends.in_batch",
        "backends.shares",
    ),
    "backends.cpu": (
        "reference",
        "backends.launcher",
        "backends.boundary",
        "backends.segments",
        "backends.steps",
    ),
    "backends.cuda": (
        "reference",
        "backends.launcher",
        "backends.boundary",
        "backends.segments",
        "backends.steps",
        "backends.gpu",
    ),
    "backends.triton.kernels": (),
    "backends.triton": (
        "reference",
        "backends.launcher",
        "backends.segments",
        "backends.steps",
        "backends.gpu",
        "backends.triton.kernels",
    ),
    "backends.table": (
        "backends.launcher",
        "backends.in_batch",
        "backends.shares",
        "backends.reference",
        "backends.cpu",
        "backends.cuda",
        "backends.triton",
    ),
    "backends.admission": ("reference", "backends.launcher", "backends.shares"),
    "backends.choice": ("backends.launcher", "backends.table", "backends.admission"),
    "registered": (
        "reference",
        "backends.launcher",
        "backends.boundary",
        "backends.shares",
        "backends.choice",
    ),
    "scalars": (),
    "checks": (
        "reference",
        "backends.launcher",
        "backends.boundary",
        "backends.table",
        "registered",
        "scalars",
    ),
    "reward": ("reference", "backends.launcher", "registered", "checks"),
    "in_batch": ("reference", "registered", "checks"),
    "info_nce": ("reference", "registered", "checks"),
    "topk": ("reference", "registered", "checks"),
    "codes": ("reference", "registered", "checks"),
    "modules": ("reference", "checks", "reward", "info_nce"),
    "doctor": ("backends.boundary", "backends.table", "backends.admission", "backends.choice"),
}


def kernel_room(module):
    """The room of `KERNEL_ROOMS` that a module of elva_kernels lies in; the innermost."""
    name = module.removeprefix("elva_kernels").removeprefix(".")
    found = [x for x in KERNEL_ROOMS if f"{name}.".startswith(f"{x}.")]
    return max(found, key=len, default=name)


def kernel_modules(path):
    """What a file takes of elva_kernels, a name that is a module as that module."""
    for module, name in imports(path):
        if module.split(".")[0] == "elva_kernels":
            inner = ROOT.joinpath(*module.split("."), str(name))
            is_module = inner.is_dir() or inner.with_suffix(".py").exists()
            yield f"{module}.{name}" if is_module else module


def test_the_rooms_of_the_kernels_are_those_of_the_tree():
    """And each may import what stands above it."""
    found = {kernel_room(module_name(path)) for path in KERNELS}
    assert found - {"", "backends"} == set(KERNEL_ROOMS)
    above = []
    for room, allowed in KERNEL_ROOMS.items():
        assert set(allowed) <= set(above), room
        above.append(room)


@pytest.mark.parametrize("path", KERNELS, ids=module_name)
def test_kernels_import_what_their_room_may(path):
    world = {"torch", "numpy", "elva_kernels", *sys.stdlib_module_names}
    room = kernel_room(module_name(path))
    if room == "backends.triton.kernels":
        world.add("triton")
    assert roots(path) <= world
    if room in KERNEL_ROOMS:
        known = {kernel_room(module) for module in kernel_modules(path)}
        assert known <= {room, *KERNEL_ROOMS[room]}
    elif room == "backends":
        assert not [*kernel_modules(path)]


def test_ops_have_one_word_in_every_room():
    """The three families, where a room has a file for each."""
    families = {"reward", "in_batch", "topk"}
    for room in ("", "reference", "registered", "backends/cpu", "backends/cuda", "backends/triton"):
        names = {x.stem for x in (ROOT / "elva_kernels" / room).glob("*.py")}
        assert families <= names, room


@pytest.mark.parametrize("path", ELVA, ids=module_name)
def test_elva_uses_only_the_kernels_public_names(path):
    for module, name in imports(path):
        if module == "elva_kernels" and name is not None:
            assert name in elva_kernels.__all__
        else:
            assert not module.startswith("elva_kernels.")


@pytest.mark.parametrize("path", BENCHMARKS, ids=module_name)
def test_what_a_benchmark_takes_from_the_packages_is_there(path):
    """Most of them run by hand: a name that has moved would be missed only then."""
    for module, name in imports(path):
        if module.split(".")[0] in ("elva", "elva_kernels"):
            found = importlib.import_module(module)
            if name is not None and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")


def room_of(path):
    return path.relative_to(ROOT / "elva").parts[0].removesuffix(".py")


def test_the_rooms_are_those_of_the_tree():
    assert {room_of(path) for path in ELVA} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("path", ELVA, ids=module_name)
def test_a_room_knows_only_those_before_it(path):
    """So there is no cycle, and nothing but `cli` imports a command, nothing but `__main__` it."""
    room = room_of(path)
    known = {one for one in elva_rooms(path) if one in ROOMS} - {room}
    assert known <= (set() if room == "__init__" else {*ROOMS[: ROOMS.index(room)]})


def test_commands_do_not_import_each_other():
    for path in (ROOT / "elva" / "commands").glob("*.py"):
        assert "commands" not in set(elva_rooms(path)), path


def test_elva_ranks_and_scores_nothing_itself():
    """Similarities, ranks, top-k and contrastive losses are elva_kernels' matter."""
    found = {}
    for path in ELVA:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            name = called.rpartition(".")[2]
            if name in KERNELS_OWN and called != f"elva_kernels.{name}":
                key = module_name(path), name
                found[key] = found.get(key, 0) + 1
    assert found == {key: len(reasons) for key, reasons in ALLOWED.items()}


HEAVY = "print('loaded', *sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
"""What a program that needs none of these prints of them last: that none is loaded."""


def test_checking_data_is_light(tmp_path):
    """Commands that only read data load neither torch nor peft."""
    pool, query = tmp_path / "cand_pool" / "local", tmp_path / "query" / "test"
    row = {"txt": "a cat", "img_path": None, "modality": "text", "did": "90:1"}
    asked = {
        "qid": "90:1", "query_txt": "feline", "query_img_path": None, "query_modality": "text",
        "pos_cand_list": ["90:1"], "neg_cand_list": [], "task_id": 1,
    }  # fmt: skip
    for folder, name, line in (
        (pool, "mbeir_mine_task1_cand_pool", row), (query, "mbeir_mine_task1_test", asked),
    ):  # fmt: skip
        folder.mkdir(parents=True)
        (folder / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    script = "import sys; from elva.cli import app; app(sys.argv[1:], standalone_mode=False);"
    for words in (["check"], ["stats"], ["sample", "--sheet", "sheet.png"]):
        done = subprocess.run(
            [sys.executable, "-c", script + HEAVY, "data", words[0], str(tmp_path), *words[1:]],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "loaded"


def test_drawing_a_report_is_light(tmp_path):
    """What a run's files say is drawn without what wrote them."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, elva.commands.report;" + HEAVY],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr


def test_the_kernels_touch_no_setting_of_the_process():
    """Switches of precision and determinism are the user's, and another thread would see them."""
    switches = ("fp32_precision", "allow_tf32", "matmul_precision", "use_deterministic")
    for path in KERNELS:
        assert not [x for x in switches if x in path.read_text()], path


def test_no_file_edits_the_import_path():
    for path in (*KERNELS, *ELVA):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "path":
                assert not (isinstance(node.value, ast.Name) and node.value.id == "sys"), path


PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
LOADS = {"torch.load", "torch.serialization.load", "torch.jit.load", "pandas.read_pickle"}
FOREIGN = {"allow_pickle", "trust_remote_code"}


def runs_foreign_code(source):
    """What in a file's code opens a pickle or runs a model's own code; its texts may name it."""
    nodes = [*ast.walk(ast.parse(source))]
    taken = {}  # a name in the file -> what it is
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                taken[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            taken |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
    found = [x for x in taken.values() if x.split(".")[0] in PICKLERS or x in LOADS]
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            found += {f"{taken.get(first, first)}.{rest}"} & LOADS
        pairs = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            keys = [getattr(key, "value", None) for key in node.keys]
            pairs = [*zip(keys, node.values, strict=True)]
        found += [k for k, x in pairs if k in FOREIGN and getattr(x, "value", None) is not False]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(x, weights_only=True)", "def f(): import torch as t; g(t.load)",
        "from torch import load", "from torch.serialization import load as l", "import pickle",
        "import joblib as j", "from pickle import loads", "import torch.jit; torch.jit.load(x)",
        "f(trust_remote_code=True)", "f(**{'trust_remote_code': asked})", "g(x, allow_pickle=True)",
    ],
)  # fmt: skip
def test_what_would_run_foreign_code_is_found(source):
    assert len(runs_foreign_code(source)) == 1


def test_no_pickle_is_opened_and_no_model_runs_code_of_its_own():
    assert runs_foreign_code('"""torch.load"""\nf(1, trust_remote_code=False)') == []
    for path in (*KERNELS, *ELVA):
        assert not runs_foreign_code(path.read_text()), path


@pytest.mark.parametrize("name", elva_kernels.__all__)
def test_public_names_are_documented(name):
    """One line that says what it is; of a function, a word on every parameter."""
    public = getattr(elva_kernels, name)
    first, *rest = inspect.getdoc(public).split("\n")
    assert first.endswith(".") and not any(rest[:1])
    if inspect.isfunction(public):
        told = set(re.findall(r"\w+", inspect.getdoc(public)))
        assert told >= set(inspect.signature(public).parameters)


def test_the_package_is_its_own_table_of_contents():
    assert set(re.findall(r"\w+", inspect.getdoc(elva_kernels))) >= set(elva_kernels.__all__)


@pytest.mark.parametrize("name", elva_kernels.__all__)
def test_the_fields_of_results_are_documented(name):
    public = getattr(elva_kernels, name)
    fields = getattr(public, "_fields", getattr(public, "__dataclass_fields__", ()))
    told = re.findall(r"^    (\w+): ", inspect.getdoc(public).partition("Attributes:")[2], re.M)
    assert told == [*fields]


def test_public_names_are_in_order():
    assert sorted(elva_kernels.__all__) == elva_kernels.__all__


def test_importing_the_kernels_is_light(tmp_path):
    """Beyond torch's own import nothing but their own Python comes along, and no kernel of it."""
    script = (
        "import sys, numpy, torch; before = set(sys.modules); import elva_kernels;"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = done.stdout.split()
    assert "elva_kernels.backends.table" in found
    assert {name.split(".")[0] for name in found} <= {"elva_kernels", *sys.stdlib_module_names}
    late = ("elva_kernels._C", "elva_kernels.backends.triton.kernels")
    assert not [name for name in found if name.startswith(late)]
