"""Other processes of tests, in the environment that the session began with.

pytest and its tests change `os.environ` while work beside them begins a process: it would have the
variables of a test that it knows nothing of, and could not begin at all (EFAULT) where they move
while the kernel reads them.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

ENVIRONMENT = dict(os.environ)


def run(command, environment=None, **options):
    """The command's end, with its output as text; `environment` adds to the session's."""
    return subprocess.run(
        command, env=ENVIRONMENT | (environment or {}), capture_output=True, text=True, **options
    )


def compile_all(commands):
    """Side by side, one a core; what a compiler that fails has said is the error."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, commands))


def compile_one(command):
    done = run(command)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[:4000]}"
