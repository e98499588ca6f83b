"""Builds elva_kernels._C from csrc through ninja: the CPU always, CUDA where nvcc and a GPU are.

CUDA is built for the machine's GPUs. A machine without one builds none by default, since all
architectures take minutes that most such builds, wheels and laptops, have no use for: an image for
other machines names theirs by ELVA_KERNELS_CUDA_ARCHS="80 90a", or takes all by
ELVA_KERNELS_CUDA=1; 0 never builds CUDA. CXX, CXXFLAGS and LDFLAGS are honoured;
ELVA_KERNELS_WERROR=1 makes errors of nvcc's warnings. Without a C++ compiler no _C is installed.
What is left out is printed, and doctor() says why.
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
AVX512BF16 = f"{AVX512} -mavx512bf16 -mavx512vnni"
# The compiler's macro for a processor family -> ELVA_LEVEL in csrc/cpu/levels.h, beside plain's 0,
# -> flags of that level's *_simd objects. The tiles of the last one are in assembler.
LEVELS = {
    "__aarch64__": {1: "", 2: "-march=armv8.2-a+dotprod"},
    "__x86_64__": {3: AVX2, 4: AVX512, 5: AVX512BF16, 6: AVX512BF16},
}
# By a compute capability's first number; as far as nvcc knows them.
CUDA_ARCHS = {"8": "80", "9": "90a", "10": "100", "12": "120"}
# gcc 12 warns inside its own intrinsics, and of how files pass vectors that stay in one file.
NINJA = """
cxxflags = -std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -pthread $
  -Wall -Wextra -Wno-maybe-uninitialized -Wno-psabi {quiet} {CXXFLAGS}
nvccflags = -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -warn-spills{strict} $
  --threads 0 {gencode}
rule cxx
  command = {cxx} -MMD -MF $out.d $cxxflags $extra -c $in -o $out
  depfile = $out.d
rule nvcc
  command = {nvcc} -MMD -MF $out.d $nvccflags -c $in -o $out
  depfile = $out.d
rule link
  command = {link} -shared $in {LDFLAGS} -o $out
"""


def working_compiler() -> str | None:
    """CXX, or the first of the usual names, that compiles a program with Python's headers."""
    trial = f"-std=c++17 -I{sysconfig.get_path('include')} -xc++ - -fsyntax-only".split()
    program = b"#include <Python.h>\n#include <vector>\n"
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name.split()[0]):
            run = subprocess.run([*name.split(), *trial], input=program, capture_output=True)
            if run.returncode == 0:
                return name
    return None


def target_macros(cxx: str) -> set[str]:
    """Names of the compiler's macros, which tell what it compiles for: not always this machine."""
    flags = f"{os.environ.get('CXXFLAGS', '')} -dM -E -xc++ -"
    command = [*cxx.split(), *flags.split()]
    told = subprocess.run(command, input=b"", capture_output=True, check=True).stdout.decode()
    return {line.split()[1] for line in told.splitlines()}


def cuda_compiler() -> tuple[str, list[str], str]:
    """nvcc, the architectures to build for, ""; or "", [], and why for none."""
    wish = os.environ.get("ELVA_KERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"ELVA_KERNELS_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        return "", [], "ELVA_KERNELS_CUDA=0 asked for that"
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which(f"{home}/bin/nvcc")) or shutil.which("nvcc")
    named = os.environ.get("ELVA_KERNELS_CUDA_ARCHS", "").split()
    if not nvcc:
        if wish == "1" or named:
            asked = "ELVA_KERNELS_CUDA=1" if wish else f"ELVA_KERNELS_CUDA_ARCHS={' '.join(named)}"
            sys.exit(f"{asked} needs nvcc: put it on PATH or set CUDA_HOME")
        return "", [], "no nvcc was found"
    if named:
        return nvcc, named, ""
    wanted = list(CUDA_ARCHS.values()) if wish == "1" else archs_of_gpus()
    if not wanted:
        return "", [], "nvcc was there, but no GPU that the kernels know"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    archs = [x for x in wanted if f"sm_{x.rstrip('a')}" in known]
    lacks = f"the nvcc of that build knows none of sm_{', sm_'.join(wanted)}" if not archs else ""
    if lacks and wish == "1":
        sys.exit(f"ELVA_KERNELS_CUDA=1 needs a newer CUDA toolkit: {lacks}")
    return (nvcc if archs else ""), archs, lacks


