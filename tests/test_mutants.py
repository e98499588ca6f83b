"""The rows of mutants: what is mutated, how a run of tests ends, and what is kept of it."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.reliability import coverage
from benchmarks.reliability.mutants import ROWS, cpp, mutant, python, said, server, suites, trial
from benchmarks.reliability.mutants.equivalent import EQUIVALENT
from benchmarks.reliability.mutants.workshop import ROOT, SERVER
from benchmarks.reliability.row import Outcome, Trials

SUITES = {name: row.run.keywords["suites"] for name, row in ROWS.items()}
PYTHON = '''"""A docstring, 1 < 2."""
from typing import Literal
Kind = Literal[3]

def f(a: "int" = 4, *b) -> int:
    if not a or b and a <= -1.5:
        a.x = f"{a + 1}"
        return -a // 2
    a += 1
    b.append(True)
    assert a < 3
    return [c for c in b if (a) + (c) is not None][0] if a in b else None
'''
CPP = """// a < b
#define X 1 + 2
template <int N = 3> void f(const std::vector<int> &a, float *b) {
  static_assert(N < 4);
  if (a.size() > 5 && !b) {
    b[0] += 1.5f * a[N];
    clear(b);
    return g("1 < 2", 'x');
  }
}
"""


def changes(found):
    return Counter((one.line, one.change) for one in found)


def test_mutants_of_python_are_what_behaves():
    found = list(python.mutants("f.py", PYTHON))
    for one in found:
        compile(one.applied(PYTHON), "f.py", "exec")
    assert changes(found) == Counter([
        (5, "4 -> 5"),
        (6, "not a or b and a <= -1.5 -> True"), (6, "not a or b and a <= -1.5 -> False"),
        (6, "or -> and"), (6, "and -> or"), (6, "not -> "), (6, "<= -> <"), (6, "- -> "),
        (6, "1.5 -> 2.5"),
        (7, 'a.x = f"{a + 1}" -> pass'),
        (8, "return -a // 2 -> return None"), (8, "- -> "), (8, "// -> *"), (8, "2 -> 3"),
        (9, "+= -> -="), (9, "a += 1 -> pass"), (9, "1 -> 2"),
        (10, "b.append(True) -> pass"), (10, "True -> False"),
        (12, "return [c for c in b if (a) + (c) is not None][0] if a in... -> return None"),
        (12, "(a) + (c) is not None -> True"), (12, "+ -> -"), (12, "is not -> is"), (12, "0 -> 1"),
        (12, "a in b -> True"), (12, "a in b -> False"), (12, "in -> not in"),
    ])  # fmt: skip


def test_mutants_of_cpp_are_no_templates_comments_or_texts():
    assert changes(cpp.mutants("f.cpp", CPP)) == Counter([
        (5, "a.size() > 5 && !b -> true"), (5, "a.size() > 5 && !b -> false"), (5, "> -> >="),
        (5, "5 -> 6"), (5, "&& -> ||"), (5, "! -> "),
        (6, "0 -> 1"), (6, "+= -> -="), (6, "1.5 -> 2.5"), (6, "* -> /"),
        (6, "b[0] += 1.5f * a[N]; -> ;"),
        (7, "clear(b); -> ;"),
    ])  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_source_of_a_row_has_tests_and_mutants_that_apply(name):
    """Of each its first and last, so that places and text agree."""
    drawn = trial.sample(SUITES[name], 1)
    assert len(drawn) > 500 and len({one for _, one in drawn}) == len(drawn)
    for suite in SUITES[name]:
        for source, tests in suite.sources.items():
            assert tests and all((ROOT / test.partition("::")[0]).is_file() for test in tests)
            text = mutant.read(ROOT, source)
            found = list(suite.made(source, text))
            for one in (found[0], found[-1]) if found else ():
                changed = one.applied(text)
                assert changed != text and changed.count("\n") <= text.count("\n")


def test_the_order_of_trials_is_of_what_is_changed_and_not_of_where():
    before = mutant.shuffled(python.mutants("f.py", PYTHON), 3)
    after = mutant.shuffled(python.mutants("f.py", f"# a line\n{PYTHON}"), 3)
    assert [one.key for one in before] == [one.key for one in after]
    assert before != mutant.shuffled(before, 4) and {*before} == {*mutant.shuffled(before, 4)}


def test_each_equivalent_is_a_mutant_of_today():
    known = {one.key for name in SUITES for _, one in trial.sample(SUITES[name], 1)}
    assert {*EQUIVALENT} <= known
    assert all(EQUIVALENT.values())


TESTS = {
    "passed": "def test_a(): pass\ndef test_b(): pass",
    "failed": "def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pass",
    "crashed": "import os\ndef test_a(): pass\ndef test_b(): os.kill(os.getpid(), 11)",
    "timed out": "def test_a(): pass\ndef test_b():\n  while True: pass",
    "waits": "import time\ndef test_b(): time.sleep(1000)",
    "leaves out": "import pytest\n@pytest.fixture\ndef slow(): 1 / 0\ndef test_b(slow): pass\n"
    "def test_a(): pass",
    "is no module": "def test_a(:",
}


def test_a_server_says_how_tests_end(tmp_path):
    """Whatever they do, one after the other in the same server."""
    (tmp_path / "pyproject.toml").touch()
    for number, text in enumerate(TESTS.values()):
        (tmp_path / f"test_{number}.py").write_text(text)
    asked = [
        json.dumps({"words": [f"test_{number}.py"], "seconds": 1, "without": ["slow"]})
        for number in range(len(TESTS))
    ]
    done = subprocess.run(
        [sys.executable, str(SERVER)], cwd=tmp_path, input="\n".join(asked), text=True,
        capture_output=True, check=True, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["end"], one["test"].partition("::")[2]) for one in answers] == [
        ("passed", "test_b"), ("failed", "test_b"), ("crashed", "test_b"), ("timed out", "test_b"),
        ("timed out", "test_b"), ("passed", "test_a"), ("failed", ""),
    ]  # fmt: skip
    assert server.WALL >= 1 and all(one["cpu"] < 4 for one in answers)


class Shop:
    """A workshop whose runs end as they are told to."""

    def __init__(self, *ends):
        self.ends, self.asked = [*ends], []

    def mutated(self, one):
        return open(os.devnull)

    def run(self, suite, words):
        self.asked.append(words)
        end, test = self.ends.pop(0)
        return {"end": end, "test": test, "cpu": 0.0}


def test_killed_is_what_a_test_finds_that_passes_without_the_mutant():
    suite = suites.INDEX
    one = next(x for x in suite.mutants() if x.key not in EQUIVALENT)
    test, words = "tests/a.py::test_a", suite.words(one)
    for ends, verdict in (
        ([("failed", test), ("passed", test)], "killed"),
        ([("crashed", test), ("passed", test)], "killed"),
        ([("timed out", test), ("passed", test)], "timed out"),
        ([("failed", test), ("failed", test)], "unsound"),
        ([("failed", "tests/a.py"), ("passed", "")], "killed"),
        ([("passed", test)], "survived"),
    ):
        judge = trial.Judge(Shop(*ends))
        assert judge.verdict(suite, one)[0] == verdict
        alone = [test] if ends[0][1] == test else ["--collect-only", *words]
        assert judge.shop.asked == [words, alone][: len(ends)]
    judge = trial.Judge(Shop(*[("failed", test), ("passed", test), ("failed", test)]))
    assert [judge.verdict(suite, one)[0] for _ in range(2)] == ["killed"] * 2  # known by now
    known = next(x for x in suite.mutants() if x.key in EQUIVALENT)
    verdict, words = trial.Judge(Shop()).verdict(suite, known)
    assert verdict == "equivalent" and EQUIVALENT[known.key] in words


def test_a_row_goes_wrong_where_none_is_killed_and_says_when_it_is_below_its_goal():
    for killed, survived, wrong in ((54, 6, False), (1, 59, False), (0, 1, True), (0, 0, False)):
        late = min(killed, 1)
        counts = Counter({"killed": killed - late, "timed out": late, "survived": survived})
        lines = trial.unnoticed(Outcome(60, counts + Counter(equivalent=5)), Trials(0, 60, 7))
        assert bool(lines) == wrong and all("0 to 59 of seed 7" in line for line in lines)
    below = {"counts": {"killed": 8, "survived": 2}, "most": {"mutants": 1234.0}}
    assert said(below).startswith("8 of 10 killed (80 %: below the goal), ")
    kept = {"counts": {"killed": 8, "timed out": 1, "survived": 1}, "most": {"mutants": 1234.0}}
    assert said(kept) == "9 of 10 killed (90 %), 0 equivalent, 1 survive; a sample of 1,234"


def test_coverage_is_added_up_by_room():
    one = {"covered_lines": 3, "num_statements": 4, "covered_branches": 1, "num_branches": 2}
    told = {"files": {"a.py": {"summary": one}, "b.py": {"summary": one}}}
    found = coverage.rooms(told, {"both": ["a.py", "b.py"], "first": ["a.py"]})
    assert found == {"both": (6, 8, 2, 4), "first": (3, 4, 1, 2)}
    assert coverage.table(found).endswith("| first | 50.0 % of 2 | 75.0 % of 4 |")
    with pytest.raises(ValueError, match=r"c\.py: must be measured"):
        coverage.rooms(told, {"other": ["c.py"]})
    assert all(coverage._files(room) for room in coverage.ROOMS)
