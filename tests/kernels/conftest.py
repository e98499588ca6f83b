"""Fixtures of the kernel tests."""

import importlib

import pytest


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
