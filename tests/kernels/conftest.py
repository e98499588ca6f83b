"""Fixtures of the kernel tests."""

import importlib

import pytest
import torch

from tests.kernels.cases import INTERPRETED


@pytest.fixture(scope="session", autouse=INTERPRETED)
def _bfloat16_of_a_gpu():
    """Triton's interpreter truncates to bfloat16 and loses its subnormals; no GPU does either."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(values.copy()).bfloat16()
            return rounded.view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            wide = torch.from_numpy(values.copy()).view(torch.bfloat16).float()
            return wide.view(torch.uint32).numpy()
        return convert(values, source, target, rounding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", exact)
        yield


@pytest.fixture
def backend(request, monkeypatch):
    """The backend's name; for "cpu:avx2" the compiled module is held to that level meanwhile."""
    name, _, level = request.param.partition(":")
    if not level:
        yield name
        return
    compiled = importlib.import_module("elva_kernels._C")
    monkeypatch.setenv("ELVA_KERNELS_CPU_LEVEL", level)
    compiled.reset_level()
    assert compiled.level() == level
    yield name
    monkeypatch.undo()
    compiled.reset_level()
