"""The choice of what runs in a session of one backend: by values, and no clause is idle."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kernels import selections
from tests.kernels.selections import (
    SESSIONS,
    Clause,
    Session,
    check_dtypes,
    few_cases,
    select,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = (1, 2, 5, 32)


class Item:
    """What of a collected test a selection sees."""

    def __init__(self, function, **given):
        self.path, self.originalname = Path("test_topk.py"), function
        self.nodeid = f"test_topk.py::{function}[{given}]"
        self.callspec, self.marks = SimpleNamespace(params=given), []

    def get_closest_marker(self, name):
        return name if name in self.marks else None

    def add_marker(self, name):
        self.marks.append(name)

    def iter_markers(self, name):
        """As of two @parametrize, the first of which has two names."""
        if "size" in self.callspec.params:
            yield from (SimpleNamespace(args=(names,)) for names in ("size, whole", ["dtype"]))


ITEMS = [
    Item("test_numbers", backend="cuda", dtype=dtype, shape=shape)
    for dtype, shape in itertools.product(DTYPES, SHAPES)
]
OTHERS = [Item("test_errors"), Item("test_layouts", backend="cuda"), Item("test_map", backend="c")]


def session(never=(), thorough=()):
    return Session("cuda_on_fibers", ("test_topk",), {"": [*never]}, {"": [*thorough]})


def by_day(monkeypatch, choose):
    """What is chosen on each day, until it begins again."""
    kept = []
    for day in range(selections.DAYS):
        monkeypatch.setenv(selections.DAY, str(day))
        kept.append(choose())
    return kept


def test_a_value_is_not_a_part_of_another(monkeypatch):
    """float16 is not bfloat16, 2 is not float32, and test_map is no other test."""
    never = [
        Clause("test_topk::test_numbers", {"dtype": torch.float16}),
        Clause("test_topk::test_map"),
    ]
    long = [Clause("test_topk::test_numbers", {"shape": 2})]
    kept = select(session(never, long), ITEMS + OTHERS, thorough=True)
    assert kept == [x for x in ITEMS if x.callspec.params["dtype"] != torch.float16] + [OTHERS[1]]
    monkeypatch.setattr(selections, "NUMBERS", {"test_topk::test_numbers"})
    chosen = lambda: select(session(never, long), ITEMS + OTHERS, thorough=False)  # noqa: E731
    for kept in by_day(monkeypatch, chosen):
        assert torch.float16 not in {x.callspec.params.get("dtype") for x in kept}
        assert {x.callspec.params["shape"] for x in kept if x not in OTHERS} == {1, 5, 32}


def test_what_are_no_numbers_is_taken_on_one_of_the_days(monkeypatch):
    names = sorted(f"test_{first}{name}" for name in "abcdefghijkl" for first in "pqrst")
    items = [Item(name, **item.callspec.params) for name in names for item in ITEMS]
    kept = by_day(monkeypatch, lambda: few_cases(items))
    assert all(kept) and sorted(x.originalname for part in kept for x in part) == names
    assert len({str(x.callspec.params) for part in kept for x in part}) > 3, "each another case"


def test_what_is_a_backends_own_is_there_in_every_value(monkeypatch):
    own = [Item("test_own", dtype=dtype, shape=n) for dtype in DTYPES for n in SHAPES]
    (kept,) = filter(None, by_day(monkeypatch, lambda: few_cases(own)))
    assert len(kept) == len(SHAPES) and {x.callspec.params["shape"] for x in kept} == set(SHAPES)


JOINT = [(1, True), (1, False), (2, False)]


def test_few_cases_are_left_that_have_every_value_and_what_belongs_together(monkeypatch):
    seen = []
    for day in range(3):
        monkeypatch.setenv(selections.DAY, str(day))
        items = [
            Item("test_multiplied", dtype=dtype, shape=n, size=size, whole=whole)
            for dtype in DTYPES for n in SHAPES for size, whole in JOINT
        ]  # fmt: skip
        single = [Item("test_shapes", shape=n) for n in SHAPES]
        selections.leave_few_cases([*items, *single])
        left = [item.callspec.params for item in items if not item.marks]
        assert len(left) == len(SHAPES) and not any(item.marks for item in single)
        assert {x["dtype"] for x in left} == {*DTYPES} and {x["shape"] for x in left} == {*SHAPES}
        assert {(x["size"], x["whole"]) for x in left} == {*JOINT}
        seen.append(left)
    assert seen[0] != seen[1] != seen[2]


def test_a_case_that_is_thorough_anyway_stands_for_no_value():
    items = [Item("test_long", shape=n, dtype=dtype) for n in (1, 2) for dtype in DTYPES]
    for item in items[:3]:
        item.add_marker("thorough")
    selections.leave_few_cases(items)
    assert [len(item.marks) for item in items] == [1, 1, 1, 0, 0, 0]


def test_numbers_are_taken_in_every_dtype(monkeypatch):
    monkeypatch.setattr(selections, "NUMBERS", {"test_topk::test_numbers"})
    kept = few_cases(ITEMS)
    assert len(kept) == len(SHAPES)
    for name, values in (("dtype", DTYPES), ("shape", SHAPES)):
        assert {x.callspec.params[name] for x in kept} == set(values)


@pytest.mark.parametrize(
    "clause",
    [
        Clause("test_topk::test_number"),
        Clause("test_topk::test_numbers", {"dtype": torch.float64}),
        Clause("test_topk::test_numbers", {"shape": 1, "k": 3}),
    ],
    ids=str,
)
def test_a_clause_that_selects_nothing_is_an_error(clause):
    for idle in (session(never=[clause]), session(thorough=[clause])):
        with pytest.raises(pytest.UsageError, match="selects nothing"):
            select(idle, ITEMS, thorough=True)
    # About a file that was not collected it says nothing.
    others = [Item("test_errors", backend="cuda")]
    others[0].path = Path("test_reward.py")
    assert select(session(never=[clause]), others, thorough=True) == others


def test_a_dtype_that_did_not_run_is_seen():
    numbers = "test_topk::test_scores_and_order_against_float64"
    ran = [["id", numbers, str(dtype)] for dtype in DTYPES]
    check_dtypes(ran, session(), DTYPES)
    with pytest.raises(AssertionError):
        check_dtypes(ran[1:], session(), DTYPES)


def test_every_clause_is_about_a_file_of_its_session():
    for one in SESSIONS.values():
        clauses = [x for part in (one.never, one.thorough) for xs in part.values() for x in xs]
        assert clauses
        assert {x.file for x in clauses} <= set(one.files)
