"""The rows of benchmarks/reliability: what each tries, what is kept, and the README's table."""

import os
import re
from pathlib import Path

import pytest

from benchmarks.reliability import row as rows
from benchmarks.reliability.row import Outcome, Row, Trials, measure
from benchmarks.reliability.rows import ROWS
from benchmarks.reliability.table import cell, table

SEED = int(os.environ.get("ELVA_TEST_SEED", "1"))  # another one than that of the kept figures
README = Path(__file__).parent.parent / "benchmarks" / "README.md"


@pytest.mark.parametrize("name", ROWS)
def test_a_share_of_the_row_goes_right(name):
    row = ROWS[name]
    if missing := row.missing():
        pytest.skip(missing)
    # Of mutants one that the tests are known to kill: another one might survive.
    outcome = row.run(Trials(0, row.smoke, 1 if name.startswith("mutants-") else SEED))
    assert outcome.tried == row.smoke
    assert outcome.wrong == []


def test_the_readme_has_what_is_kept():
    text = README.read_text(encoding="utf-8")
    found = re.search(r"<!-- reliability -->\n\n(.*?)\n\n<!-- end -->", text, re.S)
    assert found is not None
    assert found[1] == table(rows.KEPT)


def test_the_front_page_has_what_is_kept():
    lines = README.parents[1].joinpath("README.md").read_text(encoding="utf-8").splitlines()
    shown = {
        found[1]: line
        for line in lines
        if (found := re.search(r"\(benchmarks/results/reliability/(.*?)\.json\)", line))
    }
    assert len(shown) == 3
    for name, line in shown.items():
        assert cell(name, rows.kept(name)) in line and f"`reliability {name}`" in line


@pytest.mark.parametrize("name", ROWS)
def test_the_row_is_kept_and_nothing_went_wrong(name):
    found = rows.kept(name)
    assert found is not None and found["tried"] > 0
    assert found["failed"] == len(found["wrong"]) == 0


def odd(trials):
    outcome = Outcome()
    for number in trials.numbers:
        outcome.tried += 1
        outcome.counts["odd" if number % 2 else "even"] += 1
        outcome.measured("largest", number)
        if number == 7:
            outcome.wrong.append(f"{number} of seed {trials.seed}")
    return outcome


TRIED = Row("numbers", "none is 7", "numbers", amount=20, smoke=2, chunk=4, run=odd)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_run_that_was_ended_goes_on(tmp_path, monkeypatch, processes):
    monkeypatch.syspath_prepend(str(README.parents[1]))  # for the processes
    measure("row", TRIED, 6, 3, directory=tmp_path)
    found = measure("row", TRIED, 20, 3, processes=processes, directory=tmp_path)
    assert (found["tried"], found["failed"], found["wrong"]) == (20, 1, ["7 of seed 3"])
    assert found["counts"] == {"even": 10, "odd": 10} and found["most"] == {"largest": 19}
    assert [part["tried"] for part in found["parts"]] == [6, 14]
    with pytest.raises(SystemExit, match="row: --seed must be 3, of which 20 trials are kept"):
        measure("row", TRIED, 40, 4, directory=tmp_path)
    assert measure("row", TRIED, 20, 3, directory=tmp_path) == found
