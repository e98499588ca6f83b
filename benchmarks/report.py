"""Tables, plots and files of a benchmark run.

`python -m benchmarks.report [FILE...]` prints kept results as Markdown and draws each beside its
file, as a PNG.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on besides the code."""
    import torch  # here: a process that reads what others have measured needs none

    import elva_kernels

    native = elva_kernels.doctor().native
    if device == "cuda":
        return {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "commit": _commit(),
        }
    return {
        "device": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "level": native.get("level"),
        "compiler": native.get("compiler"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),  # far above the threads: another's work was measured
        "commit": _commit(),
    }


def path(name: str, result: dict[str, Any], directory: Path = RESULTS) -> Path:
    """<name>-<device>.json, behind it a CPU level that was forced."""
    what = f"{result['machine']['device']} {os.environ.get('ELVA_KERNELS_CPU_LEVEL', '')}"
    words = "".join(c if c.isalnum() else " " for c in what.lower()).split()
    return directory / f"{'-'.join([name, *words])}.json"


def write(name: str, result: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Keeps `result` in its `path`."""
    place = path(name, result, directory)
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(result, indent=1) + "\n")
    return place


# Column, its key in a row, its format; what is not known reads "-".
TIMES = (
    ("median ms", "median_ms", ".4f"),
    ("p20", "p20_ms", ".4f"),
    ("p80", "p80_ms", ".4f"),
    ("best", "best_ms", ".4f"),
    ("GB/s", "gbps", ".1f"),
)
COLUMNS = {
    "group": (
        *TIMES[:-1],
        ("of rows", "received_of_rows", ".3f"),
        ("x slowest", "times_slowest", ".2f"),
    ),
    "reward": (
        *TIMES,
        ("of copy", "of_copy", ".0%"),
        ("of read", "of_read", ".0%"),
        ("x eager", "times_eager", ".1f"),
        ("MB extra", "extra_mb", ".1f"),
        ("score err", "score_error", ".1e"),
        ("grad err", "grad_error", ".1e"),
    ),
    "in_batch": (
        *TIMES[:-1],
        ("GFLOP/s", "gflops", ".0f"),
        ("of floor", "of_floor", ".0%"),
        ("x eager", "times_eager", ".2f"),
        ("x plain", "times_plain", ".2f"),
        ("MB extra", "extra_mb", ".1f"),
        ("score err", "score_error", ".1e"),
        ("grad err", "grad_error", ".1e"),
    ),
    "gpu": (
        *TIMES,
        ("TFLOP/s", "tflops", ".0f"),
        ("of floor", "of_floor", ".0%"),
        ("x eager", "times_eager", ".2f"),
        ("host us", "host_us", ".0f"),
        ("MB extra", "extra_mb", ".1f"),
    ),
    "scores": (
        *TIMES,
        ("x eager", "times_eager", ".1f"),
        ("MB extra", "extra_mb", ".1f"),
        ("err", "score_error", ".1e"),
    ),
    "topk": (
        *TIMES,
        ("GFLOP/s", "gflops", ".0f"),
        ("of floor", "of_floor", ".0%"),
        ("x torch", "times_torch", ".2f"),
        ("MB extra", "extra_mb", ".1f"),
        ("score err", "score_error", ".1e"),
    ),
}
COUNTED = {
    "group": "loss and gradients, both directions; received: by a process, over the other's rows",
    "reward": "GB/s counts each input read once and each gradient written once; "
    "of a bank the rows that are named, read once",
    "in_batch": "the floor is the matrix products alone; gradients' errors are over their norm",
    "gpu": "the floor is the slower of the bytes and the operations counted, at the ceilings",
    "scores": "GB/s counts each value read and written once; errors are over the largest value",
    "topk": "GB/s counts the corpus read once; errors are over |q| |c|",
}


def show(result: dict[str, Any]) -> str:
    """`result` as text: the machine, the ceilings, a row for each case and provider."""
    op = result.get("op", "reward")
    lines = ["  ".join(f"{key} {value}" for key, value in result["machine"].items())]
    for name, ceiling in result["ceilings"].items():
        slow, fast = ceiling["slow_gbps"], ceiling["fast_gbps"]
        times = f"p80 {slow:.1f}, p20 {fast:.1f}, best {ceiling['best_gbps']:.1f}"
        lines.append(f"{name} {ceiling['gbps']:.1f} GB/s ({times})")
    lines += [f"not run: {name}: {why}" for name, why in result.get("not_run", {}).items()]
    lines.append(COUNTED[op])
    columns = COLUMNS[op]
    lines.append(f"{'shape, dtype, provider':56s}" + "".join(f"{x[0]:>10s}" for x in columns))
    for row in result["rows"]:
        found = ((row.get(key), form) for _, key, form in columns)
        cells = ["-" if value is None else format(value, form) for value, form in found]
        title = f"{row['shape']} {row['dtype']} {row['provider']}"
        lines.append(f"{title:56s}" + "".join(f"{cell:>10s}" for cell in cells))
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """`result` as a Markdown table under a line about the machine."""
    columns = COLUMNS[result.get("op", "reward")]
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    heads = ["case", "provider", *(column[0] for column in columns)]
    lines = [facts, ""]
    lines += [f"Not run: {name}: {why}." for name, why in result.get("not_run", {}).items()]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        found = ((row.get(key), form) for _, key, form in columns)
        cells = ["-" if value is None else format(value, form) for value, form in found]
        case = f"{row['shape']} {row['dtype']}"
        lines.append("| " + " | ".join([case, row["provider"], *cells]) + " |")
    return "\n".join(lines)


def marker(color: int) -> str:
    """Of the provider with this colour: matplotlib has ten, and begins again."""
    return "osD^v"[color // 10 % 5]


def plot(result: dict[str, Any], path: Path) -> None:
    """A row a case, a dot a provider: its median time over ours, p20 to p80 as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    found: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        found.setdefault(f"{row['shape']} {row['dtype']}", {})[row["provider"]] = row
    cases = {  # some rivals take a dtype that we were not asked for
        case: (
            next(row["median_ms"] for name, row in rows.items() if name.startswith("ours")),
            rows,
        )
        for case, rows in found.items()
        if any(name.startswith("ours") for name in rows)
    }
    providers = list(dict.fromkeys(row["provider"] for row in result["rows"]))
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.42 * len(cases)), layout="constrained")
    for color, provider in enumerate(providers):
        for y, (ours, rows) in enumerate(cases.values()):
            if provider not in rows:
                continue
            row = rows[provider]
            low, middle, high = (row[key] / ours for key in ("p20_ms", "median_ms", "p80_ms"))
            axes.plot([low, high], [y, y], color=f"C{color}", linewidth=2, alpha=0.5)
            axes.plot(middle, y, marker(color), color=f"C{color}", markersize=7)
    for color, provider in enumerate(providers):
        axes.plot([], [], marker(color), color=f"C{color}", label=provider)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.set_xlabel("time over ours (median, p20 to p80)")
    axes.grid(axis="x", color="0.9")
    axes.set_title(f"{result.get('op', 'reward')}: {result['machine']['device']}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine())
    return f"{name} family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The tree's commit, with + where files differ from it."""
    try:
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        changes = [
            "git",
            "status",
            "--porcelain",
            "csrc",
            "elva_kernels",
            "benchmarks/*.py",
            "setup.py",
        ]
        dirty = subprocess.run(changes, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if dirty else "")


def main(arguments: list[str]) -> None:
    for argument in arguments or sorted(map(str, RESULTS.glob("*.json"))):
        result = json.loads(Path(argument).read_text())
        if "ceilings" not in result:
            continue  # of a training, not of an op
        print(markdown(result), end="\n\n")
        plot(result, Path(argument).with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
