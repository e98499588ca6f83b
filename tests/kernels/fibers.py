"""The CUDA kernels' bodies compiled for the host, where a block's threads are fibers."""

import fcntl
import hashlib
import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.kernels import processes

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PLACE = ROOT / "build" / "fibers"


def module(*flags):
    """tests/kernels/cuda_module.cpp with csrc/cuda: the module's path.

    What an earlier build has left is taken if it came of the same sources and flags; of several
    processes one builds.
    """
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("kernels run on the host by g++ and from csrc, and one is missing")
    includes = [HERE, ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-w", *flags]
    command += ["-DELVA_CUDA_ARCHS", *(f"-I{x}" for x in includes)]
    sources = [HERE / "cuda_module.cpp", HERE / "cuda_host.cpp", ROOT / "csrc/bindings_cuda.cpp"]
    sources += [*(ROOT / "csrc/cuda").glob("*.cpp"), *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    folder = PLACE / hashlib.sha256(repr(command).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return built(path, command, sources, flags)


def built(path, command, sources, flags):
    folder, compiler = path.parent, command[0]
    origin, known = origin_of(command), folder / "origin"
    if known.exists() and known.read_text() == origin:
        return path
    known.unlink(missing_ok=True)
    objects = [str(folder / f"{i}.o") for i in range(len(sources))]
    processes.compile_all(
        [*command, "-x", "c++", "-c", str(source), "-o", made]
        for source, made in zip(sources, objects, strict=True)
    )
    processes.compile_one([compiler, *flags, "-shared", *objects, "-o", str(path)])
    for made in objects:
        Path(made).unlink()
    known.write_text(origin)
    return path


def origin_of(command):
    """A digest of the build's command and of every source that it may read."""
    digest = hashlib.sha256(repr(command).encode())
    for path in sorted([*HERE.glob("cuda_*"), *(ROOT / "csrc").rglob("*")]):
        if path.is_file():
            digest.update(f"{path} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()
