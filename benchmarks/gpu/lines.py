"""Lines of results.jsonl: a part appends one as soon as it knows something, and nothing is lost.

A line is {"part", "kind", "name", ...}. Kinds: "facts" of the machine; "begun", before anything
that may crash; then "check" (verdict "green" or "red: why", seconds), "figure" (a row of a report),
"ceiling", "kernel" (what ncu says of one), "not run" (verdict: why) or, by the parent, "crash".
"ops" and "backend" say whom a line concerns.
"""

import json
import os
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
START = '{"part": '  # of every line, and of none's middle
Line = dict[str, Any]


def write(directory: Path, part: str, kind: str, name: str, **fields: Any) -> None:
    """Appended at once and whole, also beside other processes that append."""
    line = json.dumps({"part": part, "kind": kind, "name": name} | fields)
    file = os.open(directory / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def parse(text: str) -> list[Line]:
    """The lines that are whole; one may begin behind what a killed process left of its own."""
    found = []
    for line in text.split("\n"):
        try:
            found.append(json.loads(line[max(line.rfind(START), 0) :]))
        except ValueError:
            continue
    return found


def read(directory: Path) -> list[Line]:
    try:
        return parse((directory / FILE).read_text())
    except FileNotFoundError:
        return []


def unanswered(lines: list[Line], part: str) -> list[Line]:
    """What `part` has begun and not ended, by its lines."""
    own = [line for line in lines if line["part"] == part]
    ended = {line["name"] for line in own if line["kind"] in ("check", "not run", "crash", "case")}
    return [line for line in own if line["kind"] == "begun" and line["name"] not in ended]


def is_red(line: Line) -> bool:
    return line["kind"] == "crash" or (line["kind"] == "check" and line["verdict"] != "green")


def reds(lines: list[Line]) -> dict[tuple[str, str], str]:
    """(op, backend) -> the first check that it failed, and how."""
    found: dict[tuple[str, str], str] = {}
    for line in filter(is_red, lines):
        for op in line.get("ops", ()):
            found.setdefault((op, line["backend"]), f"{line['name']}: {line['verdict']}")
    return found


def crashed(lines: list[Line], op: str, backend: str) -> str | None:
    """How a part crashed or hung that proved or measured `op`."""
    return reds([line for line in lines if line["kind"] == "crash"]).get((op, backend))


def suppressed(line: Line, red: dict[tuple[str, str], str]) -> str | None:
    """Why a figure is not told: its op is red on its backend."""
    concerned = [(op, line["backend"]) for op in line.get("ops", ())]
    return next((red[x] for x in concerned if x in red), None)
