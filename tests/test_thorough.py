"""The two tiers of the suite, on a tree of one plain test and fifty thorough ones."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
SHARES = 7
TREE = """
import pytest

def test_plain(): ...

@pytest.mark.thorough
@pytest.mark.parametrize("number", range(50))
def test_long(number): ...
"""


@pytest.fixture
def tree(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(test_tree=TREE)
    return pytester


def test_by_default_the_thorough_are_deselected_and_counted(tree):
    done = tree.runpytest("-q", "--strict-markers")
    done.assert_outcomes(passed=1, deselected=50)
    assert "left to --thorough: 50 tests" in done.outlines


def test_thorough_runs_all(tree):
    done = tree.runpytest("-q", "--thorough")
    done.assert_outcomes(passed=51, deselected=0)
    assert "left to" not in done.stdout.str()


def test_the_shares_run_each_test_once(tree):
    seen = []
    for number in range(SHARES):
        done = tree.runpytest("-v", "--thorough-share", f"{number}/{SHARES}")
        names = [line.split()[0] for line in done.outlines if "PASSED" in line]
        done.assert_outcomes(passed=len(names), deselected=51 - len(names))
        assert names.count("test_tree.py::test_plain") == 1 and 2 < len(names) < 20
        seen += [name for name in names if "test_long" in name]
    assert sorted(seen) == sorted(f"test_tree.py::test_long[{n}]" for n in range(50))


@pytest.mark.parametrize("share", ["7/7", "1", "-1/7", "a/7", "1/0"])
def test_a_share_that_is_none_is_refused(tree, share):
    done = tree.runpytest(f"--thorough-share={share}")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert f"must read I/N with 0 <= I < N, got '{share}'" in done.stderr.str()
