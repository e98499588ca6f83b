"""Trials in a process of their own that has imported the trainer and computed nothing, so that it
can fork (a library's threads do not come along), and that `calls` was preloaded into."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from benchmarks.reliability.child import findable
from benchmarks.reliability.crashes import calls
from benchmarks.reliability.row import Outcome, Trials

WARM = ("elva.commands.train", "elva.commands.evaluate", "accelerate.utils", "transformers")
"""What each child would import again."""

Trying = Callable[[Trials], Outcome]


def apart(trying: Trying, wanted: Trials) -> Outcome:
    """The outcome of some trials, tried there."""
    return _process().submit(trying, wanted).result()


@cache
def _process() -> ProcessPoolExecutor:
    findable()
    found = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_warm)
    before = os.environ.get("LD_PRELOAD", "")
    if not calls.missing():
        os.environ["LD_PRELOAD"] = f"{before} {calls.library()}".strip()
    try:
        found.submit(int).result()  # it is there
    finally:
        os.environ.pop("LD_PRELOAD", None)
        if before:
            os.environ["LD_PRELOAD"] = before
    return found


def _warm() -> None:
    warnings.filterwarnings("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in WARM:
        importlib.import_module(name)
    logging.disable(logging.WARNING)
    importlib.import_module("torch").set_num_threads(1)
    gc.freeze()  # no child looks through what all of them share


def forked(work: Callable[[], object], printed: Path) -> int:
    """The process that does some work, and nothing after it.

    Args:
        printed: where its output and its traceback go.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        there = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(there, 1)
        os.dup2(there, 2)
        work()
        code = 0
    except BaseException:  # noqa: BLE001  the parent reads it
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code of a process, once it is there; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
