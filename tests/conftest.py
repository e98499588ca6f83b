"""Settings of every test: fixed randomness, uninitialised memory that shows, and two tiers.

A test marked `thorough` runs with `--thorough`; of all of them `--thorough-share 2/7` runs those
whose node ids fall into share 2 of 7, so that shares 0 to 6 together run each of them once.
"""

import argparse
import importlib.util
import os
import sys
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if "benchmarks" not in sys.modules and BENCHMARKS.is_dir():
    # By its place: the import path has no source tree.
    spec = importlib.util.spec_from_file_location(
        "benchmarks", BENCHMARKS / "__init__.py", submodule_search_locations=[str(BENCHMARKS)]
    )
    assert spec is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="Measure the ops: run benchmarks/ and no tests."
    )
    parser.addoption("--thorough", action="store_true", help="Run the tests marked `thorough` too.")
    parser.addoption(
        "--every-case", action="store_true",
        help="Of a kernels' test run every combination of its parameters' values, by default few.",
    )  # fmt: skip
    parser.addoption(
        "--thorough-share", type=share, metavar="I/N", help="Run share I of N of those tests."
    )


def share(text: str) -> tuple[int, int]:
    """I and N of `I/N`, 0 <= I < N."""
    number, _, shares = text.partition("/")
    if not (number.isdecimal() and shares.isdecimal() and int(number) < int(shares)):
        raise argparse.ArgumentTypeError(f"must read I/N with 0 <= I < N, got {text!r}")
    return int(number), int(shares)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: long; run by --thorough and --thorough-share")
    if config.getoption("--benchmark"):
        if config.args_source is pytest.Config.ArgsSource.ARGS:
            raise pytest.UsageError("--benchmark: takes no paths; choose a benchmark with -k")
        config.args = [str(config.rootpath / "benchmarks")]
        config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, shares = config.getoption("--thorough-share") or (0, 0)
    left_out = {
        item
        for item in items
        if item.get_closest_marker("thorough")
        and not config.getoption("--thorough")
        and not (shares and zlib.crc32(item.nodeid.encode()) % shares == number)
    }
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    config.stash[LEFT_OUT] = len(left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    count = config.stash.get(LEFT_OUT, 0)  # a collection that failed was not looked through
    return [f"left to --thorough: {count} tests"] if count else []


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_memory():
    """`torch.empty` returns NaN, so that an element nobody wrote is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
