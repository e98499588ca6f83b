"""InfoNCE over a whole batch in bounded memory: `python -m benchmarks.contrastive_batch`.

A step of ours embeds without a graph, takes the whole batch's loss, and hands its gradient to
micro-batches (GradCache, Gao et al., arXiv:2101.06983). Beside it the same step as one graph: every
query and candidate forwarded at once, the loss in plain torch. Both train all weights of one small
Qwen2-VL of Qwen2-VL's structure in float32 on text, and sample the same summaries first.

A case runs in a process of its own, one thread, in turns; kept in
`results/contrastive-<machine>.json`. Seconds are the median of a process's steps after its first,
and of the turns; the peak is of the process, above what it was before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks import report
from elva.data import mbeir
from elva.data.instructions import write_instructions
from elva.data.layout import file_stem
from elva.model.retriever import Retriever
from elva.model.scratch import create
from elva.processes import Processes
from elva.recipe import NegativeConfig, ScratchModel, StageConfig
from elva.training.callbacks import Callback
from elva.training.examples import Examples
from elva.training.loop import Loop
from elva.training.plan import Saving
from elva.training.stage import Stage

STEM, SPLIT, PROMPT = file_stem("made", "t2t"), "train", "Summarise it."
WHOLE = 2**31 - 1  # sequences in one forward: all
CASES = {64: (8, 32, WHOLE), 240: (8, 32, WHOLE), 960: (8, 32, WHOLE)}
"""Queries a step -> sequences a forward and backward."""

MODEL = ScratchModel(vocabulary=1000, hidden_size=64, intermediate_size=192, layers=2, heads=4)
STAGE = StageConfig(
    infonce=1.0, tasks={"t2t": 1.0}, negatives=NegativeConfig(given=0), rollout_candidates="all",
    max_completion_length=4, learning_rate=1e-4, warmup_ratio=0.0, schedule="constant",
    rollout_batch_size=64,
)  # fmt: skip


def write(place: Path, count: int, model: ScratchModel = MODEL) -> None:
    """Data of so many queries, each with a text of its own as its answer, and a model."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=draw.randint(8, 20))) for _ in range(2 * count)]
    pool = [{"txt": texts[i], "img_path": None, "modality": "text", "did": f"9:{i + 1}"}
            for i in range(count)]  # fmt: skip
    queries = [{"qid": f"9:{i + 1}", "query_txt": texts[count + i], "query_img_path": None,
                "query_modality": "text", "task_id": 1, "pos_cand_list": [f"9:{i + 1}"],
                "neg_cand_list": []} for i in range(count)]  # fmt: skip
    mbeir.write_pool(place / "data", STEM, pool)
    mbeir.write_queries(place / "data", STEM, SPLIT, queries)
    instruction = "Find the candidate that answers this query."
    write_instructions(place / "data", "made", 9, {("text", "text"): [instruction]})
    said = [*texts, instruction, PROMPT]
    create(place / "model", model, said, summary_prompt=PROMPT, seed=0)


class OneGraph(Stage):
    """The step as autograd alone has it."""

    def step(self, number: int, accelerator: Accelerator, model: nn.Module) -> dict[str, float]:
        """Every sequence forwarded at once, then InfoNCE in plain torch, then one backward."""
        with torch.no_grad():
            rolled = self.retriever(self._roll, self.plan[number])
        [(rows, prompts)] = self.summaries.micro_batches(rolled.asked.prompts, rolled.rollouts.mask)
        part = rolled.rollouts.select(torch.tensor(rows, device=self.retriever.device))
        hidden = self.retriever.hidden_states(prompts, part.ids, part.mask)
        at_ret = F.normalize(hidden[torch.arange(len(rows)), part.mask.sum(1)], dim=-1)
        order = torch.tensor(rows).argsort()
        query, answer = at_ret[order].split([len(rolled.asked.asks), len(rolled.asked.shows)])
        target = torch.tensor([places[0] for places in rolled.asked.comparison.target.tolist()])
        scores = query @ answer.T / self.stage.infonce_temperature
        loss = F.cross_entropy(scores, target.to(scores.device))
        accelerator.backward(loss)
        return {"loss": loss.item()}


