"""What a GPU will be asked (`benchmarks.gpu_check`), as far as it can be asked without one."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from elva_kernels import available_backends
from elva_kernels.backends import choice, table

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
if "benchmarks" not in sys.modules:  # by its place: the import path has no source tree
    spec = importlib.util.spec_from_file_location(
        "benchmarks", BENCHMARKS / "__init__.py", submodule_search_locations=[str(BENCHMARKS)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
gpu_check = importlib.import_module("benchmarks.gpu_check")
needs_cpu = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the cpu backend stands in for a GPU"
)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["gpu_check", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    return ended.value.code


@needs_cpu
@pytest.mark.parametrize(
    ("only", "checks", "not_run"),
    [("search", 4, 0), pytest.param("", 24, 6, marks=pytest.mark.thorough)],
)
def test_dry_run_is_green(monkeypatch, capsys, only, checks, not_run):
    assert run(monkeypatch, "--dry-run", "--only", only) == 0
    told = capsys.readouterr().out
    assert f"\n{checks} checks, 0 red" in told
    assert told.count("not run: it needs a GPU") == not_run
    for provider in ("reward 4x102x64 bf16 ours, cpu", "host time of a call"):
        assert provider in told


@needs_cpu
@pytest.mark.parametrize(
    ("op", "check", "wrong_result"),  # a gradient on candidates, or the scores
    [
        ("ranking_reward_and_grad", "grouped reward", 7),
        ("info_nce_and_grad", "in-batch ops", 11),
        ("topk", "search", 0),
    ],
)
def test_a_wrong_kernel_is_red(monkeypatch, capsys, op, check, wrong_result):
    right = table.LAUNCHERS[op]["cpu"]

    def wrong(*tensors, **options):
        results = right(*tensors, **options)
        return tuple(x * 1.01 if i == wrong_result else x for i, x in enumerate(results))

    row = table.LAUNCHERS[op] | {"cpu": wrong}
    monkeypatch.setitem(table.LAUNCHERS, op, row)
    choice.launcher.cache_clear()
    try:
        assert run(monkeypatch, "--dry-run", "--no-benchmark", "--only", check) == 1
    finally:
        monkeypatch.undo()
        choice.launcher.cache_clear()
    assert "over its bound" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_can_be_done(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "--dry-run does what can be done" in run(monkeypatch)
    assert "--only must be one of grouped reward" in run(monkeypatch, "--dry-run", "--only", "x")
