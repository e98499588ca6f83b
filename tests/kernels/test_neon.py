"""NEON without an Arm processor: compiled by a cross compiler, and run by qemu on the contract."""

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.kernels import guest_session, processes
from tests.kernels.compiled import ARM_LEVELS, LEVEL_FLAGS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
OBJECTS = "-std=c++17 -O3 -pthread -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror"
OBJECTS += " -Wno-psabi -Wno-maybe-uninitialized"
UNDEFINED = "-fsanitize=undefined -fno-sanitize-recover=all -Wno-error"


def needs(*programs):
    missing = [name for name in programs if shutil.which(name) is None]
    reason = f"{' and '.join(missing)} not installed: g++-aarch64-linux-gnu, qemu-user-static"
    return pytest.mark.skipif(bool(missing), reason=reason)


def flags(level):
    return f"-DELVA_LEVEL={ARM_LEVELS[level]} {LEVEL_FLAGS[level]}"


def compile_guest(folder, main, more="", libraries=()):
    """csrc/cpu at every level of 64-bit Arm with `main`, a file beside this one: the program."""
    command = [COMPILER, *f"{OBJECTS} {more} -I{ROOT}/csrc -I{HERE}".split()]
    sources = [("", x) for x in ROOT.glob("csrc/cpu/*.cpp") if "_simd" not in x.stem]
    sources.append(("", HERE / main))
    for level in ARM_LEVELS:
        sources += [(flags(level), x) for x in ROOT.glob("csrc/cpu/*_simd.cpp")]
    objects = [str(folder / f"{i}.o") for i in range(len(sources))]
    processes.compile_all(
        [*command, *extra.split(), "-c", str(source), "-o", made]
        for (extra, source), made in zip(sources, objects, strict=True)
    )
    program = folder / Path(main).stem
    processes.compile_one([*command, "-static", *objects, *libraries, "-o", str(program)])
    return program


@needs(COMPILER)
def test_the_vectors_compile_for_64_bit_arm():
    processes.compile_all(
        [COMPILER, *f"{OBJECTS} {flags(level)} -fsyntax-only".split(), f"{ROOT}/csrc/cpu/{name}"]
        for name, level in [
            ("reward_simd.cpp", "neon"),
            ("codes_simd.cpp", "neon"),
            ("codes_simd.cpp", "neondot"),
        ]
    )


@needs(COMPILER, EMULATOR)
@pytest.mark.thorough
def test_the_level_is_what_the_processor_has(tmp_path):
    """And no behaviour is undefined on any, whether one thread calls or two."""
    program = compile_guest(tmp_path, "cpu_driver.cpp", f"{UNDEFINED} -O1", ("-lubsan", "-lstdc++"))
    for processor, forced, level in [
        ("max", "", "neondot"),
        ("cortex-a53", "", "neon"),
        ("max", "neon", "neon"),
        ("max", "plain", "plain"),
    ]:
        command = [EMULATOR, "-cpu", processor, str(program), "2"]
        done = processes.run(command, {"ELVA_KERNELS_CPU_LEVEL": forced}, timeout=1200)
        assert (done.returncode, done.stdout) == (0, f"{level}\n"), done.stderr[:4000]


@pytest.fixture(scope="session")
def guest(tmp_path_factory):
    """The environment of a session whose csrc/cpu is an emulated processor's."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("guest")
    program = compile_guest(folder, "guest_main.cpp")
    host, module = folder / "libhost.so", folder / "_C.so"
    shared = [compiler, "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{ROOT}/csrc"]
    sources = [HERE / "guest_host.cpp", ROOT / "csrc/cpu/kept_memory.cpp"]
    processes.compile_one([*shared, "-fno-builtin", f"-I{HERE}", *sources, "-o", host])
    includes = [f"-I{x}" for x in (sysconfig.get_path("include"), pybind11.get_include())]
    shared += ['-DELVA_CUDA_LACKS=""', *includes]
    processes.compile_one([*shared, ROOT / "csrc/bindings.cpp", "-o", module])
    return {
        "LD_PRELOAD": str(host),
        "ELVA_TEST_GUEST": f"{EMULATOR} -cpu max {program}",
        "ELVA_TEST_GUEST_MODULE": str(module),
        "ELVA_TEST_GUEST_REPORT": str(folder / "report.json"),
        "OMP_NUM_THREADS": "2",
    }


@needs(COMPILER, EMULATOR)
@pytest.mark.thorough
@pytest.mark.parametrize("file", guest_session.CONTRACT)
def test_contract_under_emulation(guest, file):
    """Every level on the diagonal of its cases, all of float64, float32 and the two halves."""
    counts = run(guest, f"tests/kernels/test_{file}.py")
    assert set(counts) == set(ARM_LEVELS) and min(counts.values()) >= 3, counts


@needs(COMPILER, EMULATOR)
@pytest.mark.thorough
def test_bits_do_not_depend_on_the_number_of_threads_under_emulation(guest):
    test = "tests/kernels/test_cpu.py::test_bits_do_not_depend_on_the_number_of_threads"
    assert run(guest, test) == {"neondot": 6}


def run(guest, *tests):
    """How many tests of each level have passed; all did."""
    plugin = ["-p", guest_session.__name__, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugin, *tests]
    done = processes.run(command, guest, cwd=ROOT, timeout=3000)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return json.loads(Path(guest[guest_session.REPORT]).read_text())