class _Keeps(Callback):
    """Seconds of each step: on a CPU the process's own, which another's work hardly changes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def on_stage_begin(self, loop: Loop) -> None:
        self._since = self._clock()

    def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        self.seconds.append(now - self._since)
        self._since = now


def loop_of(
    place: Path, batch: int, rows: int, steps: int, callbacks: Sequence[Callback] = (),
    dtype: torch.dtype = torch.float32,
) -> Loop:  # fmt: skip
    """A training of so many steps, its data and model made by `write`.

    Args:
        rows: sequences a forward and backward; `WHOLE` is one graph.
    """
    settings = replace(STAGE, batch_size=batch, micro_batch_size=rows)
    retriever = Retriever.load(place / "model").to(dtype)
    if dtype == torch.float64:
        in_float64(retriever)
    retriever.freeze_vision(True)
    retriever.plain.train()
    processes = Processes()
    work = (OneGraph if rows == WHOLE else Stage)(
        retriever, settings, Examples(mbeir.load(place / "data", split=SPLIT), settings), steps,
        seed=(0, "2"), arguments={}, title="contrastive", processes=processes,
        say=lambda line: None,
    )  # fmt: skip
    return Loop(
        retriever, work, settings, steps, directory=place / f"stage-{os.getpid()}",
        processes=processes, saving=Saving(1e9), arguments={}, callbacks=callbacks,
    )  # fmt: skip


# -- gradients -------------------------------------------------------------------------------------


def in_float64(model: nn.Module) -> None:
    """transformers' norms compute in fp32, whatever they are given: a difference of 1e-16 between
    two batches would now and then become one of 1e-8."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_rms_norm, module)  # type: ignore[method-assign]


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())


def gradients(place: Path, batch: int, rows: int) -> dict[str, Tensor]:
    """Of the first step, in float64, by parameter; and the loss."""
    loop = loop_of(place, batch, rows, 1, dtype=torch.float64)
    metrics = loop.work.step(0, loop.accelerator, loop.model)
    kept = {n: p.grad.clone() for n, p in loop.module.named_parameters() if p.grad is not None}
    return {**kept, "loss": torch.tensor(metrics["loss"], dtype=torch.float64)}


def difference(place: Path, batch: int, rows: int, whole: Mapping[str, Tensor]) -> float:
    """The largest of a parameter's gradient (or the loss) by micro-batches to one graph's, over
    the largest of one graph's gradients."""
    ours = gradients(place, batch, rows)
    assert ours.keys() == whole.keys()
    scale = max(value.abs().max().item() for name, value in whole.items() if name != "loss")
    return max((ours[name] - value).abs().max().item() for name, value in whole.items()) / scale


# -- memory and seconds ----------------------------------------------------------------------------


@contextmanager
def peak_mb() -> Iterator[dict[str, float]]:
    """The most memory that a block takes above its start: a GPU's, else the process's."""
    found: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status_mb("VmRSS")
    yield found
    found["peak_mb"] = _status_mb("VmHWM") - before


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1]) / 1024


def measure(place: Path, batch: int, rows: int, steps: int) -> dict[str, float]:
    """One case, in this process."""
    keeps = _Keeps()
    loop = loop_of(place, batch, rows, steps, [keeps])
    with peak_mb() as found:
        loop.train()
    return {**found, "ms_a_query": median(keeps.seconds[1:]) / batch * 1e3}


def _in_a_process(place: Path, batch: int, rows: int, steps: int) -> dict[str, float]:
    words = ["--measure", str(batch), str(rows), "--steps", str(steps), "--place", str(place)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.contrastive_batch", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{batch} queries, {rows} rows: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(place: Path, turns: int, steps: int) -> list[dict[str, Any]]:
    """Every case in turns, medians; and its gradients' difference to one graph's."""
    write(place, max(CASES))
    cases = [(batch, rows) for batch, sizes in CASES.items() for rows in sizes]
    found: defaultdict[tuple[int, int], list[dict[str, float]]] = defaultdict(list)
    for turn in range(turns):
        for case in cases if turn % 2 == 0 else cases[::-1]:
            found[case].append(_in_a_process(place, *case, steps))
            print(*case, found[case][-1], file=sys.stderr, flush=True)
    table = []
    for batch, sizes in CASES.items():
        whole = gradients(place, batch, WHOLE)
        for rows in sizes:
            some = found[batch, rows]
            row = {"batch": batch, "micro_batch": None if rows == WHOLE else rows, "turns": some}
            row |= {name: median(one[name] for one in some) for name in some[0]}
            if rows != WHOLE:
                row["gradient_difference"] = difference(place, batch, rows, whole)
            table.append(row)
    return table


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row a case."""
    lines = [
        "| queries | sequences a forward | peak MB | ms a query | gradients' difference |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        how = "all, one graph" if row["micro_batch"] is None else row["micro_batch"]
        off = f"{row['gradient_difference']:.1e}" if "gradient_difference" in row else "-"
        lines.append(
            f"| {row['batch']} | {how} | {row['peak_mb']:.0f} | {row['ms_a_query']:.2f} | {off} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contrastive_batch", description=__doc__
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=4, help="of each process; the first is not counted"
    )
    parser.add_argument("--measure", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        print(json.dumps(measure(given.place, *given.measure, given.steps)))
        return
    with tempfile.TemporaryDirectory() as place:
        rows = compare(Path(place), given.turns, given.steps)
    machine = report.machine("cuda" if torch.cuda.is_available() else "cpu")
    print(report.write("contrastive", {"machine": machine, "steps": given.steps, "rows": rows}))
    print(show(rows))


if __name__ == "__main__":
    main()
