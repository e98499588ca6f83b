"""What a person can mend is one line and exit code 2; a defect keeps its traceback."""

import pytest
import torch
import typer

import elva_kernels
from elva.cli.console import one_line_errors
from elva.errors import DataError, IndexFault, RunError, UserError


def refused_value():
    elva_kernels.topk(torch.ones(2, 4), torch.ones(3, 5), 1)


def refused_type():
    elva_kernels.topk("query", torch.ones(3, 4), 1)


@pytest.mark.parametrize("call", [refused_value, refused_type])
def test_what_the_kernels_refuse_is_one_line(call, capsys):
    with pytest.raises((TypeError, ValueError)) as refused:
        call()
    with pytest.raises(typer.Exit) as ended, one_line_errors():
        call()
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == f"elva: {refused.value}\n"


@pytest.mark.parametrize("kind", [DataError, RunError, IndexFault])
def test_errors_are_of_one_family(kind, capsys):
    assert issubclass(kind, UserError)
    with pytest.raises(typer.Exit) as ended, one_line_errors():
        raise kind("a: must be b; do c")
    assert ended.value.exit_code == 2 and capsys.readouterr().err == "elva: a: must be b; do c\n"


@pytest.mark.parametrize("kind", [TypeError, ValueError, KeyError])
def test_a_defect_keeps_its_traceback(kind):
    with pytest.raises(kind, match="ours"), one_line_errors():
        raise kind("ours")
