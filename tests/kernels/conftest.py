"""Fixtures of the kernel tests."""

import collections
import concurrent.futures
import importlib
import os
import zlib

import pytest

from elva_kernels import doctor
from tests.kernels import hosted, selections
from tests.kernels.cases import INTERPRETED, ON_FIBERS, on_diagonal
from tests.kernels.hosted import CUDA_HOST

BESIDE = pytest.StashKey()


def pytest_configure(config):
    config.addinivalue_line("markers", "mutants: plants wrong kernels, which a suite must find")
    config.addinivalue_line("markers", "beside(work=): begins with the session, in another process")
    if selections.ASKED in os.environ:
        config.pluginmanager.register(selections.Plugin(os.environ[selections.ASKED]))
    if ON_FIBERS:
        hosted.serve_cuda(os.environ[CUDA_HOST])


def pytest_collection_finish(session):
    """What is marked `beside` begins, one after the other, on a core that the tests leave idle.

    Those tests come last. Work is a function of the config, and waits for processes of its own.
    """
    works = {item: item.get_closest_marker("beside") for item in session.items}
    session.items.sort(key=lambda item: works[item] is not None)
    pool = concurrent.futures.ThreadPoolExecutor(1)
    session.config.stash[BESIDE] = {
        item.nodeid: pool.submit(work.kwargs["work"], session.config)
        for item, work in works.items()
        if work and not session.config.option.collectonly and not is_skipped(item)
    }


def is_skipped(item):
    return any(mark.args and mark.args[0] for mark in item.iter_markers("skipif"))


@pytest.fixture
def beside(request):
    """What the work of a test marked `beside` has returned; it is waited for."""
    return request.config.stash[BESIDE][request.node.nodeid].result()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """By default few cases of a test, the others thorough; a session of one backend has a choice of
    its own."""
    if selections.ASKED not in os.environ:
        on_the_diagonal(items)
        if not config.getoption("--every-case"):
            selections.leave_few_cases(items)


def on_the_diagonal(items):
    """Of a test's cases on every CPU level, the diagonal by default and the product thorough.

    A case is the test's other parameters; where they are few, every level has all of them.
    """
    levels = [f"cpu:{level}" for level in doctor().native.get("levels", ())]
    cases = collections.defaultdict(list)
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend in levels:
            cases[item.path, item.originalname, backend].append(item)
    for (*_, backend), found in cases.items():
        for case, item in enumerate(found):
            if len(found) >= len(levels) and not on_diagonal(
                case, levels.index(backend), len(levels)
            ):
                item.add_marker("thorough")


@pytest.fixture(scope="session", autouse=INTERPRETED)
def _arithmetic_of_a_gpu():
    with hosted.arithmetic_of_a_gpu():
        yield


@pytest.fixture(autouse=ON_FIBERS)
def _order_of_fibers(request, monkeypatch):
    """In a round of a block's fibers: for each test another, and the same every time."""
    choice = zlib.crc32(request.node.nodeid.encode()) % len(hosted.ORDERS)
    monkeypatch.setenv("ELVA_HOST_ORDER", hosted.ORDERS[choice])


@pytest.fixture
def backend(request, monkeypatch):
    """The backend's name; for "cpu:avx2" the compiled module is held to that level meanwhile."""
    name, _, level = request.param.partition(":")
    if not level:
        yield name
        return
    compiled = importlib.import_module("elva_kernels._C")
    monkeypatch.setenv("ELVA_KERNELS_CPU_LEVEL", level)
    compiled.reset_level()
    assert compiled.level() == level
    yield name
    monkeypatch.undo()
    compiled.reset_level()
