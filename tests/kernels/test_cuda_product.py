"""The CUDA launchers' matrix products, which are torch's: exact in float32 whatever torch is told.

On a CPU the same torch calls run, and the same switches are set and read.
"""

import subprocess
import sys

import pytest
import torch

from elva_kernels.backends.cuda.in_batch import product
from tests.kernels.cases import ON_FIBERS

pytestmark = pytest.mark.skipif(ON_FIBERS, reason="on fibers the product is another")


def factors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 64, 64, generator=generator)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_it(lower):
    a, b = factors()
    before = product(a, b)
    with torch.autocast("cpu", lower):
        within = product(a, b)
        assert torch.mm(a, b).dtype == lower
    assert within.dtype == torch.float32
    assert torch.equal(within, before)
    assert torch.allclose(before.double(), a.double() @ b.double(), atol=1e-4)


@pytest.mark.parametrize(
    ("told", "then"),
    [
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "'tf32' == matmul.fp32_precision"),
        ("torch.backends.fp32_precision = 'tf32'", "'tf32' == matmul.fp32_precision"),
        ("matmul.allow_tf32 = True", "matmul.allow_tf32 is True"),
        ("torch.set_float32_matmul_precision('high')", "matmul.allow_tf32 is True"),
    ],
)
def test_every_switch_of_tf32_is_off_within_and_as_before_after(told, then):
    program = f"""
import torch
from elva_kernels.backends.cuda import in_batch
matmul = torch.backends.cuda.matmul
{told}
seen = []
mm = torch.mm
torch.mm = lambda *a: (seen.append(matmul.fp32_precision), mm(*a))[1]
in_batch.product(torch.ones(2, 3), torch.ones(3, 2))
assert seen == ["ieee"], seen
assert {then}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
