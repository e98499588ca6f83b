"""The in-batch ops over the processes of a group: what one process has of the whole batch."""

import functools
import subprocess
import sys
import tempfile

import pytest
import torch

from tests.kernels import group_worker
from tests.kernels.group_worker import Case, batch_of, calls, shares
from tests.kernels.processes import ENVIRONMENT

ALL = ("excluded", "candidate_ids", "max_score")
EVERYWHERE = (*ALL, "global_target")
CASES = [
    Case((4, 4), (6, 6)),
    Case((4, 4), (6, 6), symmetric=True),
    Case((5, 2), (5, 9), (3, 1), ALL, symmetric=True),
    Case((5, 2), (5, 9), (2, 4), EVERYWHERE, symmetric=True, reduction="sum"),
    Case((7, 0), (4, 5), (2, 1), EVERYWHERE, symmetric=True),
    Case((5, 3), (9, 0), options=("global_target",), symmetric=True, reduction="none"),
    Case((5, 3), (6, 4), (2, 2), ALL, reduction="none", symmetric=True, bad=True),
    Case((6, 4), (6, 4), (2, 2), EVERYWHERE, symmetric=True, backend="reference"),
    Case((5, 3), (6, 4), reduction="none", backend="reference"),
    Case((4, 4), (6, 6), (2, 2), ALL, symmetric=True, dtype=torch.bfloat16),
    Case((4, 4), (6, 6), (2, 2), ALL, symmetric=True, dtype=torch.float32),
    Case((3, 4, 2), (5, 4, 6), (2, 3, 1), ALL, symmetric=True),
    Case((4, 0, 3), (4, 2, 0), (2, 1, 1), EVERYWHERE, symmetric=True),
    Case((3, 3, 3), (3, 3, 3), symmetric=True, backend="reference"),
]
LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}


JOBS = {
    2: [
        ("train", "ddp"),
        ("train", "fsdp2"),
        ("refused", None),
        ("bytes_received", (64, 96, 256)),
    ],
    3: [],
}
for each in CASES:
    JOBS[each.world].append(("run_case", each))


@functools.cache
def of_processes(world):
    """{job: [what it returns in each process]} of a group of processes, which does all jobs.

    They run the file of the worker: `tests` is no package that another process could import.
    """
    jobs = [(name, x._asdict() if isinstance(x, Case) else x) for name, x in JOBS[world]]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(jobs, f"{folder}/jobs.pt")
        script = f"import runpy; runpy.run_path({group_worker.__file__!r}, run_name='__main__')"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(rank), str(world), folder],
                cwd=folder,
                env=ENVIRONMENT,
            )
            for rank in range(world)
        ]
        assert [process.wait(timeout=900) for process in processes] == [0] * world
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]
    for rank, results in enumerate(found):
        assert not isinstance(results, str), f"process {rank}: {results}"
    return dict(zip(JOBS[world], zip(*found, strict=True), strict=True))


pytestmark = pytest.mark.beside(work=lambda config: of_processes(2) | of_processes(3))


def merged(case, results, name):
    """The processes' rows of a result one after the other, positives padded as in one process."""
    parts = [x[name] for x in results]
    if case.positives and parts[0].dim() == 2 and name.split("_", 1)[1] in (
        "rank", "n_greater", "n_equal", "target_score",
    ):  # fmt: skip
        padding = -torch.inf if name.endswith("target_score") else 0
        most = max(case.positives)
        parts = [torch.nn.functional.pad(x, (0, most - x.shape[1]), value=padding) for x in parts]
    return torch.cat(parts)


def of_own_candidates(case, whole):
    """The excluded pairs that a process can name by its own rows."""
    pairs = whole.named["excluded"]
    inside = torch.zeros(len(pairs), dtype=torch.bool)
    for rank in range(case.world):
        rows, columns = shares(case, rank)
        of_queries = (pairs[:, 0] >= rows.start) & (pairs[:, 0] < rows.stop)
        inside |= of_queries & (pairs[:, 1] >= columns.start) & (pairs[:, 1] < columns.stop)
    return pairs[inside]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_have_what_one_process_has(beside, case):
    results, again = zip(*beside["run_case", case], strict=True)
    whole = batch_of(case)
    named = dict(whole.named, target=whole.target)
    if "excluded" in named and "global_target" not in case.options:
        named["excluded"] = of_own_candidates(case, whole)
    truth = calls(case, whole.query, whole.candidates, named, whole.upstream)
    limit = LIMITS[case.dtype]
    for name, expected in truth.items():
        if name == "reward_scores":
            continue  # as wide as the process's own targets
        if expected.dim() == 0:  # a loss, the temperature's gradient: DDP's mean
            actual = torch.stack([x[name] for x in results]).double().mean(0)
            if case.reduction == "none":
                actual = actual * case.world
        else:
            actual = merged(case, results, name)
            if "grad" in name and "reward" not in name and case.reduction != "none":
                actual = actual / case.world
        finite = expected.double().nan_to_num(posinf=0, neginf=0).abs().flatten()
        size = max([1.0, *finite.tolist()])
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=0, atol=limit * size, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
        if expected.dtype in (torch.int32, torch.int64):
            assert torch.equal(actual, expected), name
    for first, second in zip(results, again, strict=True):
        for name, x in first.items():
            assert torch.equal(x.nan_to_num(7), second[name].nan_to_num(7)), name


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_parameters_have_the_gradients_of_one_process(beside, wrapping):
    case = group_worker.TRAINED
    found = beside["train", wrapping]
    model, whole = group_worker.encoder(), batch_of(case)
    named = dict(whole.named, target=whole.target, excluded=of_own_candidates(case, whole))
    loss, reward = group_worker.losses_of(model, case, whole.query, whole.candidates, named)
    (loss - reward / case.world).backward()  # the mean of the processes' sums
    for grads in found:
        for actual, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(actual, parameter.grad, rtol=1e-12, atol=1e-12)


def test_all_processes_are_told_of_a_wrong_one(beside):
    first, second = beside["refused", None]
    assert first[0].startswith("rank_statistics: target must hold indices of candidates, in [0, 3)")
    assert second[0].endswith("on every process, got an error on process 0")
    for told in (first, second):
        for message in told[1:3]:
            assert message.startswith("rank_statistics: group must make the same call on every")
        assert "in [0, 6), got 6 at [2]" in told[3]
        assert told[4] == ""
    assert "D = 3" in second[2]


def test_only_rows_travel(beside):
    for received, rows, scalars in beside["bytes_received", (64, 96, 256)]:
        assert rows <= received <= 1.2 * rows
        assert received - rows <= 100 * scalars  # bytes: about ten numbers a row
