"""Settings of every test: fixed randomness, and uninitialised memory that shows."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="Measure the ops: run benchmarks/ and no tests."
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        if config.args_source is pytest.Config.ArgsSource.ARGS:
            raise pytest.UsageError("--benchmark: takes no paths; choose a benchmark with -k")
        config.args = [str(config.rootpath / "benchmarks")]
        config.addinivalue_line("python_files", "bench_*.py")


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
