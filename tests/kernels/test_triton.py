"""The Triton backend without a GPU: the contract suite in the interpreter, and lints."""

import ast
import importlib.util
from pathlib import Path

import pytest

from elva_kernels.backends import triton
from tests.kernels import selections
from tests.kernels.cases import DTYPES

SOURCES = sorted(Path(triton.__file__).parent.rglob("*.py"))
KERNELS = [path for path in SOURCES if "@triton.jit" in path.read_text()]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

INTERPRETER = selections.SESSIONS["interpreter"]


def interpreted(config):
    return selections.run("interpreter", INTERPRETER.files, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(triton.INTERPRETED, reason="this is the interpreted session")
@pytest.mark.beside(work=interpreted)
def test_contract_in_the_interpreter(beside):
    selections.check_dtypes(beside, INTERPRETER, DTYPES)


@needs_triton
@pytest.mark.thorough
@pytest.mark.skipif(triton.INTERPRETED, reason="this is the interpreted session")
@pytest.mark.parametrize(("file", "part"), selections.in_parts(INTERPRETER))
def test_whole_contract_in_the_interpreter(file, part):
    environment = {"TRITON_INTERPRET": "1", selections.PART: part}
    selections.run("interpreter", [file], "--thorough", **environment)


def calls(path, name):
    """Calls of `tl.<name>` in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"tl.{name}":
            yield node


def cast_calls(path):
    """What `.to(...)` is called on, in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "to":
            yield ast.unparse(node.func.value), ast.unparse(node)


def test_there_are_kernels_to_lint():
    kernels = "bank codes from_scores in_batch matrix ranks reward rows topk"
    assert {path.stem for path in KERNELS} == set(kernels.split())
    for name in ("load", "program_id", "arange", "sum"):
        assert any(next(calls(path, name), None) for path in KERNELS), name


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_masked_loads_say_what_else_they_give(path):
    for call in calls(path, "load"):
        names = {keyword.arg for keyword in call.keywords}
        assert len(call.args) == 1, ast.unparse(call)  # mask and other by name
        assert "mask" not in names or "other" in names, ast.unparse(call)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_loads_are_cast_at_once(path):
    """The interpreter computes bfloat16 wrongly, and a GPU in half precision."""
    cast = {value for value, _ in cast_calls(path)}
    for call in calls(path, "load"):
        assert ast.unparse(call) in cast, ast.unparse(call)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_offsets_have_64_bits(path):
    cast = {text for _, text in cast_calls(path)}
    for name in ("program_id", "arange"):
        for call in calls(path, name):
            assert f"{ast.unparse(call)}.to(tl.int64)" in cast, ast.unparse(call)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_add_floats_by_a_stated_tree_and_never_atomically(path):
    """`tl.sum` leaves the order to the compiler: for integers, of one element, or of two."""
    text = path.read_text()
    assert "atomic" not in text.split('"""', 2)[2]
    for call in calls(path, "sum"):
        first = ast.unparse(call.args[0])
        single = first.startswith(("tree_sum(", "query_norms", "query_ks", "exponents("))
        single |= first.endswith("// 2, 2])")
        whole = "tl.int32" in first or first.startswith("tl.where(index == 0, ahead")
        assert single or whole, ast.unparse(call)


def test_without_triton_it_is_unavailable_in_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.unavailable_reason().startswith("triton is not installed; ")
