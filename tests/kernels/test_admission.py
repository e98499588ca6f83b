"""The self-test that "auto" asks of a GPU backend, on backends that are right, wrong or broken."""

import json
import warnings

import pytest
import torch

from elva_kernels import (
    BackendUnavailable,
    available_backends,
    doctor,
    ranking_reward,
    reference,
    warm_up,
)
from elva_kernels.backends import choice
from elva_kernels.backends.admission import in_batch as admission_in_batch
from elva_kernels.backends.admission import reward as admission_reward
from elva_kernels.backends.admission import verdicts
from elva_kernels.backends.table import BACKENDS, LAUNCHERS, Backend
from tests.kernels.cases import embeddings

INPUTS = embeddings((2,), 5, 16, torch.float32)
CPU = torch.device("cpu")


class Machine:
    """A backend "probe" that "auto" would take first, with launchers made by `make`."""

    def __init__(self, monkeypatch, cache):
        self.patch, self.cache, self.calls = monkeypatch, cache, 0
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.delenv("ELVA_KERNELS_SELFTEST", raising=False)
        self.restart()

    def restart(self):
        """As a new process would find it."""
        choice.launcher.cache_clear()
        self.patch.setattr(verdicts, "_verdicts", {})
        self.patch.setattr(verdicts, "_tried", set())

    def install(self, make, version="1"):
        probe = Backend("cpu", lambda: None, version=lambda: version)
        others = [name for name in BACKENDS if name != "probe"]
        self.patch.setitem(BACKENDS, "probe", probe)
        for name in others:  # behind it
            BACKENDS[name] = BACKENDS.pop(name)
        for op in verdicts.TRIALS:
            self.patch.setitem(LAUNCHERS[op], "probe", self._counted(make(LAUNCHERS[op])))

    def _counted(self, launch):
        def counted(*tensors, **weights):
            self.calls += 1
            return launch(*tensors, **weights)

        return counted

    def entries(self):
        files = sorted((self.cache / "elva_kernels" / "selftest").glob("*"))
        return [json.loads(path.read_text()) for path in files]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    yield Machine(monkeypatch, tmp_path)
    choice.launcher.cache_clear()


@pytest.fixture
def one_dtype(monkeypatch):
    """What `warm_up` runs in each dtype alike is shown in one: all of them take ten seconds."""
    monkeypatch.setattr(verdicts, "DTYPES", (torch.float32,))


def right(row):
    return row["reference"]


def wrong(row):
    def launch(*tensors, **weights):
        first, *rest = row["reference"](*tensors, **weights)
        return first + 1e-3, *rest

    return launch


def broken(row):
    def launch(*tensors, **weights):
        raise RuntimeError("no such\ninstruction")

    return launch


def taken(op="ranking_reward", dtype=torch.float32):
    """Which backend "auto" takes."""
    launch = choice.launcher(op, "auto", CPU, dtype)
    return next(name for name, found in LAUNCHERS[op].items() if found is launch)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(x, marks=[] if x == torch.float32 else pytest.mark.thorough, id=str(x))
        for x in verdicts.DTYPES
    ],
)
def test_a_right_backend_is_taken_and_tested_once(machine, dtype):
    machine.install(right)
    for op in verdicts.TRIALS:
        assert taken(op, dtype=dtype) == "probe"
    ran = machine.calls
    machine.restart()
    for op in verdicts.TRIALS:
        assert taken(op, dtype=dtype) == "probe"
    assert machine.calls == ran
    assert [entry["error"] for entry in machine.entries()] == [None] * len(verdicts.TRIALS)
    machine.restart()
    machine.install(right, version="2")
    assert taken(dtype=dtype) == "probe"
    assert machine.calls > ran