def archs_of_gpus() -> list[str]:
    """Of the GPUs of this machine, as far as there are kernels for them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return []
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
    except subprocess.TimeoutExpired:
        return []
    numbers = {capability.split(".")[0] for capability in told}
    return [arch for number, arch in CUDA_ARCHS.items() if number in numbers]


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx = working_compiler()
        if cxx is None:
            print("elva_kernels: no C++ compiler that works, so no _C", file=sys.stderr)
            return
        nvcc, archs, lacks = cuda_compiler()
        if lacks:
            note = "ELVA_KERNELS_CUDA=1 builds for every GPU, ELVA_KERNELS_CUDA_ARCHS=90a for one"
            print(f"elva_kernels: no CUDA, since {lacks}; {note}", file=sys.stderr)
        import pybind11

        values = {name: os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")}
        values |= {"cxx": cxx, "nvcc": nvcc}
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        values["link"] = f"{nvcc} -cudart static {gencode}" if nvcc else f"{cxx} -pthread"
        macros = target_macros(cxx)
        if "__APPLE__" in macros:
            values["link"] += " -undefined dynamic_lookup"  # Python's own, when it loads the module
        # It does not know a warning of gcc's that is not wanted.
        values["quiet"] = "-Wno-unknown-warning-option" if "__clang__" in macros else ""
        values["gencode"] = gencode
        strict = os.environ.get("ELVA_KERNELS_WERROR") == "1"
        values["strict"] = ",-Werror -Werror all-warnings" if strict else ""
        cuda_sources = sorted(ROOT.glob("csrc/cuda/*.cu")) if nvcc else []
        steps = [("nvcc", f"cuda/{x.name}", "", "") for x in cuda_sources]
        flags = {0: ""} | next((LEVELS[x] for x in LEVELS if x in macros), {})
        levels = [(f".{n}", f"-DELVA_LEVEL={n} {flags[n]}") for n in flags]
        for x in sorted(ROOT.glob("csrc/cpu/*.cpp")):
            variants = levels if "_simd" in x.name else [("", "")]
            steps += [("cxx", f"cpu/{x.name}", *variant) for variant in variants]
        fact = ("ARCHS", ",".join(archs)) if nvcc else ("LACKS", lacks)
        # Where Python and pybind11 lie changes with each isolated build: they are told to none that
        # need not know, so that a second build of this tree compiles little more than the bindings.
        includes = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
        extra = ["-O1", *includes, '-DELVA_CUDA_{}="{}"'.format(*fact)]
        plain = ["bindings.cpp"] + ["bindings_cuda.cpp", "cuda/device.cpp"] * bool(nvcc)
        steps += [("cxx", name, "", shlex.join(extra)) for name in plain]
        text = NINJA.format(**values)
        for rule, name, level, extra in steps:
            source = str(ROOT / "csrc" / name).replace(" ", "$ ")
            text += f"build {name}{level}.o: {rule} {source}\n  extra = {extra}\n"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = " ".join(f"{name}{level}.o" for _, name, level, _ in steps)
        text += f"build {str(target).replace(' ', '$ ')}: link {objects}\n"
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with open(Path(self.build_temp, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of builds of this tree at a time ninja orders none
            Path(self.build_temp, "build.ninja").write_text(text)
            subprocess.run([sys.executable, "-m", "ninja", "-C", self.build_temp], check=True)


EXTENSION = Extension("elva_kernels._C", [], optional=True)
setup(ext_modules=[EXTENSION], cmdclass={"build_ext": NinjaBuild})
