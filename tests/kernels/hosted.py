"""GPU backends on the host's tensors: the CUDA kernels' bodies on fibers, Triton interpreted."""

import contextlib
import functools
import importlib.util
import os
from unittest import mock

import numpy as np
import torch

from elva_kernels.backends.cuda import launch, products
from elva_kernels.backends.table import BACKENDS

# Names of environment variables: the module of `fibers`; Triton's own.
CUDA_HOST, INTERPRET = "ELVA_TEST_CUDA_HOST", "TRITON_INTERPRET"
INTERPRETED = os.environ.get(INTERPRET) == "1"
ON_FIBERS = CUDA_HOST in os.environ
# Of a block's fibers in a round, ELVA_HOST_ORDER; a number seeds a shuffle.
ORDERS = ("forwards", "reversed", "2", "3", "5", "7", "9")


def serve_cuda(path):
    """From here on the backend `cuda` runs the module at `path`, on the host's tensors."""
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


@contextlib.contextmanager
def arithmetic_of_a_gpu():
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

    with (
        mock.patch.object(interpreter, "_get_np_dtype", numpy_dtype_once),
        mock.patch.object(interpreter, "_convert_float", exact),
        mock.patch.object(interpreter, "_patch_lang", replace_once),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch_anew),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
    ):
        yield
