"""A part that proves: `python -m benchmarks.gpu.prove DIR PART BACKEND DTYPES CHECK...`.

It leaves out what it has begun before, so that it can be started again behind a crash.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import lines, prove_in_batch, prove_process, prove_reward, prove_topk
from benchmarks.gpu.place import Place, Red

Check = Callable[[Place], None]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    **prove_reward.CHECKS,
    **prove_in_batch.CHECKS,
    **prove_topk.CHECKS,
    **prove_process.CHECKS,
}
NEED_A_GPU = ("names", "streams", "selftest", "graphs")


def verdict(check: Check, place: Place) -> str:
    """Green, red or "not run", and why."""
    torch.manual_seed(0)
    try:
        check(place)
        place.wait()
    except Red as error:
        return f"red: {error}"
    except torch.OutOfMemoryError as error:  # of the processes side by side
        return f"not run: {' '.join(str(error).split())[:200]}"
    except Exception as error:  # noqa: BLE001 - the other checks still tell something
        return f"red: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "green"


def prove(directory: Path, part: str, name: str, place: Place) -> None:
    """One check; its lines before and after."""
    check, ops = CHECKS[name]
    title = f"{name}, {place.backend}, {str(place.dtype).removeprefix('torch.')}"
    obstacle = place.obstacle(ops)
    if name.endswith(NEED_A_GPU) and place.dry:
        obstacle = "it needs a GPU"
    if obstacle is not None:
        lines.write(directory, part, "not run", title, verdict=obstacle)
        return
    concerned = {"ops": ops, "backend": place.backend}
    lines.write(directory, part, "begun", title, **concerned)
    start = time.perf_counter()
    told = verdict(check, place)
    seconds = round(time.perf_counter() - start, 2)
    print(f"{seconds:8.2f} s  {title}: {told}", flush=True)
    if told.startswith("not run: "):
        lines.write(directory, part, "not run", title, verdict=told.removeprefix("not run: "))
        torch.cuda.empty_cache()
        return
    lines.write(directory, part, "check", title, verdict=told, seconds=seconds, **concerned)
    if told != "green":
        place.wait()  # raises where the device is lost to this process; another goes on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("part")
    parser.add_argument("backend")
    parser.add_argument("dtypes", help="with commas between")
    parser.add_argument("checks", nargs="+", choices=CHECKS)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(min(4, torch.get_num_threads()))
    known = lines.read(given.directory)
    begun = {x["name"] for x in known if x["part"] == given.part and x["kind"] == "begun"}
    for dtype in given.dtypes.split(","):
        device = "cpu" if given.dry_run else "cuda"
        place = Place(device, given.backend, getattr(torch, dtype), given.dry_run)
        for name in given.checks:
            if f"{name}, {given.backend}, {dtype}" not in begun:
                prove(given.directory, given.part, name, place)


if __name__ == "__main__":
    sys.exit(main())
