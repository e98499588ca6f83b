"""The compiled module as a guest: threads, forks, exits, CPU levels, sanitizers, its build."""

import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import elva_kernels
from elva_kernels.backends import boundary
from elva_kernels.backends.cpu import reward as cpu
from elva_kernels.backends.launcher import Groups
from elva_kernels.reference import Weights
from tests.kernels import compiled, processes
from tests.kernels.cases import EVERY_LEVEL

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WEIGHTS = {"margin": 0.1, "rank_penalty": 0.01, "w_margin": 0.4, "w_rank": 0.6}
ADDRESS_UNDEFINED = "-fsanitize=address,undefined -fno-sanitize-recover=all"
THREAD = "-fsanitize=thread"

needs_native = pytest.mark.skipif(
    boundary.unavailable_reason() is not None, reason=str(boundary.unavailable_reason())
)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(groups=24, n=20, dim=512, dtype=torch.float32):
    """Large enough that the pool takes part."""
    shapes = ((groups, dim), (groups, dim), (groups, n, dim))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def results(tensors, rank_temperature=0.0):
    weights = Weights(**WEIGHTS, rank_temperature=rank_temperature)
    return cpu.ranking_reward_and_grad(Groups(*tensors), None, weights, (True,) * 3)


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def run_python(program, **environment):
    """`program` in a fresh interpreter; fails after five minutes.

    Started away from the checkout, whose `elva_kernels` would stand before the installed one.
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank_temperature", [0.0, 0.05])
def test_bits_do_not_depend_on_the_number_of_threads(threads, dtype, rank_temperature):
    tensors = inputs(dtype=dtype)
    threads(1)
    alone = results(tensors, rank_temperature)
    for count in (2, 3, 7):
        threads(count)
        for _ in range(5):
            assert equal(results(tensors, rank_temperature), alone)


@needs_native
@pytest.mark.parametrize("rank_temperature", [0.0, 1e-3])
def test_bits_do_not_depend_on_the_callers_float_mode(threads, rank_temperature):
    tensors = tuple(x * 1e-38 for x in inputs())
    threads(2)
    normal = results(tensors, rank_temperature)
    assert torch.set_flush_denormal(True), "this processor cannot flush subnormals"
    try:
        flushed = results(tensors, rank_temperature)
    finally:
        torch.set_flush_denormal(False)
    assert equal(flushed, normal)


@needs_native
def test_threads_that_call_at_once_do_not_disturb_each_other(threads):
    threads(3)
    cases = [inputs() for _ in range(4)]
    alone = [results(case) for case in cases]
    wrong = []

    def work(i):
        for _ in range(20):
            if not equal(results(cases[i]), alone[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_with_a_pool_of_its_own():
    # In a fresh interpreter, since forking beside the test runner's own threads is not what is
    # tested. The parent's pool is in use by another thread at the moment of each fork.
    program = """
        import multiprocessing, threading, torch
        from elva_kernels.backends.cpu import reward as cpu
        from elva_kernels.backends.launcher import Groups
        from elva_kernels.reference import Weights
        weights = Weights(margin=0.1, rank_penalty=0.01, w_margin=0.4, w_rank=0.6)
        torch.set_num_threads(3)
        tensors = (torch.randn(24, 512), torch.randn(24, 512), torch.randn(24, 20, 512))
        call = lambda: cpu.ranking_reward_and_grad(Groups(*tensors), None, weights, (True,) * 3)
        right = call()
        done = threading.Event()
        def busy():
            while not done.is_set():
                call()
        worker = threading.Thread(target=busy, daemon=True)
        worker.start()
        def child(queue):
            torch.set_num_threads(3)
            found = call()
            # OpenMP does not survive a fork: loops of torch's own wait for threads that are gone.
            torch.set_num_threads(1)
            queue.put(all(bool((a == b).all()) for a, b in zip(found, right)))
        context = multiprocessing.get_context("fork")
        for _ in range(5):
            queue = context.SimpleQueue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            process.join(20)
            assert process.exitcode == 0, process.exitcode
            assert queue.get()
        done.set()
        worker.join()
        print("equal")
    """
    done = run_python(program)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    "imported",
    [
        *(pytest.param(x, marks=pytest.mark.thorough) for x in ("", "import elva_kernels")),
        "import elva_kernels._C",
    ],
)
def test_a_child_forked_before_the_first_call_waits_for_no_thread(imported):
    """Torch has begun OpenMP's threads, and the child has none of them."""
    program = f"""
        import multiprocessing, torch
        {imported}
        torch.set_num_threads(3)
        tensors = (torch.randn(64, 512), torch.randn(64, 512), torch.randn(64, 52, 512))
        assert torch.randn(1 << 22).mul(2).isfinite().all()
        def child(queue):
            import elva_kernels
            found = elva_kernels.ranking_reward_and_grad(*tensors)
            torch.set_num_threads(1)  # as above: torch's own loops would wait
            alone = elva_kernels.ranking_reward_and_grad(*tensors)
            left, right = (flat(x) for x in (found, alone))
            queue.put(all(bool((a == b).all()) for a, b in zip(left, right)))
        flat = lambda results: [*results[0], *results[1:]]
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,), daemon=True)
        process.start()
        process.join(20)
        assert process.exitcode == 0, process.exitcode
        assert queue.get()
        print("equal")
    """
    done = run_python(program)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no csrc beside these tests")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_no_child_waits_for_what_a_thread_of_its_parent_has_begun(tmp_path):
    """A static of a function is made by one thread while others wait. A child that was forked
    meanwhile has no such thread: it waited for ever for the parent's first call of all."""
    driver = HERE / "pool_driver.cpp"
    program = compiled.program(tmp_path, driver, "-O1", parts=("parallel", "kept_memory"))
    for seed in range(6):
        done = processes.run([program, str(seed), "4"], timeout=300)
        assert (done.returncode, done.stdout) == (0, "each once\n"), done.stderr[:2000]


