"""`pytest --benchmark`: every case is a test, red where the op is; the reports come at the end.

pytest-benchmark times our own call of each case, so that its options work
(`--benchmark-compare`, `--benchmark-json`). The reports are ours: there every provider takes turns
with its rivals and with the machine's ceilings.
"""

import pytest
import torch

from benchmarks import report
from benchmarks.timing import Tally

TALLIES: pytest.StashKey[dict[str, Tally]] = pytest.StashKey()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Where the cases of a module put their rows; the module is called bench_<op>."""
    torch.manual_seed(0)
    op = request.module.__name__.rpartition("bench_")[2]
    return request.config.stash.setdefault(TALLIES, {}).setdefault(op, Tally(op))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for op, tally in config.stash.get(TALLIES, {}).items():
        if tally.rows:
            terminalreporter.section(f"throughput: {op}")
            terminalreporter.write_line(report.show(tally.result()))
