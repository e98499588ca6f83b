"""Builds elva_kernels._C from csrc through ninja: the CPU always, CUDA when nvcc is found. Needs no torch.

ELVA_KERNELS_CUDA=0|1 decides explicitly (1 without nvcc is an error); ELVA_KERNELS_CUDA_ARCHS="80 90a" names the
architectures. CXX, CXXFLAGS and LDFLAGS are honoured. Without a working C++ compiler the package installs without _C,
and elva_kernels.doctor() says so.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -pthread -Wall -Wextra "
    "-Wno-maybe-uninitialized"  # gcc 12 warns inside its own intrinsics
)
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
LEVELS = {"0": ""}  # ELVA_LEVEL in csrc/cpu/simd.h -> the flags that only its object gets
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS |= {"1": AVX2, "2": AVX512, "3": f"{AVX512} -mavx512bf16"}
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -warn-spills -Werror all-warnings"
DEFAULT_ARCHS = "80 90a 100 120"
RULES = """
rule cxx
  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out
  depfile = $out.d
rule nvcc
  command = $nvcc -MMD -MF $out.d $nvccflags -c $in -o $out
  depfile = $out.d
rule link
  command = $cxx -shared -pthread $in $ldflags -o $out
"""


def working_compiler() -> str | None:
    """CXX, or the first of the usual names, that compiles a program with Python's headers."""
    include = sysconfig.get_path("include")
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "trial.cpp")
            source.write_text("#include <Python.h>\n#include <vector>\n")
            command = [*name.split(), "-std=c++17", f"-I{include}", "-c", str(source), "-o", f"{source}.o"]
            if shutil.which(command[0]) and not subprocess.run(command, capture_output=True).returncode:
                return name
    return None


def cuda_build() -> tuple[Path | None, list[str]]:
    """nvcc and the architectures to build for; (None, []) for none."""
    sources, wish = sorted(ROOT.glob("csrc/cuda/*.cu")), os.environ.get("ELVA_KERNELS_CUDA", "")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if wish not in ("", "0", "1"):
        sys.exit(f"ELVA_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0" or not sources:
        return None, []
    if nvcc is None:
        if wish == "1":
            sys.exit("ELVA_KERNELS_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME")
        print("elva_kernels: no nvcc found, building for the CPU only", file=sys.stderr)
        return None, []
    archs = os.environ.get("ELVA_KERNELS_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", " ").replace(";", " ")
    return Path(nvcc).resolve(), archs.split()


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx = working_compiler()
        if cxx is None:
            print("elva_kernels: no working C++ compiler (with Python's headers), installing without _C", file=sys.stderr)
            return
        import pybind11

        build, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc, archs = cuda_build()
        includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
        codes = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        ldflags = os.environ.get("LDFLAGS", "") + (" -undefined dynamic_lookup" if sys.platform == "darwin" else "")
        if nvcc:
            ldflags += f" -L{nvcc.parent.parent}/lib64 -lcudart_static -lrt -ldl"
        lines = [f"cxx = {cxx}", f"nvcc = {nvcc}", f"ldflags = {ldflags}", f"nvccflags = {NVCC_FLAGS} {codes}"]
        lines += [f"flags = {CXX_FLAGS} {includes} {os.environ.get('CXXFLAGS', '')}", RULES]
        objects = {f"level{level}.o": ("cxx", "csrc/cpu/reward_simd.cpp", f"-DELVA_LEVEL={level} {extra}")
                   for level, extra in LEVELS.items()}
        for source in (*sorted(ROOT.glob("csrc/cpu/*.cpp")), ROOT / "csrc/bindings.cpp"):
            if source.name != "reward_simd.cpp":
                defines = f'-DELVA_CUDA_ARCHS=\\"{",".join(archs)}\\"' if source.name == "bindings.cpp" else ""
                objects[f"{source.stem}.o"] = ("cxx", source.relative_to(ROOT), defines)
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")) if nvcc else ():
            objects[f"cuda_{source.stem}.o"] = ("nvcc", source.relative_to(ROOT), "")
        for name, (rule, source, extra) in objects.items():
            lines += [f"build {name}: {rule} {ROOT / source}", f"  extra = {extra}"]
        lines += [f"build {target}: link {' '.join(objects)}", ""]
        (build / "build.ninja").write_text("\n".join(lines).replace("'", ""))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)


setup(ext_modules=[Extension("elva_kernels._C", [], optional=True)], cmdclass={"build_ext": NinjaBuild})