@needs_native
def test_a_data_loader_worker_computes_the_parents_bits(threads):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork")
    threads(2)
    tensors = inputs()
    right = results(tensors)

    class Rewards(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return results(tensors)[0]

    loader = torch.utils.data.DataLoader(
        Rewards(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    rewards = list(loader)
    assert len(rewards) == 4 and equal(rewards, [right[0]] * 4)


@needs_native
@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_the_interpreter_exits_while_the_pool_works(times):
    program = """
        import threading, time, torch
        from elva_kernels.backends.cpu import reward as cpu
        from elva_kernels.backends.launcher import Groups
        from elva_kernels.reference import Weights
        weights = Weights(margin=0.1, rank_penalty=0.01, w_margin=0.4, w_rank=0.6)
        torch.set_num_threads(3)
        tensors = (torch.randn(64, 2048), torch.randn(64, 2048), torch.randn(64, 100, 2048))
        # Results made beforehand: torch's own allocation aborts a process that ends inside it.
        values = cpu._empty_values(Groups(*tensors))
        gradients = {id(x): cpu.empty_gradient(x) for x in tensors}
        cpu._empty_values = lambda *_: values
        cpu.empty_gradient = lambda x: gradients[id(x)]
        def busy():
            while True:
                cpu.ranking_reward_and_grad(Groups(*tensors), None, weights, (True,) * 3)
        threading.Thread(target=busy, daemon=True).start()
        time.sleep(0.2)
        print("leaving")
    """
    for _ in range(times):
        done = run_python(program)
        assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr


@needs_native
@pytest.mark.parametrize(
    "which",
    [slice(-1, None), pytest.param(slice(None), marks=pytest.mark.thorough)],
    ids=["one", "every"],
)
def test_every_level_of_this_cpu_can_be_forced(which):
    program = "from elva_kernels.backends import boundary; print(boundary.describe()['level'])"
    for level in boundary.describe()["levels"][which]:
        assert run_python(program, ELVA_KERNELS_CPU_LEVEL=level).stdout == f"{level}\n"


@needs_native
def test_a_level_that_is_not_there_is_an_error_and_not_another_level():
    program = """
        import torch
        import elva_kernels
        x = torch.ones(1, 4)
        try:
            elva_kernels.ranking_reward(x, x, x[:, None], backend="cpu")
        except elva_kernels.BackendUnavailable as error:
            print(error)
    """
    message = run_python(program, ELVA_KERNELS_CPU_LEVEL="avx1024").stdout
    assert "ELVA_KERNELS_CPU_LEVEL must be one of the levels of this CPU" in message
    assert "got 'avx1024'" in message


@needs_native
@pytest.mark.parametrize("n", [511, 512, 600, 5000])
def test_ranks_by_counting_and_by_sorting_agree_with_the_reference(n):
    scores = torch.randint(-9, 9, (3, n + 1)).float() / 8  # many ties
    grades = torch.randint(0, 9, (3, n)).float() / 8
    for dtype in (torch.float32, torch.float64):
        for relevance in (None, grades.to(dtype)):
            ours = cpu.reward_from_scores(scores.to(dtype), None, relevance, Weights(**WEIGHTS))
            options = {"relevance": relevance, "backend": "reference"} | WEIGHTS
            right = elva_kernels.reward_from_scores(scores.double(), **options)
            assert torch.equal(ours[3], right.rank)
            torch.testing.assert_close(ours[0].double(), right.reward, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "backend", [x for x in EVERY_LEVEL if x.values[0].startswith("cpu")], indirect=True
)
@pytest.mark.parametrize(
    ("dtype", "least", "error"), [(torch.float32, -87, 2e-7), (torch.float64, -708, 4e-16)]
)
def test_exponentials_err_by_little(backend, dtype, least, error):
    """Those of slopes, from the least that is not 0 to 1."""
    exponents = torch.linspace(least, 0, 2**15, dtype=torch.float64).to(dtype)
    found, peak, factor = exponents.clone(), torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    rows = found.data_ptr(), peak.data_ptr(), factor.data_ptr()
    code = boundary.DTYPE_CODES[dtype]
    boundary.module().slope_rows(code, 1, 1, len(found), *rows, 0, 0, 0, 0, 0, 1.0)
    exact = np.exp(exponents.numpy().astype(np.longdouble))
    assert abs(found.numpy() / exact - 1).max() < error


@needs_native
@pytest.mark.parametrize("longest", [0, 63, 64, 99])
def test_the_norm_of_the_longest_column(longest):
    """By which slopes' rounding is judged; a hundredth above it at most."""
    rows, scale = torch.rand(9, 100).bfloat16(), torch.rand(9)
    rows[:, longest] *= 4
    exact = (rows.double() * scale.unsqueeze(1)).norm(dim=0).max()
    norm = boundary.module().column_norm(1, *rows.shape, rows.data_ptr(), scale.data_ptr())
    assert exact <= norm <= 1.011 * exact


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="counts on lazily committed memory")
def test_offsets_beyond_32_bits():
    stride = 2**31 + 64  # elements between the two groups, and between negatives
    memory = torch.empty(3 * stride, dtype=torch.bfloat16)  # lazily committed
    query, positive, negatives = (x.to(torch.bfloat16) for x in inputs(2, 2, 48))
    far = torch.as_strided(memory, (2, 2, 48), (stride, stride, 1))
    far[0, 0], far[0, 1], far[1, 1] = negatives[0, 0], negatives[0, 1], negatives[1, 1]
    near = far.contiguous()
    assert equal(results((query, positive, far)), results((query, positive, near)))


@needs_native
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize(
    "layout",
    ["contiguous", *(pytest.param(x, marks=pytest.mark.thorough)
                     for x in ("transposed", "expanded", "bank", "shared"))],
)  # fmt: skip
def test_no_temporary_is_larger_than_a_hundredth_of_the_inputs(layout):
    """Values of rows as they lie; gradients too, of a query beside a bank and of a shared bank."""
    program = f"""
        import torch
        from elva_kernels import ranking_reward, ranking_reward_and_grad
        def field(name):
            line = next(x for x in open("/proc/self/status") if x.startswith(name))
            return int(line.split()[1]) * 1024
        query, positive = torch.randn(64, 1536), torch.randn(64, 1536)
        negatives, options = torch.randn(64, 100, 1536), {{"backend": "cpu"}}
        call = lambda: ranking_reward(query, positive, negatives, **options)
        if "{layout}" == "transposed":
            negatives = torch.randn(64, 1536, 100).mT
        elif "{layout}" == "expanded":
            negatives = torch.randn(100, 1536).expand(64, 100, 1536)
        elif "{layout}" != "contiguous":
            call = lambda: ranking_reward_and_grad(query, positive, negatives, **options)[1:]
            if "{layout}" == "bank":
                negatives = torch.randn(20_000, 1536)
                options |= {{"negative_index": torch.randint(0, 20_000, (64, 100))}}
                options |= {{"wrt": ("query",)}}
            else:
                negatives = torch.randn(100, 1536)
                options |= {{"wrt": ("negatives",)}}
        for _ in range(3):
            call()
        open("/proc/self/clear_refs", "w").write("5")
        before = field("VmRSS")
        results = call()
        returned = sum(x.nbytes for x in results if x is not None)
        print(field("VmHWM") - before - returned)
    """
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.01 * 64 * 102 * 1536 * 4


def compile_driver(folder, flags, levels, whole, other):
    """tests/kernels/cpu_driver.cpp and csrc/cpu with `flags`: the program's path."""
    if shutil.which("g++") is None:
        pytest.skip("the sanitizers are tested with g++, which is not installed")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("no csrc beside these tests")
    driver = HERE / "cpu_driver.cpp"
    return compiled.program(folder, driver, flags, levels=levels, whole=whole, other=other)


def sanitize(flags, whole, other, run, callers):
    """The driver says nothing but the level, on each of `run`; `callers` threads call at once."""
    with tempfile.TemporaryDirectory() as folder:
        program = compile_driver(Path(folder), flags, run, whole, other)
        for level in run:
            environment = {"ELVA_KERNELS_CPU_LEVEL": level}
            done = processes.run([program, str(callers)], environment, timeout=300)
            assert (done.returncode, done.stdout) == (0, f"{level}\n"), done.stderr[:4000]


def addresses(config):
    """Checks of undefined behaviour take the compiler long, and longer the more it optimises."""
    flags, other = f"{ADDRESS_UNDEFINED} -O0", "-fno-sanitize=undefined"
    best, *_ = boundary.describe()["levels"]
    sanitize(flags, whole=["plain"], other=other, run={best, "plain"}, callers=1)


@needs_native
@pytest.mark.beside(work=addresses)
def test_addresses_are_right_at_two_levels_and_no_behaviour_is_undefined_at_one(beside): ...


def races(config):
    """How work is shared among threads is the same code for every level."""
    best, *_ = boundary.describe()["levels"]
    sanitize(f"{THREAD} -O1", whole=[best], other="", run=[best], callers=2)


@needs_native
@pytest.mark.thorough
@pytest.mark.beside(work=races)
def test_no_thread_races_at_the_best_level(beside): ...


@needs_native
@pytest.mark.thorough
@pytest.mark.parametrize("sanitizer", [ADDRESS_UNDEFINED, THREAD], ids=["undefined", "thread"])
def test_sanitizers_are_silent_at_every_level(sanitizer):
    levels = boundary.describe()["levels"]
    sanitize(f"{sanitizer} -O1", whole=levels, other="", run=levels, callers=3)


def build(tmp_path, **environment):
    """setup.py build_ext into `tmp_path`."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    if not (ROOT / "setup.py").exists():
        pytest.skip("no setup.py beside these tests")
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_a_build_without_a_compiler_succeeds_and_says_so(tmp_path):
    done = build(tmp_path, PATH="/nonexistent", CXX="", CUDA_HOME="")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler that works" in done.stderr
    assert list(tmp_path.rglob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}")) == []


@pytest.mark.parametrize(
    ("wish", "message"),
    [("1", "ELVA_KERNELS_CUDA=1 needs nvcc"), ("yes", "ELVA_KERNELS_CUDA must be 0 or 1")],
)
def test_a_wish_for_cuda_that_cannot_be_met_is_an_error(tmp_path, wish, message):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    environment = {"PATH": "/nonexistent", "CXX": compiler, "CUDA_HOME": ""}
    done = build(tmp_path, ELVA_KERNELS_CUDA=wish, **environment)
    assert done.returncode != 0
    assert message in done.stderr
