"""Where ELVA keeps what it can make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """Where ELVA keeps what it can make again."""
    for variable, folder in (("ELVA_CACHE", "."), ("XDG_CACHE_HOME", "elva")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).absolute() / folder
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "elva"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "elva"
    return Path.home() / ".cache" / "elva"
