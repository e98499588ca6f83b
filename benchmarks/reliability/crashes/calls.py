"""The calls by which files change, whoever makes them: counted, and the n-th fails or kills.

A library that is preloaded into the process of the trials stands before the system's own, so that
safetensors' writes in Rust and Python's in C are reached as well as those of `os`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from benchmarks.reliability.crashes.places import place

SOURCE = Path(__file__).with_name("calls.c")
KILL = 0
"""In the place of an error's number: the process is killed instead."""


def missing() -> str:
    """What this machine lacks for it, in words."""
    if sys.platform != "linux":
        return "it is for Linux"
    return "" if shutil.which("cc") else "there is no C compiler, cc"


@cache
def library() -> Path:
    """The compiled library, of this process alone."""
    path = place() / "calls.so"
    words = ["cc", "-shared", "-fPIC", "-O1", "-o", str(path), str(SOURCE), "-ldl"]
    subprocess.run(words, check=True)
    return path


def at(under: Path, nth: int, code: int) -> None:
    """From now on the n-th call that changes something under a directory fails with an error's
    number, or `KILL`s; none for 0.

    Raises:
        RuntimeError: this process was started without the library.
    """
    _preloaded().elva_calls_at(os.fsencode(under), ctypes.c_long(nth), code)


def count() -> int:
    """How many there were since then."""
    return int(_preloaded().elva_calls())


def refused() -> str:
    """The name of the call that failed; "" for none."""
    return bytes(_preloaded().elva_refused()).decode()


@cache
def _preloaded() -> ctypes.CDLL:
    found = ctypes.CDLL(None)
    if not hasattr(found, "elva_calls_at"):
        raise RuntimeError("this process was started without calls.so; try by the row")
    found.elva_calls.restype = ctypes.c_long
    found.elva_refused.restype = ctypes.c_char_p
    return found
