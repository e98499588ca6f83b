"""Which room may know which: the import rules, the public names, and the README's table of ops."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import elva_kernels
from elva_kernels import dispatch

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "elva_kernels").rglob("*.py"))
ELVA = sorted((ROOT / "elva").rglob("*.py"))

# elva: `cli` calls commands, commands are made of nouns, nouns know the kernels.
COMMANDS = {"commands", "mrbench", "search"}


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


@pytest.mark.parametrize("path", ELVA, ids=module_name)
def test_nouns_do_not_import_commands(path):
    room = path.relative_to(ROOT / "elva").parts[0].removesuffix(".py")
    rooms = set(elva_rooms(path))
    if room not in {"cli", "__main__"}:
        assert "cli" not in rooms
    if room not in COMMANDS | {"cli", "__main__"}:
        assert not rooms & COMMANDS


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
