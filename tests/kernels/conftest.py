"""Fixtures of the kernel tests."""

import collections
import concurrent.futures
import functools
import importlib
import importlib.util
import os
import zlib

import numpy as np
import pytest
import torch

from elva_kernels import doctor
from elva_kernels.backends.cuda import launch, products
from elva_kernels.backends.table import BACKENDS
from tests.kernels import selections
from tests.kernels.cases import INTERPRETED, ON_FIBERS, on_diagonal

BESIDE = pytest.StashKey()


def pytest_configure(config):
    """On fibers the CUDA kernels run on the host, on its tensors."""
    config.addinivalue_line("markers", "mutants: plants wrong kernels, which a suite must find")
    config.addinivalue_line("markers", "beside(work=): begins with the session, in another process")
    if selections.ASKED in os.environ:
        config.pluginmanager.register(selections.Plugin(os.environ[selections.ASKED]))
    if not ON_FIBERS:
        return
    path = os.environ["ELVA_TEST_CUDA_HOST"]
    spec = importlib.util.spec_from_file_location("cuda_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch.module = lambda: module
    launch.place = lambda tensor: (0, 0)
    products.half_product = exact_product
    BACKENDS["cuda"] = BACKENDS["cuda"]._replace(
        device_type="cpu",
        unavailable_reason=lambda: None,
        version=None,
        by_name_only=True,
    )


def exact_product(a, b, out, *, add=False):
    """Rounded once: torch's on a CPU have no other dtype than their factors."""
    exact = a.double() @ b.double()
    out.copy_(out + exact if add else exact)


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
def pytest_collection_modifyitems(items):
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
    """Triton's interpreter truncates to bfloat16 and loses its subnormals; no GPU does either.

    And it multiplies matrices by a library whose sums may depend on the place in the tile. Beside
    that, at each call of a device function it looks through the language for what is to be
    replaced, which takes half of its time: once a launch for each module is as good. And for each
    operation it writes its table of NumPy's dtypes anew: each is looked up once.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    convert, replace = interpreter._convert_float, interpreter._patch_lang
    launch, numpy_dtype = interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    replaced = set()  # in this launch: what the modules of its functions call the language

    def exact(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(values.copy()).bfloat16()
            return rounded.view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            wide = torch.from_numpy(values.copy()).view(torch.bfloat16).float()
            return wide.view(torch.uint32).numpy()
        return convert(values, source, target, rounding)

    def dot(_, a, b, total, *precision):
        products = a.data[:, :, None].astype(np.float64) * b.data[None].astype(np.float64)
        sums = products.sum(1).astype(total.data.dtype) + total.data
        return interpreter.TensorHandle(sums, total.dtype.scalar)

    def launch_anew(*given, **named):
        replaced.clear()
        launch(*given, **named)

    def replace_once(function):
        names = id(function.__globals__)
        if names in replaced:
            return None
        replaced.add(names)
        return replace(function)

    once = functools.cache(numpy_dtype)

    def numpy_dtype_once(given):
        return numpy_dtype(given) if given.scalar.is_ptr() else once(given.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype_once)
        patch.setattr(interpreter, "_convert_float", exact)
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


@pytest.fixture(autouse=ON_FIBERS)
def _order_of_fibers(request, monkeypatch):
    """In a round of a block's fibers: for each test another, and the same every time."""
    orders = ("forwards", "reversed", "2", "3", "5", "7", "9")
    choice = zlib.crc32(request.node.nodeid.encode()) % len(orders)
    monkeypatch.setenv("ELVA_HOST_ORDER", orders[choice])


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
