"""The in-batch ops over the processes of a group: what one process has of the whole batch."""

import tempfile

import pytest
import torch

from tests.kernels import group_worker
from tests.kernels.group_worker import Case, batch_of, calls, shares

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


def spawn(world, function, given):
    """What `function(rank, given)` returns in each process of a group."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, function, given)
        torch.multiprocessing.spawn(group_worker.work, arguments, nprocs=world)
        found = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]
    for rank, result in enumerate(found):
        assert not isinstance(result, str), f"process {rank}: {result}"
    return found


@pytest.fixture(scope="module")
def found():
    """[case] -> the processes' results; twice, for their bits."""
    results = {}
    for world in (2, 3):
        cases = [case for case in CASES if case.world == world]
        first = spawn(world, group_worker.run_cases, cases + cases)
        for i, case in enumerate(cases):
            results[case] = [[of[i] for of in first], [of[i + len(cases)] for of in first]]
    return results


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_have_what_one_process_has(found, case):
    results, again = found[case]
    whole = batch_of(case)
    named = dict(whole.named, target=whole.target)
    if "excluded" in named and "global_target" not in case.options:
        pairs = named["excluded"]
        inside = torch.zeros(len(pairs), dtype=torch.bool)
        for rank in range(case.world):
            rows, columns = shares(case, rank)
            inside |= (
                (pairs[:, 0] >= rows.start)
                & (pairs[:, 0] < rows.stop)
                & (pairs[:, 1] >= columns.start)
                & (pairs[:, 1] < columns.stop)
            )
        named["excluded"] = pairs[inside]
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
