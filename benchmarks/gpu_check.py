"""All that a GPU can prove, then its figures, in one short run: `python -m benchmarks.gpu_check`.

Parts are processes (`benchmarks/gpu`): proofs against the reference in float64 side by side,
figures alone on the device, then rivals, sanitizers and ncu. Each line of a result is kept in DIR
at once, and the run ends by itself: results.jsonl, log.txt, ncu.txt, gpu-<device>.json. What is red
gets no speed, all else does. Ends with 1 where anything is red or crashed.

`--dry-run` does all but the launches on the CPU, at small sizes. The tree's own package is meant;
its CUDA kernels are built first where nvcc is found.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks.gpu import collect, lines, parts
from benchmarks.gpu.schedule import Part, Schedule

RESERVE = 5.0  # seconds for what comes behind the parts
MOST_JOBS = 16  # each has a context of half a gigabyte on the device
TOOLKIT = "/usr/local/cuda/bin"  # where NVIDIA's programs lie if they are not on the PATH
CACHES = Path(__file__).parent.parent / "build" / "gpu_check"


def interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """Once: what there is must still be kept."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(chosen: list[Part], directory: Path, seconds: float, jobs: int) -> None:
    """The parts, whose lines lie in `directory` whatever ends them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (lines.FILE, "log.txt", "ncu.txt"):
        (directory / name).unlink(missing_ok=True)
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, interrupted)
    environment = {  # verdicts of self-tests and compiled kernels, for the next run too
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),  # of many processes
        "XDG_CACHE_HOME": str(CACHES),
        "TRITON_CACHE_DIR": str(CACHES / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor"),
    }
    try:
        Schedule(chosen, directory, seconds - RESERVE, jobs, environment).run()
    except KeyboardInterrupt:
        print("gpu_check: interrupted", file=sys.stderr)


def finish(directory: Path) -> int:
    """Keeps the result, shows it; the exit status."""
    result, path = collect.keep(directory)
    print(collect.table(result))
    print(path, collect.summary(result), sep=": ")
    if not result["rows"] and not any(x["verdict"] == "green" for x in result["checks"]):
        print("gpu_check: nothing was proven and nothing measured")
        return 1
    return int(any(map(lines.is_red, lines.read(directory))))


def names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="DIR, the folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it has ended")
    parser.add_argument("--only", type=names, default=(), help="parts, by how their names begin")
    parser.add_argument("--backend", type=names, default=("cuda", "triton"))
    parser.add_argument("--dtype", type=names, default=(), help="of the proofs: bfloat16,...")
    parser.add_argument("--seconds", type=float, help="of measuring, per case")
    parser.add_argument("--jobs", type=int, help="processes side by side")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, all but the launches")
    parser.add_argument("--list", action="store_true", help="names the parts and does nothing")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="only from the lines in DIR")
    given = parser.parse_args()
    os.environ["PATH"] += os.pathsep + TOOLKIT
    if given.collect is not None:
        sys.exit(finish(given.collect))
    seconds = given.seconds or (0.02 if given.dry_run else 0.6)
    directory = (given.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))).resolve()
    asked = parts.Asked(str(directory), given.backend, given.dtype, seconds, given.dry_run)
    try:
        chosen = parts.chosen(parts.all_parts(asked), list(given.only))
    except ValueError as error:
        sys.exit(f"gpu_check: {error}")
    if given.list:
        print(*(x.name for x in chosen), sep="\n")
        return
    if not given.dry_run and shutil.which("nvidia-smi") is None:
        sys.exit("gpu_check: there is no GPU; --dry-run does what can be done without one")
    jobs = given.jobs or (1 if given.dry_run else min(MOST_JOBS, os.cpu_count() or 1))
    run(chosen, directory, 60 * given.minutes, jobs)
    sys.exit(finish(directory))


if __name__ == "__main__":
    main()
