"""Which room may know which: the import rules, the public names, and the README's table of ops."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import elva_kernels
from elva_kernels import dispatch

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "elva_kernels").rglob("*.py"))
ELVA = sorted((ROOT / "elva").rglob("*.py"))

# elva's rooms, each knowing only those before it: data flows one way.
ROOMS = (
    "errors", "draws", "files", "progress", "recipe", "checkpoint", "data", "run", "model",
    "index", "search", "training", "evaluation", "report", "mrbench", "commands", "cli",
    "__main__",
)  # fmt: skip

# What only elva_kernels should compute, and the calls of such names that elva still has.
KERNELS_OWN = {"argsort", "cosine_similarity", "cross_entropy", "normalize", "topk"}
ORDER = "an order that is no ranking: drawn, of ids, or of a batch's rows"
UNTIL = "until the loop calls elva_kernels"
WORDS = "over a vocabulary: words, not scores"
ALLOWED = {
    ("elva.commands.mine", "cosine_similarity"): [UNTIL],
    ("elva.data.pool", "argsort"): [ORDER],
    ("elva.draws", "argsort"): [ORDER],
    ("elva.evaluation.grains", "cosine_similarity"): [UNTIL],
    ("elva.evaluation.ranks", "cosine_similarity"): [UNTIL],
    ("elva.index.engines.faiss", "normalize"): ["faiss searches unit rows; scores are ours again"],
    ("elva.index.exact", "argsort"): [ORDER],
    ("elva.index.exact", "normalize"): ["the proof of exact search, in float64"],
    ("elva.training.negatives", "normalize"): [UNTIL, UNTIL],
    ("elva.training.negatives", "topk"): [UNTIL],
    ("elva.training.objective", "cross_entropy"): [UNTIL, UNTIL],
    ("elva.training.objective", "normalize"): [UNTIL, UNTIL],
    ("elva.training.stage", "argsort"): [ORDER],
    ("elva.training.stage", "cross_entropy"): [WORDS],
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


@pytest.mark.parametrize("path", KERNELS, ids=module_name)
def test_kernels_import_only_torch_numpy_and_themselves(path):
    allowed = {"torch", "numpy", "elva_kernels", *sys.stdlib_module_names}
    if path.parent.name == "triton_kernels":
        allowed.add("triton")
    assert roots(path) <= allowed


def test_the_reference_imports_only_torch():
    assert roots(ROOT / "elva_kernels" / "reference.py") - sys.stdlib_module_names == {"torch"}


def test_the_batch_reference_imports_only_torch_and_the_reference():
    known = {module for module, _ in imports(ROOT / "elva_kernels" / "reference_batch.py")}
    assert known - sys.stdlib_module_names == {"torch", "elva_kernels.reference"}


def test_backends_do_not_know_the_ops():
    backends = list((ROOT / "elva_kernels").glob("native*.py"))
    backends += (ROOT / "elva_kernels" / "triton_kernels").glob("*.py")
    for path in backends:
        known = {module for module, _ in imports(path) if module.startswith("elva_kernels")}
        own = {module for module in known if module.startswith("elva_kernels.triton_kernels.")}
        if path.parent.name == "triton_kernels":
            known -= own | {"elva_kernels.triton_kernels"}
        allowed = {"_C", "block_search", "gpu_batch", "in_batch", "native", "native_cuda"}
        allowed |= {"reference", "reference_batch"}
        assert known <= {"elva_kernels", *(f"elva_kernels.{name}" for name in allowed)}, path


def test_only_dispatch_knows_the_backends():
    for path in KERNELS:
        taken = {f"{module}.{name}" for module, name in imports(path)}
        for backend in ("elva_kernels.native", "elva_kernels.triton_kernels"):
            if path.name != "dispatch.py" and not module_name(path).startswith(backend):
                assert backend not in taken, path
                assert not any(module.startswith(backend) for module, _ in imports(path)), path


@pytest.mark.parametrize("path", ELVA, ids=module_name)
def test_elva_uses_only_the_kernels_public_names(path):
    for module, name in imports(path):
        if module == "elva_kernels" and name is not None:
            assert name in elva_kernels.__all__
        else:
            assert not module.startswith("elva_kernels.")


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
    script = (
        "import sys; from elva.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "print('loaded', *sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    for words in (["check"], ["stats"], ["sample", "--sheet", "sheet.png"]):
        done = subprocess.run(
            [sys.executable, "-c", script, "data", words[0], str(tmp_path), *words[1:]],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "loaded"


def test_no_file_edits_the_import_path():
    for path in (*KERNELS, *ELVA):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "path":
                assert not (isinstance(node.value, ast.Name) and node.value.id == "sys"), path


def test_public_names_exist_and_are_documented():
    assert sorted(elva_kernels.__all__) == elva_kernels.__all__
    for name in elva_kernels.__all__:
        assert getattr(elva_kernels, name).__doc__, name


def test_importing_the_kernels_is_light(tmp_path):
    """Under 0.3 s beyond torch's own import (best of three), and no heavy package comes along."""
    script = (
        "import sys, time, numpy, torch; start = time.perf_counter(); import elva_kernels;"
        "print(time.perf_counter() - start);"
        "print(*sorted({'triton', 'transformers', 'elva', 'peft'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        took, *heavy = done.stdout.split()
        seconds.append(float(took))
        assert not heavy
    assert min(seconds) < 0.3


def test_readme_shows_the_table_of_ops_and_backends():
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- ops -->")[1].split("<!-- /ops -->")[0]
    assert table.strip() == dispatch.markdown_table()