@pytest.mark.parametrize("op", verdicts.TRIALS)
def test_a_wrong_backend_is_passed_over_with_one_warning(machine, op):
    machine.install(wrong)
    with pytest.warns(RuntimeWarning, match=rf"^{op}: backend probe is passed over") as caught:
        assert taken(op) != "probe"
    assert len(caught) == 1
    assert "from the reference" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.launcher.cache_clear()
        assert taken(op) != "probe"
    ran = machine.calls
    machine.restart()  # the verdict outlives the process, and warns again in the next
    assert f"self-test of {op} probe float32" in str(doctor())
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert taken(op) != "probe"
    assert machine.calls == ran
    named = choice.launcher(op, "probe", CPU, torch.float32)
    assert named is LAUNCHERS[op]["probe"]


def test_a_broken_backend_is_passed_over_for_this_process_alone(machine):
    machine.install(broken)
    expected = ranking_reward(*INPUTS, backend="reference")
    with pytest.warns(RuntimeWarning, match="it raised RuntimeError: no such instruction"):
        result = ranking_reward(*INPUTS)
    torch.testing.assert_close(result.reward, expected.reward)
    assert not machine.entries()
    assert "it raised RuntimeError" in str(doctor())
    machine.restart()
    machine.install(right)
    assert taken() == "probe"


def test_blind_trust(machine, monkeypatch):
    machine.install(wrong)
    monkeypatch.setenv("ELVA_KERNELS_SELFTEST", "0")
    assert taken() == "probe"
    assert machine.calls == 0


def test_an_op_without_a_trial_is_not_trusted(machine, monkeypatch):
    machine.install(right)
    monkeypatch.delitem(verdicts.TRIALS, "ranking_reward")
    assert taken() != "probe"
    assert machine.calls == 0


@pytest.mark.thorough
@pytest.mark.usefixtures("one_dtype")
def test_a_capture_needs_a_verdict_and_says_so(machine, monkeypatch):
    machine.install(right)
    monkeypatch.setattr(verdicts, "_is_captured", lambda device: True)
    message = r"got no verdict for float32; call elva_kernels.warm_up\('cpu'\) before the capture"
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=message):
            ranking_reward(*INPUTS)
    monkeypatch.setattr(verdicts, "_is_captured", lambda device: False)
    warm_up("cpu")
    choice.launcher.cache_clear()
    monkeypatch.setattr(verdicts, "_is_captured", lambda device: True)
    assert taken() == "probe"
    ranking_reward(*INPUTS)


@pytest.mark.thorough
def test_warm_up_tests_every_op_in_every_dtype(machine):
    machine.install(right)
    report = warm_up(CPU)
    told = [text for text in report.selftests if " probe " in text]
    assert len(told) == len(verdicts.TRIALS) * len(verdicts.DTYPES)
    assert set(report.selftests.values()) == {None}


@pytest.mark.usefixtures("one_dtype")
def test_warm_up_runs_what_a_verdict_is_kept_on_once_a_process(machine):
    """So that nothing is compiled or loaded inside the capture after it."""
    machine.install(right)
    warm_up(CPU)
    first = machine.calls
    warm_up(CPU)
    assert machine.calls == first > 0
    machine.restart()
    assert taken() == "probe"
    assert machine.calls == first
    warm_up(CPU)
    assert machine.calls == 2 * first


def test_a_crash_in_warm_up_leaves_what_was_known(machine):
    machine.install(right)
    assert taken() == "probe"
    machine.restart()
    assert taken() == "probe"  # by the verdict that is kept
    machine.install(broken)
    with pytest.warns(RuntimeWarning, match="it raised RuntimeError"):
        warm_up(CPU)
    assert taken() == "probe"
    assert "probe" in str(doctor())


