"""Which cases run at which CPU level by default."""

import itertools

import pytest

from tests.kernels.cases import on_diagonal


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "axes", [(4,), (4, 9), (9, 4), (2, 4, 9), (4, 2, 7), (3, 3, 2, 4)], ids=str
)
def test_every_case_runs_once_and_every_level_sees_every_value(levels, axes):
    """Of an axis that has no more values than there are levels, as dtypes have."""
    cases = list(itertools.product(*(range(n) for n in axes)))
    taken = [[on_diagonal(i, level, levels) for level in range(levels)] for i in range(len(cases))]
    assert all(row.count(True) == 1 for row in taken)
    short = [axis for axis, n in enumerate(axes) if n <= levels and len(axes) > 1]
    for level in range(levels):
        here = [case for case, row in zip(cases, taken, strict=True) if row[level]]
        for axis in short:
            assert {case[axis] for case in here} == {*range(axes[axis])}
