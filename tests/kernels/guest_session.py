"""A session whose compiled module is a guest's (guest.h), or a sanitized one: a plugin of
pytest, see test_neon.py.

It is loaded with `-p`, runs what takes a level of the cpu backend, and writes how many tests of
each level have passed.
"""

import collections
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

MODULE = "ELVA_TEST_GUEST_MODULE"  # the file of elva_kernels._C
REPORT = "ELVA_TEST_GUEST_REPORT"  # the file that the session writes

# Files whose tests take a level of the cpu backend.
CONTRACT = [
    "reward",
    "reward_scores",
    "reward_index",
    "reward_relevance",
    "reward_properties",
    "rank_statistics",
    "info_nce",
    "in_batch_reward",
    "in_batch_relations",
    "in_batch_positives",
    "topk",
    "codes",
]

passed = collections.Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    """Before they are imported, who ask what the module has."""
    spec = importlib.util.spec_from_file_location("elva_kernels._C", os.environ[MODULE])
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def level_of(item):
    """The best one where a test takes no backend, None where it takes another one than the CPU."""
    best = sys.modules["elva_kernels._C"].level()
    backend = parameters(item).get("backend", f"cpu:{best}")
    return backend.removeprefix("cpu:") if backend.startswith("cpu:") else None


def pytest_collection_modifyitems(config, items):
    """A file's tests that take a level, or tests that are named."""
    named = any("::" in argument for argument in config.args)
    kept = [x for x in items if named or ("backend" in parameters(x) and level_of(x))]
    config.hook.pytest_deselected(items=[x for x in items if x not in kept])
    items[:] = kept


def pytest_runtest_makereport(item, call):
    if call.when == "call" and call.excinfo is None:
        passed[level_of(item)] += 1


def pytest_sessionfinish():
    Path(os.environ[REPORT]).write_text(json.dumps(passed))
