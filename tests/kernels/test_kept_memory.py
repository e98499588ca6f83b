"""Memory that large gradients come from: reused, never shared, given back."""

import copy
import threading

import pytest
import torch

from elva_kernels import RankingRewardLoss
from elva_kernels.backends import boundary
from tests.kernels.cases import DTYPES

pytestmark = pytest.mark.skipif(
    boundary.unavailable_reason() is not None, reason=str(boundary.unavailable_reason())
)
LARGE = (3, 1 << 19)  # elements; 3 MB or more in any dtype


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch):
    """Each test starts without idle memory."""
    with monkeypatch.context() as patch:
        patch.setenv("ELVA_KERNELS_CACHE_MB", "0")
        gradient(torch.float32)


def gradient(dtype, shape=LARGE):
    return boundary.empty_gradient(torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_an_ordinary_tensor(dtype):
    found = gradient(dtype)
    assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, LARGE, True)
    assert found.device.type == "cpu" and not found.requires_grad
    found.fill_(2)
    found *= 3
    assert torch.equal(copy.deepcopy(found), torch.full(LARGE, 6, dtype=dtype))
    assert found.share_memory_().is_shared() and bool((found == 6).all())


def test_memory_is_reused_once_its_tensor_is_gone_and_not_before():
    first = gradient(torch.float32)
    view, address = first[1:], first.data_ptr()
    del first
    second = gradient(torch.float32)  # a view keeps the memory
    assert second.data_ptr() != address
    del view
    assert gradient(torch.float32).data_ptr() == address


def test_a_block_may_be_a_quarter_too_large_and_no_more():
    address = gradient(torch.float32, (10 << 20,)).data_ptr()  # 40 MB
    assert gradient(torch.float32, (7 << 20,)).data_ptr() != address
    assert gradient(torch.float32, (9 << 20,)).data_ptr() == address


@pytest.mark.parametrize("megabytes", ["0", "5", "nonsense"])
def test_no_more_lies_idle_than_is_allowed(monkeypatch, megabytes):
    monkeypatch.setenv("ELVA_KERNELS_CACHE_MB", megabytes)
    idle = resident(lambda: gradient(torch.float32, (64 << 20,)).fill_(1))  # 256 MB
    assert idle < 32 << 20


@pytest.mark.parametrize("megabytes", [None, "9" * 30])
def test_it_lies_idle_by_default_and_where_more_is_allowed(monkeypatch, megabytes):
    if megabytes is not None:
        monkeypatch.setenv("ELVA_KERNELS_CACHE_MB", megabytes)
    assert resident(lambda: gradient(torch.float32, (64 << 20,)).fill_(1)) > 192 << 20


def resident(run):
    """How much larger the process is after `run`, in bytes."""
    try:
        before = _resident()
    except OSError:
        pytest.skip("resident memory is read from Linux's /proc")
    run()
    return _resident() - before


def _resident():
    with open("/proc/self/status") as status:
        line = next(x for x in status if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_threads_never_share_a_block():
    """Each thread fills gradients with its own number and finds it there."""
    wrong = []

    def work(number):
        for size in range(20):
            held = [gradient(torch.float32, (1 << 18, 1 + size % 3)).fill_(number) for _ in "ab"]
            wrong.extend(x for x in held if not bool((x == number).all()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_of_one_step_outlive_the_next():
    leaves = [torch.randn(16, 512), torch.randn(16, 512), torch.randn(16, 60, 512)]
    kept = []
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for x in leaves]
        RankingRewardLoss()(*inputs).backward()
        kept.append(inputs)
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one.grad, other.grad)
        assert one.grad.data_ptr() != other.grad.data_ptr()
