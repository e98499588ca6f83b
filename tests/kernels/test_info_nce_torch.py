"""InfoNCE among torch's own machinery, on every backend: gradients, compile, modes, errors."""

import math
import shutil

import pytest
import torch

from elva_kernels import InfoNCELoss, info_nce
from tests.kernels.cases import BACKENDS, batch, computing, same_bits

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
every_backend = pytest.mark.parametrize("backend", computing("info_nce", BACKENDS))
OPS = torch.ops.elva_kernels


@every_backend
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_and_once(backend, symmetric, reduction):
    query, candidates = (x.requires_grad_() for x in batch(4, 7, 5, torch.float64))
    target, ids = torch.tensor([3, 0, 0, 6]), torch.tensor([0, 1, 2, 3, 4, 4, 6])
    heat = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def loss(q, c, t):
        return info_nce(
            q,
            c,
            target,
            temperature=t,
            symmetric=symmetric,
            candidate_ids=ids,
            reduction=reduction,
            backend=backend,
        )

    assert torch.autograd.gradcheck(loss, (query, candidates, heat))
    total = loss(query, candidates, heat).sum()
    (grad,) = torch.autograd.grad(total, query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^info_nce: the loss must be differentiated once"):
        grad.sum().backward()
    frozen = loss(query.detach(), candidates, heat.detach())
    (alone,) = torch.autograd.grad(frozen.sum(), candidates)
    (among,) = torch.autograd.grad(loss(query, candidates, heat).sum(), candidates)
    torch.testing.assert_close(alone, among, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_a_batch_of_upstream_gradients(backend, reduction):
    """And of one that does not exist: autograd's functions may give None."""

    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    leaves = [x.requires_grad_() for x in batch(4, 7, 5, torch.float32)]
    loss = info_nce(*leaves, reduction=reduction, backend=backend)
    upstream = torch.randn(3, *loss.shape)
    found = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        expected = torch.autograd.grad(loss, leaves, one, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-6, atol=1e-7)
    lost = torch.autograd.grad(Lost.apply(loss).sum(), leaves, allow_unused=True)
    assert lost == (None, None)


@every_backend
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.thorough)],
    ids=lambda d: str(d)[6:],
)
def test_opcheck(backend, dtype):
    query, candidates = batch(4, 7, 5, dtype)
    heat = torch.tensor(0.1)
    target = torch.tensor([1, 0, 3, 3])
    weight = torch.randn(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    several = torch.tensor([[1, 5], [0, -1], [3, 2], [-1, -1]])
    pairs = torch.tensor([[3, 0], [0, 4]])
    for arguments, wrt in [
        (
            (query, candidates, target, pairs, torch.arange(7), heat, 0.5, True, 16, backend),
            [True] * 2,
        ),
        ((query, candidates, None, None, None, heat, None, False, 16, backend), [False, True]),
        ((query, candidates, several, pairs, None, heat, None, True, 16, backend), [True, False]),
    ]:
        torch.library.opcheck(OPS.info_nce.default, arguments)
        saved = (*arguments, None, True, wrt, False)
        torch.library.opcheck(OPS.info_nce_and_grad.default, saved)
        rounded = (*arguments, weight, False, wrt, True)
        torch.library.opcheck(OPS.info_nce_and_grad.default, rounded)
        torch.library.opcheck(OPS.info_nce_backward.default, (*arguments, weight, wrt))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@every_backend
def test_compiles_without_a_graph_break(backend):
    module = InfoNCELoss(learnable_temperature=True, symmetric=True, backend=backend)

    def loss(query, candidates, target):
        each = info_nce(query, candidates, target, reduction="none", backend=backend)
        return module(query * 2, candidates, target) + (each * each).mean()

    target = torch.tensor([4, 0, 1])
    inputs = [x.requires_grad_() for x in batch(3, 6, 8, torch.float32)]
    compiled_inputs = [x.detach().clone().requires_grad_() for x in inputs]
    expected = loss(*inputs, target)
    expected.backward()
    heat, module.log_temperature.grad = module.log_temperature.grad, None
    torch._dynamo.reset()
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled_inputs, target)
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.log_temperature.grad, heat, rtol=1e-5, atol=1e-6)
    for a, b in zip(compiled_inputs, inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@every_backend
def test_module(backend):
    query, candidates = (x.requires_grad_() for x in batch(5, 8, 6, torch.float32))
    module = InfoNCELoss(temperature=0.2, max_score=0.9, backend=backend)
    assert not list(module.parameters())
    expected = info_nce(query, candidates, temperature=0.2, max_score=0.9, backend=backend)
    assert module(query, candidates) == expected
    assert "temperature=0.2, symmetric=False, max_score=0.9" in repr(module)
    learnt = InfoNCELoss(
        temperature=0.2, max_score=0.9, learnable_temperature=True, backend=backend
    )
    loss = learnt(query, candidates)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    heat = torch.tensor(0.2, requires_grad=True)
    info_nce(query, candidates, temperature=heat, max_score=0.9, backend=backend).backward()
    torch.testing.assert_close(learnt.log_temperature.grad, heat.grad * 0.2, rtol=1e-4, atol=0)
    assert "(learnt)" in repr(learnt)


@every_backend
def test_modes(backend):
    query, candidates = (x.requires_grad_() for x in batch(5, 8, 6, torch.float32))
    expected = info_nce(query, candidates, symmetric=True, backend=backend)
    gradients = torch.autograd.grad(expected, (query, candidates))
    with torch.inference_mode():
        assert same_bits(
            info_nce(query, candidates, symmetric=True, backend=backend), expected.detach()
        )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            loss = info_nce(query, candidates, symmetric=True, backend=backend)
            assert loss.dtype == torch.float32
            assert same_bits(loss.detach(), expected.detach())
            for a, b in zip(torch.autograd.grad(loss, (query, candidates)), gradients, strict=True):
                assert same_bits(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert info_nce(query[:0], candidates, backend=backend).isnan()
    assert info_nce(query[:0], candidates, reduction="sum", backend=backend) == 0


def test_errors():
    q, c = torch.randn(3, 8), torch.randn(5, 8)
    for change, error, text in [
        ({"temperature": 0.0}, ValueError, "temperature must be at least 1e-06, got 0.0"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite, got inf"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must hold one number, got shape"),
        (
            {"temperature": torch.ones((), dtype=torch.int64)},
            TypeError,
            "temperature must be bfloat",
        ),
        ({"temperature": torch.ones((), device="meta")}, ValueError, "temperature must be on the"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb must be at least 1, got 0"),
        ({"workspace_mb": True}, TypeError, "workspace_mb must be an int, got bool True"),
        ({"target": torch.tensor([0, 1, 5])}, ValueError, "target must hold indices of candidates"),
        ({"candidates": c[:2]}, ValueError, "target must be given where queries (3) outnumber"),
        ({"backend": "x"}, ValueError, "backend must be one of auto"),
        ({"query": q.long()}, TypeError, "query must be bfloat16, float16, float32 or float64"),
    ]:
        with pytest.raises(error) as caught:
            info_nce(**({"query": q, "candidates": c} | change))
        assert str(caught.value).startswith(f"info_nce: {text}")
    for change, text in [
        ({"temperature": 0.0}, "InfoNCELoss: temperature must be at least 1e-06, got 0.0"),
        ({"reduction": "max"}, "InfoNCELoss: reduction must be one of"),
    ]:
        with pytest.raises(ValueError, match=text):
            InfoNCELoss(**change)


@pytest.mark.parametrize("temperature", [math.inf, 0.0, -1.0, math.nan])
def test_temperatures_of_every_kind(temperature):
    """A tensor's value is not looked at: beyond all it is uniform, not above 0 it is NaN."""
    query, candidates = torch.randn(4, 5), torch.randn(6, 5)
    for backend in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in (query, candidates)]
        leaves.append(torch.tensor(temperature, dtype=torch.float64, requires_grad=True))
        loss = info_nce(*leaves[:2], temperature=leaves[2], backend=backend)
        gradients = torch.autograd.grad(loss, leaves)
        if math.isinf(temperature):
            assert loss.item() == pytest.approx(math.log(6), rel=1e-6)
            assert not any(x.any() for x in gradients)
        else:
            assert loss.isnan()
            assert all(x.isnan().all() for x in gradients)
