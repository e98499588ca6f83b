"""The CUDA kernels without a GPU: their bodies on the host, under the contract suite."""

import pytest

from elva_kernels.backends import cuda
from tests.kernels import fibers, processes, selections
from tests.kernels.cases import ON_FIBERS

FIBERS = selections.SESSIONS["fibers"]
pytestmark = pytest.mark.skipif(ON_FIBERS, reason="this is the session on fibers")

SANITIZED = (
    "test_sanitized",
    "test_sanitized_bank",
    "test_sanitized_search",
    "test_sanitized_search_by_products",
    "test_sanitized_codes",
    "test_sanitized_select",
    "test_sanitized_batch",
    "test_sanitized_product",
    "test_sanitized_score_rows",
    "test_sanitized_slope_rows",
    "test_sanitized_spread_rows",
)


def on_fibers(config):
    module = fibers.module()
    return selections.run("fibers", FIBERS.files, ELVA_TEST_CUDA_HOST=str(module))


def sanitized(config, *options):
    """Of the kernels' bodies, on blocks of exactly the memory that they ask for."""
    # What the sanitizers look for takes the compiler many times as long where it optimises.
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g")
    module = fibers.module(*flags)
    runtimes = [
        processes.run(["g++", f"-print-file-name={name}"], check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        "ELVA_TEST_CUDA_HOST": str(module),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    tests = [f"cuda_on_fibers::{test}" for test in SANITIZED]
    return selections.run("fibers", tests, *options, **environment)


@pytest.mark.beside(work=on_fibers)
def test_contract_on_fibers(beside):
    selections.check_dtypes(beside, FIBERS, cuda.DTYPES)


@pytest.mark.thorough
@pytest.mark.parametrize(("file", "part"), selections.in_parts(FIBERS))
def test_whole_contract_on_fibers(pytestconfig, file, part):
    module = fibers.module()
    environment = {"ELVA_TEST_CUDA_HOST": str(module), selections.PART: part}
    selections.run("fibers", [file], "--thorough", **environment)


@pytest.mark.thorough
@pytest.mark.beside(work=sanitized)
def test_address_sanitizer_is_silent(beside):
    assert beside


@pytest.mark.thorough
def test_address_sanitizer_is_silent_in_every_case(pytestconfig):
    assert sanitized(pytestconfig, "--thorough")
