"""Triton kernels compile ahead of time for every target, and take what they took.

One of a few variants a target, in turn; all of all are thorough.
"""

import importlib.util
import json
import re

import pytest

from tests.kernels import triton_resources
from tests.kernels.triton_resources import TARGETS, compile_variant, resources, variant_names

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
FEW = ["forward-bf16-aligned", "backward-bf16-unaligned", "scores_gradient-fp32-aligned"]
CASES = [
    pytest.param(target, name, aligned, row, marks=[] if few else pytest.mark.thorough)
    for i, target in enumerate(TARGETS)
    for name, aligned, row in variant_names()
    for few in [row == FEW[i % 3] or (row, target) == ("value_and_grad-bf16-aligned", "sm_90")]
]


@pytest.mark.parametrize(("target", "name", "aligned", "row"), CASES)
def test_takes_no_more_than_it_took(target, name, aligned, row):
    """No spill to memory, and at most a tenth more registers and shared memory than committed."""
    triton = importlib.import_module("triton")
    table = json.loads(triton_resources.TABLE.read_text())
    taken = resources(compile_variant(name, aligned, target), target)
    assert taken["spilled_bytes"] == 0
    part = table.get(triton.__version__, {})
    if target in part:  # another compiler has its own figures
        for what in ("registers", "shared_bytes"):
            assert taken[what] <= 1.1 * part[target][row][what], what


def test_the_table_is_complete_and_shows_no_spill():
    table = json.loads(triton_resources.TABLE.read_text())
    rows = [row for *_, row in variant_names()]
    assert list(table["3.9.0"]) == list(TARGETS)
    assert "sm_90" in table["3.6.0"]  # torch 2.11's
    for version, part in table.items():
        for target, figures in part.items():
            assert list(figures) == rows, (version, target)
            spilling = [row for row in rows if figures[row]["spilled_bytes"]]
            assert not spilling, (version, target)


def test_compiled_arithmetic_is_what_the_numerics_rest_on():
    """No flush to zero or fusion in float32, barriers over all memory, loads that see stores.

    And rows 16 bytes at a time.
    """
    compiled = compile_variant("value_and_grad-bf16", True, "sm_90")
    assert len(re.findall(r"ttg\.barrier all|gpu\.barrier", compiled.asm["ttgir"])) == 3
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert "st.global.v4.b32" in compiled.asm["ptx"]
    assert "ld.global.nc" not in compiled.asm["ptx"]
    assert not re.search(r"(add|sub|mul|fma)\S*\.ftz", compiled.asm["ptx"])
    assert not re.search(r"fma\.rn\.f32", compiled.asm["ptx"])


def test_codes_are_copied_sixteen_at_a_time_and_multiplied_as_bytes():
    """Both bytes of a query, in the GPU's products of integers; nothing is fused behind them."""
    for name, columns in (("few", 16), ("many", 64)):
        compiled = compile_variant(f"code_bounds-{name}", True, "sm_90")
        product = rf"wgmma\S*\.m64n{columns}k32\.s32\.s8\.s8"
        assert len(re.findall(product, compiled.asm["ptx"])) % 2 == 0
        assert re.search(product, compiled.asm["ptx"])
        assert "cp.async.cg.shared.global" in compiled.asm["ptx"]
        assert "fma.rn.f32" not in compiled.asm["ptx"]