@pytest.mark.thorough
@pytest.mark.usefixtures("one_dtype")
def test_an_interrupted_warm_up_begins_again(machine, monkeypatch):
    machine.install(right)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(verdicts.TRIALS, "ranking_reward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            warm_up(CPU)
    warm_up(CPU)
    assert machine.calls > 0


def test_what_warm_up_overturns_is_chosen_no_more(machine):
    machine.install(right)
    assert taken() == "probe"
    machine.restart()
    assert taken() == "probe"  # by the verdict that is kept
    machine.install(wrong)
    with pytest.warns(RuntimeWarning, match="passed over"):
        warm_up(CPU)
    assert taken() != "probe"


def test_a_cache_that_cannot_be_written_or_read_costs_a_test_and_nothing_else(machine, tmp_path):
    (tmp_path / "elva_kernels").write_text("a file where the directory would be")
    machine.install(right)
    assert taken() == "probe"
    machine.restart()
    assert taken() == "probe"
    assert "runs here" in str(doctor())
    (tmp_path / "elva_kernels").unlink()
    machine.restart()
    assert taken() == "probe"
    for path in (tmp_path / "elva_kernels" / "selftest").glob("*.json"):
        path.write_text("{")
    machine.restart()
    assert taken() == "probe"
    assert "runs here" in str(doctor())


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=() if dtype == torch.bfloat16 else pytest.mark.thorough)
        for dtype in verdicts.DTYPES
    ],
    ids=str,
)
def test_every_backend_passes_where_it_runs(dtype):
    for op, attempt in verdicts.TRIALS.items():
        for name in ("cpu", "reference"):
            if available_backends()[name] is None:
                launchers = {half: row.get(name) for half, row in LAUNCHERS.items()}
                for soft in (False, True):
                    attempt(launchers.get, dtype, CPU, soft)
            assert op in LAUNCHERS


def test_every_op_of_a_backend_that_must_prove_itself_has_a_trial():
    proving = {name for name, backend in BACKENDS.items() if backend.version is not None}
    for op, row in LAUNCHERS.items():
        assert op in verdicts.TRIALS or not proving & set(row), op


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("dtype", verdicts.DTYPES, ids=str)
def test_no_rounding_can_change_a_rank_in_the_trials(dtype, on_gpu, monkeypatch):
    """Scores lie apart by more than any backend may err, but for exact ties."""
    if on_gpu:
        monkeypatch.setattr(admission_reward, "_DENSE_ON_CPU", admission_reward._DENSE)
    for soft in (False, True):
        cases = list(admission_reward._cases(dtype, CPU, soft))
        assert len(cases) == 6
        assert sum(case.inputs.relevance is not None for case in cases) == 2
        for group in (group for case in cases for group in case.truth.scores):
            gaps = group[group.isfinite()].sort().values.diff()
            assert ((gaps == 0) | (gaps > 1e-4)).all()
        for case in cases:
            if case.inputs.relevance is not None:  # nor which negative is the hardest
                relevance = case.inputs.relevance[0].double().nan_to_num(nan=0.0)
                rivals = case.truth.scores[:, 1:] - case.weights.margin * relevance
                first, second = rivals.nan_to_num(nan=-1.0).topk(2).values.unbind(-1)
                assert (first - second > 1e-4).all()


@pytest.mark.parametrize(
    ("made", "head"), [("inputs_of", 37), ("several_of", 37), ("dense_of", 4), ("crowd_of", 1)]
)
@pytest.mark.parametrize("dtype", verdicts.DTYPES, ids=str)
def test_no_rounding_can_change_an_order_in_the_in_batch_trials(made, head, dtype):
    """Nor that of the head, nor that of a positive and a negative."""
    query, candidates, batch = getattr(admission_in_batch, made)(dtype)
    scores = reference.cosine_matrix(query.double(), candidates.double())
    found = reference.statistics_of_scores(scores, batch, k=head + 1, temperature=None)
    ordered = found.topk_scores[:, : head + 1]
    negatives = reference.statistics_of_scores(scores, batch, k=len(candidates), temperature=None)
    beside = found.target_score.unsqueeze(2) - negatives.topk_scores.unsqueeze(1)
    gaps = torch.cat([ordered.diff().abs().flatten(), beside.abs().flatten()])
    gaps = gaps[gaps.isfinite() & (gaps > 1e-12)]
    assert gaps.numel() > 0
    assert (gaps > 4e-5).all()
