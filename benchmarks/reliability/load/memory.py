"""What this process has open and holds: descriptors, bytes."""

from __future__ import annotations

import os
from pathlib import Path


def resident_mb() -> float:
    """Megabytes of memory that are resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def descriptors() -> int:
    """Open files, sockets and pipes."""
    return len(os.listdir("/proc/self/fd"))


def missing() -> str:
    """What this machine lacks to be asked."""
    return "" if Path("/proc/self/statm").exists() else "no /proc, by which memory is read"
