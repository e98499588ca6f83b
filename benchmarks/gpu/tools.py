"""Parts that only start something: `python -m benchmarks.gpu.tools WHAT DIR PART ...`.

facts: of the machine. build: elva_kernels._C for this GPU, where it is not there. example: that of
a CUDA graph, as a user runs it. sanitize, ncu: NVIDIA's tools over `benchmarks.gpu.touch`.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import lines

ROOT = Path(__file__).parent.parent.parent
STAMP = ROOT / "build" / "gpu_check.digest"  # what the _C beside the package was built of
OPS = {
    "reward": ("ranking_reward_and_grad", "ranking_reward"),
    "in_batch": ("rank_statistics", "info_nce", "info_nce_and_grad", "in_batch_ranking_reward"),
    "topk": ("topk", "row_codes", "nearest_codes"),
}
# By their number of barriers a block, as the tool guesses it, it fails in torch's own products.
BARRIERS = ("--num-cuda-barriers", "1024")
OURS = ("--kernel-name", "kernel_substring=elva")  # others' kernels at full speed
SANITIZERS: dict[str, tuple[str, ...]] = {
    "memcheck": (),
    "racecheck": (*OURS, *BARRIERS),
    "synccheck": (*OURS, *BARRIERS),
    "initcheck": (),  # what others' kernels write counts
}
RED = 9  # the exit status for errors that a sanitizer has found
SECTIONS = (
    "SpeedOfLight",
    "WarpStateStats",
    "SchedulerStats",
    "Occupancy",
    "LaunchStats",
    "MemoryWorkloadAnalysis",
)
METRICS = {  # ncu's name -> ours
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_pct",
    "sm__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_active_pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_pct",
    "launch__registers_per_thread": "registers",
}
TO_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def said(*command: str) -> str:
    """What a command prints, in a line; empty where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(done.stdout.split())


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts(given: argparse.Namespace) -> None:
    import torch

    import elva_kernels
    from benchmarks import report

    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = report.machine(device)
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    driver, *clocks = said("nvidia-smi", query, "--format=csv,noheader").split(", ")
    if driver:
        machine |= {"driver": driver, "clocks": ", ".join(clocks)}
    machine["numpy"] = version("numpy")
    nvcc = said("nvcc", "--version")
    if "release" in nvcc:
        machine["nvcc"] = nvcc.rsplit("release ", 1)[1].split(",")[0]
    machine = {key: value for key, value in machine.items() if value is not None}
    lines.write(given.directory, given.part, "facts", "machine", machine=machine)
    print(said("nvidia-smi"), elva_kernels.doctor(), sep="\n")


def digest(capability: str) -> str:
    """Of the sources that make _C, and of the architecture."""
    found = hashlib.sha256(capability.encode())
    for path in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]):
        found.update(path.read_bytes())
    return found.hexdigest()


