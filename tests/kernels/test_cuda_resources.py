"""The CUDA kernels of the compiled module spill nothing and take what they took."""

import importlib
import json

import pytest

from elva_kernels import doctor
from tests.kernels import cuda_resources
from tests.kernels.cuda_resources import ARCHITECTURES, TABLE, kernel_name

TAKEN = json.loads(TABLE.read_text())


def test_the_table_is_complete_and_shows_no_spill():
    assert tuple(TAKEN) == ARCHITECTURES
    kernels = [tuple(rows) for rows in TAKEN.values()]
    assert kernels[0] and len(set(kernels)) == 1
    for architecture, rows in TAKEN.items():
        assert not [name for name, row in rows.items() if row["spilled_bytes"]], architecture


def test_the_module_takes_no_more_than_it_took():
    """No spill, and at most a tenth more registers than committed."""
    native = doctor().native
    if not native.get("cuda"):
        pytest.skip("elva_kernels._C was built without nvcc")
    if cuda_resources.cuobjdump() is None:
        pytest.skip("there is no cuobjdump: neither the CUDA toolkit nor triton is installed")
    found = cuda_resources.resources(importlib.import_module("elva_kernels._C").__file__)
    built = [f"sm_{x}" for x in native["cuda_archs"]]
    known = set(built) & set(ARCHITECTURES)
    if not known:
        pytest.skip(f"elva_kernels._C is built for {built}, the table for {ARCHITECTURES}")
    for architecture in known:
        assert list(found[architecture]) == list(TAKEN[architecture])
        for name, row in found[architecture].items():
            assert row["spilled_bytes"] == 0, (architecture, name)
            assert row["registers"] <= 1.1 * TAKEN[architecture][name]["registers"], name


def test_names_of_kernels():
    mangled = "_ZN4elva41_GLOBAL__N__8e30eb52_9_reward_cu_fd92f31a14reward_forwardINS_4Fp16EEEv14X"
    assert kernel_name(mangled) == "reward_forward<Fp16>"
