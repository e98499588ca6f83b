"""The CUDA kernels without a GPU: their bodies on the host, under the contract suite."""

import hashlib
import shutil
import sysconfig
import tempfile
import threading
from pathlib import Path

import pytest

from elva_kernels.backends import cuda
from tests.kernels import processes, selections
from tests.kernels.cases import ON_FIBERS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FIBERS = selections.SESSIONS["fibers"]
pytestmark = pytest.mark.skipif(ON_FIBERS, reason="this is the session on fibers")

BUILDING = threading.Lock()
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


def build(folder, *flags):
    """tests/kernels/cuda_module.cpp with csrc/cuda: the module's path.

    What lies in `folder` from an earlier build is taken if it came of the same sources and flags.
    """
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("kernels run on the host by g++ and from csrc, and one is missing")
    module = folder / f"cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [HERE, ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-w", *flags]
    command += ["-DELVA_CUDA_ARCHS", *(f"-I{x}" for x in includes)]
    sources = [HERE / "cuda_module.cpp", HERE / "cuda_host.cpp", ROOT / "csrc/bindings_cuda.cpp"]
    sources += [*(ROOT / "csrc/cuda").glob("*.cpp"), *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    with BUILDING:
        return built(module, command, sources, flags)


def built(module, command, sources, flags):
    folder, compiler = module.parent, command[0]
    origin, known = origin_of(command), folder / "origin"
    if known.exists() and known.read_text() == origin:
        return module
    known.unlink(missing_ok=True)
    objects = [str(folder / f"{i}.o") for i in range(len(sources))]
    processes.compile_all(
        [*command, "-x", "c++", "-c", str(source), "-o", made]
        for source, made in zip(sources, objects, strict=True)
    )
    processes.compile_one([compiler, *flags, "-shared", *objects, "-o", str(module)])
    for made in objects:
        Path(made).unlink()
    known.write_text(origin)
    return module


def origin_of(command):
    """A digest of the build's command and of every source that it may read."""
    digest = hashlib.sha256(repr(command).encode())
    for path in sorted([*HERE.glob("cuda_*"), *(ROOT / "csrc").rglob("*")]):
        if path.is_file():
            digest.update(f"{path} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def home(config, name):
    """The folder for a build that pytest's cache keeps, or one of this process alone."""
    if hasattr(config, "cache"):
        return config.cache.mkdir(f"elva_{name}")
    return Path(tempfile.mkdtemp(prefix=name))


def on_fibers(config):
    module = build(home(config, "cuda_host"))
    return selections.run("fibers", FIBERS.files, ELVA_TEST_CUDA_HOST=str(module))


def sanitized(config, *options):
    """Of the kernels' bodies, on blocks of exactly the memory that they ask for."""
    # What the sanitizers look for takes the compiler many times as long where it optimises.
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g")
    module = build(home(config, "cuda_host_sanitized"), *flags)
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
    module = build(home(pytestconfig, "cuda_host"))
    environment = {"ELVA_TEST_CUDA_HOST": str(module), selections.PART: part}
    selections.run("fibers", [file], "--thorough", **environment)


@pytest.mark.beside(work=sanitized)
def test_address_sanitizer_is_silent(beside):
    assert beside


@pytest.mark.thorough
def test_address_sanitizer_is_silent_in_every_case(pytestconfig):
    assert sanitized(pytestconfig, "--thorough")
