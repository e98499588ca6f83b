"""Which room may know which: the import rules, and the public names."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elva_kernels

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


# A room or file of elva_kernels, and those of elva_kernels that it may import beside itself: data
# flows down this list. The rest of the world is torch, numpy and, for triton's kernels, triton.
KERNEL_ROOMS = {
    "reference": (),
    "backends.launcher": (),
    "backends.boundary": (),
    "backends.steps": ("reference",),
    "backends.gpu": ("reference", "backends.steps"),
    "backends.in_batch": ("reference", "backends.launcher", "backends.steps"),
    "backends.reference": ("reference", "backends.launcher", "backends.in_batch"),
    "backends.cpu": ("reference", "backends.launcher", "backends.boundary", "backends.steps"),
    "backends.cuda": (
        "reference",
        "backends.launcher",
        "backends.boundary",
        "backends.steps",
        "backends.gpu",
    ),
    "backends.triton.kernels": (),
    "backends.triton": (
        "reference",
        "backends.launcher",
        "backends.steps",
        "backends.gpu",
        "backends.triton.kernels",
    ),
    "backends.table": (
        "backends.launcher",
        "backends.in_batch",
        "backends.reference",
        "backends.cpu",
        "backends.cuda",
        "backends.triton",
    ),
    "backends.admission": ("reference", "backends.launcher"),
    "backends.choice": ("backends.launcher", "backends.table", "backends.admission"),
    "registered": ("reference", "backends.launcher", "backends.choice"),
    "checks": ("reference", "backends.table"),
    "reward": ("reference", "registered", "checks"),
    "in_batch": ("reference", "registered", "checks"),
    "topk": ("reference", "registered", "checks"),
    "modules": ("reference", "checks", "reward", "in_batch"),
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


@pytest.mark.parametrize("name", elva_kernels.__all__)
def test_public_names_are_documented(name):
    """One line that says what it is; of a function, a word on every parameter."""
    public = getattr(elva_kernels, name)
    first, *rest = inspect.getdoc(public).split("\n")
    assert first.endswith(".") and not any(rest[:1])
    if inspect.isfunction(public):
        told = set(re.findall(r"\w+", inspect.getdoc(public)))
        assert told >= set(inspect.signature(public).parameters)


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
