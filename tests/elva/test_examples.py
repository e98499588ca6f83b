"""The examples of other people's loops: each runs, and prints what it should."""

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from elva.integrations import examples
from elva.integrations.examples import cuda_graph, hf_trainer
from elva_kernels import info_nce

FILES = sorted(Path(examples.__file__).parent.glob("[a-z]*.py"))
RUN = "elva.integrations.examples."


def numbers(text: str, name: str) -> list[float]:
    """The numbers that a run prints behind `name`."""
    return [float(x) for x in re.findall(rf"{re.escape(name)}:? (-?[\d.]+(?:e[-+]\d+)?)", text)]


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str]) -> Iterator[object]:
    """What an example prints, run in this process as `python -m` runs it."""

    def of(name: str) -> str:
        capfd.readouterr()
        runpy.run_module(RUN + name, run_name="__main__")
        return capfd.readouterr().out

    yield of
    AcceleratorState._reset_state(reset_partial_state=True)  # the next may want another precision
    torch._dynamo.reset()


def test_each_is_short_and_says_how_it_is_run() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60, path
        if path.stem != "pairs":
            told = ast.get_docstring(ast.parse(text)) or ""
            assert re.search(rf"^(python|accelerate launch) .*-m {RUN}{path.stem}$", told, re.M)


def test_plain_torch(printed) -> None:
    text = printed("plain_torch")
    before, after = numbers(text, "R@1 before"), numbers(text, "R@1 after InfoNCE")
    rewarded = numbers(text, "R@1 after the ranking reward")
    assert before[0] < 0.02 and after[0] > 0.85 and rewarded > after


def test_hf_trainer_in_bf16(printed) -> None:
    text = printed("hf_trainer")
    (before,), (after,) = numbers(text, "R@1 before"), numbers(text, "R@1 after")
    first, last = numbers(text, "loss")
    assert before < 0.02 and after > 0.85 and first > 5 and last < 0.5
    rows, labels = (torch.randn(6, 4), torch.randn(6, 4)), torch.arange(6)
    loss = hf_trainer.loss_of(rows, labels, torch.tensor(24))  # a quarter of what is accumulated
    torch.testing.assert_close(loss, info_nce(*rows, candidate_ids=labels) / 4)


def test_lightning_in_bf16_with_a_learnt_temperature(printed) -> None:
    pytest.importorskip("lightning", reason="pip install 'elva[lightning]'")
    text = printed("lightning_module")
    (before,), (after,) = numbers(text, "R@1 before"), numbers(text, "R@1 after")
    start, learnt = numbers(text, "temperature")
    assert before < 0.02 and after > 0.85 and start == 0.1 and 0.05 < learnt < 0.099


@pytest.mark.thorough
def test_two_processes_of_accelerate_are_one(printed) -> None:
    """Each with half of a batch and all of its candidates: the same losses, the same model."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    launch += ["--main_process_port", "0", "-m", f"{RUN}accelerate_loop"]
    with subprocess.Popen(launch, stdout=subprocess.PIPE, text=True) as two:
        one = printed("accelerate_loop")
        other, _ = two.communicate(timeout=300)
    assert two.returncode == 0
    losses = numbers(one, "loss")
    assert len(losses) == 10 and losses[0] > 2 and losses[-1] < 0.1
    assert numbers(other, "loss") == pytest.approx(losses, rel=1e-4)
    (before,), (after,) = numbers(one, "R@1 before"), numbers(one, "R@1 after")
    assert before < 0.02 and after > 0.85
    assert numbers(other, "R@1 after") == pytest.approx([after], abs=0.005)


@pytest.mark.thorough
def test_compiled_breaks_no_graph(printed) -> None:
    text = printed("compiled")
    assert numbers(text, "graphs") == [1] and numbers(text, "graph breaks") == [0]
    assert numbers(text, "loss")[0] < 1e-5 and numbers(text, "relatively")[0] < 1e-6
    assert numbers(text, "R@1 before")[0] < 0.02 and numbers(text, "R@1 after")[0] > 0.85


def test_grad_cache_is_one_graph(printed) -> None:
    text = printed("grad_cache")
    assert numbers(text, "loss")[0] < 1e-5 and numbers(text, "relatively")[0] < 1e-6
    assert numbers(text, "R@1 before")[0] < 0.02 and numbers(text, "R@1 after")[0] > 0.85


def test_cuda_graph_as_far_as_a_cpu_goes(capsys) -> None:
    """A call in the graph's place: new embeddings are read where the old ones lay."""
    calls = []

    def capture(step):
        step()
        return lambda: calls.append(step())

    cuda_graph.main("cpu", capture)
    text = capsys.readouterr().out
    assert numbers(text, "apart") == [0, 0, 0] and len(calls) == 3 + 50 + 1
    assert numbers(text, "reward before")[0] < 0.1 and numbers(text, "reward after")[0] > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where it runs")
def test_cuda_graph_says_what_it_lacks(printed, capfd) -> None:
    with pytest.raises(SystemExit) as ended:
        printed("cuda_graph")
    told = capfd.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert told.err == "cuda_graph: it needs a GPU, and torch sees none\n"
