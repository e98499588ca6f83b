"""All lines of a run as one result, in the shape that `benchmarks.report` shows and keeps."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu import lines
from benchmarks.gpu.lines import Line

NOT_OF_A_ROW = ("part", "kind", "name", "ops", "backend")


def collect(found: list[Line]) -> dict[str, Any]:
    """A speed is never told of an op that is red on its backend."""
    machine = next((x["machine"] for x in found if x["kind"] == "facts"), {"device": "unknown"})
    product = ceiling(found, "product")
    if product:
        machine = machine | {"product_tflops": round(product["tflops"], 1)}
    red = lines.reds(found)
    not_run = {x["name"]: x["verdict"] for x in found if x["kind"] == "not run"}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in found:
        if line["kind"] != "figure":
            continue
        why = lines.suppressed(line, red)
        if why is not None:
            not_run[line["name"]] = f"red: {why}"
            continue
        row = {key: value for key, value in line.items() if key not in NOT_OF_A_ROW}
        rows.setdefault((line["shape"], line["provider"]), row)
    checks = [
        {key: line.get(key) for key in ("name", "verdict", "seconds")}
        for line in found
        if line["kind"] in ("check", "crash")
    ]
    checks += [
        {"name": x["name"], "verdict": f"not run: {x['verdict']}", "seconds": None}
        for x in found
        if x["kind"] == "not run"
    ]
    return {
        "op": "gpu",
        "machine": machine,
        "ceilings": {name: x for name in ("read", "copy") if (x := ceiling(found, name))},
        "not_run": not_run,
        "checks": checks,
        "rows": over_eager(list(rows.values())),
        "kernels": [
            {key: x[key] for key in x if key not in ("part", "kind")}
            for x in found
            if x["kind"] == "kernel"
        ],
    }


def ceiling(found: list[Line], name: str) -> dict[str, float]:
    """Medians over all cases; the best of all."""
    own = [x for x in found if x["kind"] == "ceiling" and x["name"] == name]
    keys = [key for key in (own[0] if own else {}) if key.endswith(("gbps", "tflops"))]
    return {
        key: (max if key.startswith("best") else statistics.median)([x[key] for x in own])
        for key in keys
    }


def over_eager(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each beside the faster of torch's eager ways of its case."""
    eager: dict[str, float] = {}
    for row in rows:
        if row["provider"].startswith("torch eager"):
            known = eager.get(row["shape"], row["median_ms"])
            eager[row["shape"]] = min(known, row["median_ms"])
    for row in rows:
        if row["shape"] in eager:
            row["times_eager"] = eager[row["shape"]] / row["median_ms"]
    order = list(dict.fromkeys(row["shape"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["shape"]))


def keep(directory: Path) -> tuple[dict[str, Any], Path]:
    """The result of the lines in `directory`, and the file beside them that holds it."""
    result = collect(lines.read(directory))
    return result, report.write("gpu", result, directory)


def red_checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [x for x in result["checks"] if not x["verdict"].startswith(("green", "not run"))]


def summary(result: dict[str, Any]) -> str:
    green = sum(x["verdict"] == "green" for x in result["checks"])
    return f"{green} checks green, {len(red_checks(result))} red, {len(result['rows'])} figures"


def table(result: dict[str, Any]) -> str:
    """What is red first, then the figures."""
    told = [f"RED  {x['name']}: {x['verdict']}" for x in red_checks(result)]
    told.append(summary(result))
    for kernel in result["kernels"]:
        figures = "  ".join(f"{key} {x:.4g}" for key, x in kernel.items() if isinstance(x, float))
        told.append(f"ncu  {kernel['name']} {kernel.get('grid', '')}: {figures}")
    return "\n".join([*told, report.show(result)])
