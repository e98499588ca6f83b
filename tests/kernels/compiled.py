"""csrc/cpu with flags of one's own: as a program of the C API alone, or as the compiled module."""

import platform
import sysconfig
from pathlib import Path

from tests.kernels import processes

ROOT = Path(__file__).resolve().parents[2]
ARM_LEVELS = {"plain": 0, "neon": 1, "neondot": 2}
LEVELS = {"plain": 0, "avx2": 3, "avx512": 4, "avx512bf16": 5, "amx": 6}
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
LEVEL_FLAGS = {
    "plain": "",
    "neon": "",
    "neondot": "-march=armv8.2-a+dotprod",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512bf16": f"{AVX512} -mavx512bf16 -mavx512vnni",
    "amx": f"{AVX512} -mavx512bf16 -mavx512vnni",
}
if platform.machine().lower() in ("aarch64", "arm64"):
    LEVELS = ARM_LEVELS
elif platform.machine().lower() not in ("x86_64", "amd64"):
    LEVELS = {"plain": 0}
FLAGS = f"-std=c++17 -g1 -pthread -ffp-contract=off -w -I{ROOT}/csrc"


def program(
    folder,
    main,
    flags,
    *,
    compiler="g++",
    link="",
    levels=LEVELS,
    whole=LEVELS,
    other="",
    parts=None,
):
    """The program's path.

    Args:
        flags: of every file and of the program.
        link: more of the program alone.
        levels: those that are compiled.
        other: more flags of the levels that are not among the `whole` ones.
        parts: names of files of csrc/cpu without their ending; all of them, at every level, for
            None.
    """
    command = [compiler, *FLAGS.split(), *flags.split(), each_of(levels)]
    found = sources(main, levels, whole, other, parts)
    return built(folder / main.stem, command, found, link.split())


def module(folder, flags, *, whole=LEVELS, other=""):
    """elva_kernels._C, of the CPU alone: its path. Arguments as of a program."""
    import pybind11

    command = ["g++", *FLAGS.split(), "-fPIC", '-DELVA_CUDA_LACKS=""', *flags.split()]
    includes = [f"-I{x}" for x in (sysconfig.get_path("include"), pybind11.get_include())]
    found = sources(ROOT / "csrc/bindings.cpp", LEVELS, whole, other)
    return built(folder / "_C.so", [*command, *includes], found, ["-shared"])


def built(target, command, sources, link):
    """The target's path, of (flags, file) of its sources."""
    objects = [str(target.parent / f"{i}.o") for i in range(len(sources))]
    processes.compile_all(
        [*command, *extra.split(), "-c", str(source), "-o", made]
        for (extra, source), made in zip(sources, objects, strict=True)
    )
    processes.compile_one([*command, *objects, *link, "-o", str(target)])
    for made in objects:
        Path(made).unlink()
    return target


def each_of(levels):
    """csrc/cpu/levels.h's list of them, as a flag."""
    return "-DELVA_EACH_LEVEL(X)=" + " ".join(
        f'X({number}, "{name}")' for name, number in LEVELS.items() if name in levels
    )


def sources(main, levels, whole, other, parts=None):
    """(flags, file) of what a program is made of."""
    if parts is not None:
        return [("", main), *(("", ROOT / f"csrc/cpu/{name}.cpp") for name in parts)]
    found = [("", x) for x in ROOT.glob("csrc/cpu/*.cpp") if "_simd" not in x.stem]
    found.append(("", main))
    # The whole ones first: of an inline function the linker takes the first one that it sees.
    for level in sorted(levels, key=lambda level: level not in whole):
        extra = f"-DELVA_LEVEL={LEVELS[level]} {LEVEL_FLAGS[level]}"
        extra += "" if level in whole else f" {other}"
        found += [(extra, x) for x in ROOT.glob("csrc/cpu/*_simd.cpp")]
    return found
