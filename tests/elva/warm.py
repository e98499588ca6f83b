"""`elva` in processes of their own that begin at once."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path


class Server:
    """Starts `elva` in processes of their own, forked from one that has imported the trainer and
    computed nothing: the seconds of importing it are spent once."""

    def __init__(self, directory: Path) -> None:
        """`directory`: where the server lives; it would import what lies there."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["elva.cli", "elva.commands.train", "elva.commands.evaluate"]
        )
        kept, here = os.environ.get("OMP_NUM_THREADS"), Path.cwd()
        os.environ["OMP_NUM_THREADS"] = "1"  # the server keeps this environment
        os.chdir(directory)
        try:
            forkserver.ensure_running()
        finally:
            os.chdir(here)
            del os.environ["OMP_NUM_THREADS"]
            if kept is not None:
                os.environ["OMP_NUM_THREADS"] = kept

    def start(self, *words: str, directory: Path, before: str = "") -> BaseProcess:
        """Begin `elva WORDS`; what it prints goes to `directory`/printed.

        Args:
            before: statements that run first.
        """
        program = f"""
import os, sys
os.chdir({str(directory)!r})
printed = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for stream in (1, 2):
    os.dup2(printed, stream)
sys.argv[:] = ["elva", *{words!r}]
{before}
from elva.cli import app
app()
"""
        process = self._context.Process(target=exec, args=(program,))
        process.start()
        return process