def build(given: argparse.Namespace) -> None:
    """In a folder without pyproject.toml: beside it no old setuptools will do."""
    start = time.perf_counter()
    capability = said("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()[0]
    arch = {"9.0": "90a"}.get(capability, capability.replace(".", ""))
    made = digest(arch)
    if STAMP.exists() and STAMP.read_text() == made and loads(arch):
        tell(given, "build", "green", start)
        return
    lines.write(given.directory, given.part, "begun", "build")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(ROOT / "csrc", place / "csrc")
        shutil.copy(ROOT / "setup.py", place)
        (place / "elva_kernels").mkdir()
        wanted = {"ELVA_KERNELS_CUDA": "1", "ELVA_KERNELS_CUDA_ARCHS": arch}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        run = {"cwd": place, "env": os.environ | wanted}
        if subprocess.run(command, **run).returncode != 0:
            tell(given, "build", "red: it does not compile, see the log", start)
            return
        for found in (place / "elva_kernels").glob("_C*.so"):
            new = ROOT / "elva_kernels" / f"{found.name}.new"
            shutil.copy(found, new)
            new.replace(new.with_suffix(""))  # not into one that a process has mapped
    works = loads(arch)
    if works:
        STAMP.parent.mkdir(exist_ok=True)
        STAMP.write_text(made)
    tell(given, "build", "green" if works else "red: what was built has no CUDA here", start)


def loads(arch: str) -> bool:
    """Whether a fresh process finds CUDA kernels of `arch` in elva_kernels._C."""
    program = "from elva_kernels import doctor; print(*doctor().native.get('cuda_archs', ()))"
    return arch in said(sys.executable, "-c", program).split()


def tell(given: argparse.Namespace, name: str, verdict: str, start: float, **known: Any) -> None:
    seconds = round(time.perf_counter() - start, 2)
    lines.write(
        given.directory, given.part, "check", name, verdict=verdict, seconds=seconds, **known
    )


def example(given: argparse.Namespace) -> None:
    """Green where each replay is the eager call to the bit."""
    title = "example cuda_graph"
    known = {"ops": ["ranking_reward_and_grad"], "backend": given.backend}
    lines.write(given.directory, given.part, "begun", title, **known)
    start = time.perf_counter()
    command = [sys.executable, "-m", "elva.integrations.examples.cuda_graph"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    equal = [line for line in done.stdout.splitlines() if line.endswith(": apart 0.0e+00")]
    if done.returncode == 0 and len(equal) == 3:
        tell(given, title, "green", start, **known)
    else:
        last = done.stdout.strip().rsplit("\n", 1)[-1]
        tell(given, title, f"red: ended with {done.returncode}: {last[:200]}", start, **known)


def sanitize(given: argparse.Namespace) -> None:
    title = f"compute-sanitizer {given.tool}, {given.family}, {given.backend}"
    options = SANITIZERS[given.tool]
    if given.backend != "cuda":  # whose kernels have other names
        options = options[len(OURS) :]
    place = list(OPS).index(given.family) + 3 * list(SANITIZERS).index(given.tool)
    command = ["compute-sanitizer", "--tool", given.tool, "--error-exitcode", str(RED), *options]
    command += ["--target-processes", "application-only", "--port", str(49152 + 20 * place)]
    command += [sys.executable, "-m", "benchmarks.gpu.touch", given.backend, given.family, "small"]
    known = {"ops": OPS[given.family], "backend": given.backend}
    lines.write(given.directory, given.part, "begun", title, **known)
    start = time.perf_counter()
    # Every tensor in memory of its own, or what is read beyond one would lie in the next.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | apart,
    )
    print(done.stdout)
    reason = others_fault(done)
    if reason is not None:
        lines.write(given.directory, given.part, "not run", title, verdict=reason)
        return
    verdict = "green" if done.returncode == 0 else f"red: {said_by(done)}"
    tell(given, title, verdict, start, **known)


def said_by(done: subprocess.CompletedProcess[str]) -> str:
    """The first and the last that a sanitizer has to say."""
    told = [line.strip("= ") for line in done.stdout.splitlines() if line.strip("= ")]
    told = [line for line in told if not line.startswith("COMPUTE-SANITIZER")] or ["nothing"]
    return f"ended with {done.returncode}: {told[0][:200]} ... {told[-1][:100]}"


def others_fault(done: subprocess.CompletedProcess[str]) -> str | None:
    """Why a sanitizer's complaint says nothing of our kernels."""
    if "overflow of tracked" in done.stdout:
        return f"its table of barriers overflows with {' '.join(BARRIERS)}"
    if done.returncode != 0 and "elva" not in done.stdout:
        return f"what it says is not of our kernels: {said_by(done)}"
    return None


def ncu(given: argparse.Namespace) -> None:
    """One profile, read twice: as text, and a line a kernel."""
    title = f"ncu, {given.family}"
    lines.write(given.directory, given.part, "begun", title)
    with tempfile.TemporaryDirectory() as folder:
        kept = str(Path(folder) / "found")
        command = ["ncu", "--clock-control", "none", "--target-processes", "application-only"]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--metrics", ",".join(METRICS), "--kernel-name-base", "demangled"]
        command += ["--kernel-name", "regex:elva", "--launch-count", "30", "--export", kept]
        command += [sys.executable, "-m", "benchmarks.gpu.touch", given.backend, given.family]
        done = subprocess.run(
            [*command, "large"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout)
        read = ["ncu", "--import", f"{kept}.ncu-rep"]
        if done.returncode != 0 or not Path(f"{kept}.ncu-rep").exists():
            last = done.stdout.strip().rsplit("\n", 1)[-1]
            lines.write(given.directory, given.part, "not run", title, verdict=last)
            return
        with (given.directory / "ncu.txt").open("a") as text:
            subprocess.run([*read, "--page", "details"], stdout=text, stderr=subprocess.STDOUT)
        raw = [*read, "--csv", "--page", "raw"]
        for kernel in kernels(subprocess.run(raw, capture_output=True, text=True).stdout):
            lines.write(given.directory, given.part, "kernel", **kernel)
    lines.write(given.directory, given.part, "case", title)


def kernels(text: str) -> list[dict[str, Any]]:
    """A kernel's name and figures from ncu's raw page: a row of units below the header."""
    rows = list(csv.reader(io.StringIO(text[max(text.find('"ID"'), 0) :])))
    if len(rows) < 3:
        return []
    header, units, *launches = rows
    found = []
    for launch in launches:
        row, unit = dict(zip(header, launch, strict=False)), dict(zip(header, units, strict=False))
        whole = row.get("Kernel Name", "?").removeprefix("void ").replace("elva::", "")
        name = whole.replace("(anonymous namespace)::", "").split("(")[0]
        kernel: dict[str, Any] = {"name": name}
        for metric, key in METRICS.items():
            try:
                value = float(row[metric].replace(",", ""))
            except (KeyError, ValueError):
                continue
            kernel[key] = value * TO_US.get(unit[metric], 1.0) if key == "us" else value
        found.append(kernel | {"grid": row.get("Grid Size"), "block": row.get("Block Size")})
    return found


WHAT = {"facts": facts, "build": build, "example": example, "sanitize": sanitize, "ncu": ncu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("directory", type=Path)
    parser.add_argument("part")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--family", choices=OPS, default="reward")
    parser.add_argument("--tool", choices=SANITIZERS, default="memcheck")
    given = parser.parse_args()
    WHAT[given.what](given)


if __name__ == "__main__":
    main()
