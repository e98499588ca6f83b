"""Compilers' commands, of tests that build what they run."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor


def run_all(commands):
    """Side by side, one a core; what a compiler that fails has said is the error."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[:4000]}"
