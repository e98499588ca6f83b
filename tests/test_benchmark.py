"""`pytest --benchmark`: the benchmarks are run as tests, and their reports printed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_says(*arguments):
    """What the command prints from the root, of the package that is installed."""
    command = [str(Path(sys.executable).parent / "pytest"), "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout


def test_the_benchmarks_print_their_report():
    code, text = pytest_says("--benchmark", "-k", "1x10x64")
    assert code == 0, text[-3000:]
    report = text[text.index("throughput: reward") :]
    assert "copy" in report and "GB/s" in report
    for provider in ("ours, value and grad", "torch eager, bmm + norms"):
        assert f"1x10x64 bf16 {provider}" in report


@pytest.mark.thorough
def test_the_option_collects_benchmarks_alone_and_without_it_there_are_none():
    code, text = pytest_says("--benchmark", "--collect-only", "-q")
    assert code == 0, text[-3000:]
    for op in ("reward", "topk", "in_batch"):
        assert f"benchmarks/bench_{op}.py::test_{op}[" in text
    assert "tests/" not in text
    code, text = pytest_says("--collect-only", "-q", "tests/test_benchmark.py")
    assert code == 0 and "benchmarks/" not in text
    code, _ = pytest_says("--benchmark", "tests/test_benchmark.py")
    assert code == 4  # a wrong command line
