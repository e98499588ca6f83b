"""The CUDA kernels without a GPU: their bodies on the host, under the contract suite."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.kernels.cases import ON_FIBERS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
pytestmark = pytest.mark.skipif(ON_FIBERS, reason="this is the session on fibers")

HALF = "cuda and not float64 and not float16"
TOPK = f"{HALF} and not offsets_beyond and not map and not compiles"
STATISTICS = f"{HALF} and not any_batch and not many and not 50-70"
IN_BATCH = f"{HALF} and not compiles and not gradcheck"
INFO_NCE = f"{HALF} and not threads and not any_batch and not workspace"
# Of the contract suite, what fibers get through in seconds, and the order in which they run.
CHOSEN = [
    ("cuda_on_fibers.py", "", "forwards"),
    ("cuda_on_fibers.py", "sanitized or odd_rows or any_batch or four", "reversed"),
    ("cuda_on_fibers.py", "sanitized or odd_rows or any_batch or two", "3"),
    ("test_reward.py", "not float64 and not float16 and not threads_and_repeats", "7"),
    ("test_topk.py", TOPK, "5"),
    ("test_statistics.py", STATISTICS, "forwards"),
    (
        "test_in_batch_reward.py",
        "cuda and not 64 and not float16 and not compiles and not gradcheck",
        "2",
    ),
    ("test_infonce.py", INFO_NCE, "9"),
    ("test_reward_torch.py", "opcheck and bfloat16", "forwards"),
]


def build(folder, *flags):
    """tests/kernels/cuda_module.cpp with csrc/cuda: the module's path."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("kernels run on the host by g++ and from csrc, and one is missing")
    module = folder / f"cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [HERE, ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
    command = [compiler, "-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-w", *flags]
    command += ["-DELVA_CUDA_ARCHS", *(f"-I{x}" for x in includes)]
    sources = [HERE / "cuda_module.cpp", HERE / "cuda_host.cpp", ROOT / "csrc/bindings_cuda.cpp"]
    sources += [*(ROOT / "csrc/cuda").glob("*.cpp"), *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    running = []
    for i, source in enumerate(sources):
        step = [*command, "-x", "c++", "-c", str(source), "-o", str(folder / f"{i}.o")]
        running.append(subprocess.Popen(step))
    assert [x.wait() for x in running] == [0] * len(sources)
    objects = [str(folder / f"{i}.o") for i in range(len(sources))]
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", str(module)], check=True)
    return module


def run_on_fibers(module, file, chosen, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(HERE / file), "-k", chosen],
        cwd=ROOT,
        env=os.environ | {"ELVA_TEST_CUDA_HOST": str(module)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cuda_host"))


@pytest.mark.parametrize(("file", "chosen", "order"), CHOSEN)
def test_contract_on_fibers(module, file, chosen, order):
    done = run_on_fibers(module, file, chosen, ELVA_HOST_ORDER=order)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_address_sanitizer_is_silent(tmp_path):
    """Of the kernels' bodies, on blocks of exactly the memory that they ask for."""
    module = build(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    done = run_on_fibers(
        module,
        "cuda_on_fibers.py",
        "sanitized",
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
