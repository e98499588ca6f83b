"""Marks of a training, by which it is killed.

An audit hook sees the steps that a run directory's layout promises (a `.partial` directory made, a
rename), so that nothing of ELVA is replaced or called.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

STAGE = r"(?P<stage>(?:stage|control)-[^/]+)"
BEGINS = (
    ("os.mkdir", "checkpoint", rf"/{STAGE}/checkpoint-(?P<step>\d+)\.partial"),
    ("os.rename", "step", rf"/{STAGE}/checkpoint-(?P<step>\d+)\.partial"),
    ("os.mkdir", "model", rf"/{STAGE}/model\.partial"),
    ("os.rename", "evaluation", rf"/{STAGE}/model\.partial"),
    ("os.rename", "start", rf"/{STAGE}/evaluation\.json\.partial"),
)
"""Audit event, what begins with it and ends where the next begins, the path that it is of."""


def watch(descriptor: int) -> None:
    """Write a JSON line to an open file or pipe whenever something of `BEGINS` does: {time, kind,
    stage, step, files: name -> sha256 of a checkpoint that is whole now}."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in ("os.mkdir", "os.rename") or not isinstance(args[0], str | os.PathLike):
            return
        path = os.fspath(args[0])
        for name, kind, pattern in BEGINS:
            found = re.search(rf"{pattern}$", path) if event == name else None
            made = event == "os.mkdir"
            if made and (os.path.exists(path) or not os.path.isdir(os.path.dirname(path))):
                continue  # a directory that will not be made by this call
            if found is not None:
                groups = found.groupdict()
                mark = {
                    "time": time.monotonic(), "kind": kind, "stage": groups["stage"],
                    "step": int(groups.get("step") or 0),
                    "files": _digests(Path(path)) if kind == "step" else {},
                }  # fmt: skip
                os.write(descriptor, (json.dumps(mark) + "\n").encode())

    sys.addaudithook(hook)


def _digests(directory: Path) -> dict[str, str]:
    """File -> SHA-256 of its tensors' files, as the manifest has them."""
    entries = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return {n: e["sha256"] for n, e in entries.items() if n.endswith(".safetensors")}
