"""What the library says about the machine it runs on."""

import shutil

import pytest
import torch

from elva_kernels import BackendUnavailable, available_backends, doctor, ranking_reward
from elva_kernels.backends import choice
from elva_kernels.backends.cuda import _runs_on
from elva_kernels.backends.table import BACKENDS, LAUNCHERS


def test_reports_every_backend_in_a_sentence():
    report = doctor()
    assert report.backends == available_backends()
    assert list(report.backends) == list(BACKENDS)
    assert report.backends["reference"] is None
    assert report.versions["torch"] == torch.__version__
    for name in report.backends:
        assert name in str(report)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler to build _C with")
def test_the_compiled_module_runs_where_it_could_be_built():
    assert available_backends()["cpu"] is None
    assert doctor().native["level"] in doctor().native["levels"]


def test_a_backend_that_cannot_run_is_passed_over_by_auto_and_refused_by_name(monkeypatch):
    broken = BACKENDS["cpu"]._replace(unavailable_reason=lambda: "it is not built")
    monkeypatch.setitem(BACKENDS, "cpu", broken)
    choice.launcher.cache_clear()
    try:
        inputs = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 5, 8)
        expected = ranking_reward(*inputs, backend="reference")
        assert torch.equal(ranking_reward(*inputs).reward, expected.reward)
        with pytest.raises(BackendUnavailable, match="got 'cpu'; it is not built"):
            ranking_reward(*inputs, backend="cpu")
        assert "it is not built" in str(doctor())
    finally:
        choice.launcher.cache_clear()


def test_every_op_has_a_reference_and_only_known_backends():
    for op, row in LAUNCHERS.items():
        assert "reference" in row, op
        assert set(row) <= set(BACKENDS), op


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("100", (10, 3), True),
        ("100", (9, 0), False),
        ("120", (12, 1), True),
        ("121a", (12, 0), False),
    ],
)
def test_which_gpus_run_what_is_compiled(arch, capability, runs):
    assert _runs_on(arch, capability) == runs
