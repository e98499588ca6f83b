"""Directories that a process of trials works in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path


@cache
def place() -> Path:
    """One of this process, removed when it ends; a child that is forked shares it."""
    found = Path(tempfile.mkdtemp(prefix="elva-crashes-"))
    Finalize(None, shutil.rmtree, (found, True), exitpriority=0)  # a pool's process does no more
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    """One for the length of a block."""
    found = Path(tempfile.mkdtemp(dir=place()))
    try:
        yield found
    finally:
        shutil.rmtree(found)
