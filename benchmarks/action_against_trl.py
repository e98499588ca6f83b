"""One ELVA action as a step of our loop and of TRL's GRPOTrainer: `python -m
benchmarks.action_against_trl [--pictures]`.

An action is 1 query, its positive and 20 negatives, G = 8 summaries each: 176 rows, of prompts of
64 to 256 tokens and summaries of about 16 to 32. TRL knows one completion a row, so it is given
the 22 prompts as rows and a reward that is a hash of the text: it computes no embedding, and ours
does. Both load the same tiny Qwen2-VL in float32, see the same prompts, and take TRL's names of the
same values; gradient checkpointing is off in both.

With `--pictures` each row has a picture of 196 x 196 pixels (49 of its tokens) and 10 to 60 words,
and the vision tower is frozen in both. All rows have one: TRL counts the features of a batch by its
rows, and one that mixes pictures with text alone crashes in it. It cuts and reads a row's picture
as often as the row comes; the prompts' tokens are asserted to be those that ours reads.

Each side at each micro-batch runs in a process of its own, one thread, in turns; kept in
`results/action-<machine>.json`. A figure is the median of a process's steps after its first, and of
the turns.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from benchmarks import report
from elva.data import Item, Query, mbeir
from elva.data.instructions import write_instructions
from elva.data.layout import file_stem
from elva.model.inputs import RET
from elva.model.retriever import Retriever
from elva.model.scratch import create
from elva.recipe import NegativeConfig, RewardConfig, ScratchModel, StageConfig

NEGATIVES, GROUPS, LONGEST = 20, 8, 32
ROWS = (2 + NEGATIVES) * GROUPS
SPLIT, PROMPT = "train", "Summarise it."
TASKS = {False: "t2t", True: "it2it"}
"""Whether rows have pictures -> their task."""
SIDES = {"elva": (44, 8), "trl": (44, 8)}
"""Side -> rows a forward and backward."""

STAGE = StageConfig(
    policy=1.0, batch_size=1, num_generations=GROUPS, beta=0.2, epsilon=0.2,
    negatives=NegativeConfig(given=NEGATIVES, in_batch=False), rollout_candidates="all",
    max_completion_length=LONGEST, learning_rate=1e-5, warmup_ratio=0.0, schedule="constant",
    reward=RewardConfig(), rollout_batch_size=ROWS,
)  # fmt: skip


# -- what both are given ---------------------------------------------------------------------------


def write(place: Path, steps: int, pictures: bool) -> None:
    """Data of as many queries as steps, and a model whose summaries end after 16 to 32 tokens."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(120)]
    task, data = TASKS[pictures], place / "data"
    stem, kind = file_stem("made", task), _modality(pictures)

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(*((10, 60) if pictures else (50, 230)))))

    def picture(name: str) -> str | None:
        if not pictures:
            return None
        path = Path("mbeir_images", f"{name}.png")
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (7, 7), draw.randbytes(147)).resize((196, 196)).save(data / path)
        return str(path)

    count = steps * (1 + NEGATIVES)
    pool = [{"txt": text(), "img_path": picture(f"c{i}"), "modality": kind, "did": f"9:{i + 1}"}
            for i in range(count)]  # fmt: skip
    mbeir.write_pool(data, stem, pool)
    queries = [
        {"qid": f"9:{step + 1}", "query_txt": text(), "query_img_path": picture(f"q{step}"),
         "query_modality": kind, "task_id": 8 if pictures else 1,
         "pos_cand_list": [f"9:{step * (1 + NEGATIVES) + 1}"],
         "neg_cand_list": [f"9:{step * (1 + NEGATIVES) + 2 + i}" for i in range(NEGATIVES)]}
        for step in range(steps)
    ]  # fmt: skip
    mbeir.write_queries(data, stem, SPLIT, queries)
    instruction = "Find the candidate that answers this query."
    write_instructions(data, "made", 9, {(kind, kind): [instruction]})
    spec = ScratchModel(
        vocabulary=1000, hidden_size=128, intermediate_size=384, layers=2, heads=4,
        **({"image_size": 196, "patch_size": 14} if pictures else {}),
    )  # fmt: skip
    said = [" ".join(words), instruction, PROMPT, *(row["txt"] for row in pool)]
    create(place / "blank", spec, map(str, said), summary_prompt=PROMPT, seed=0)
    _teach(place / "blank", place / "model", words)


def _modality(pictures: bool) -> str:
    """What rows say or show, in M-BEIR's word."""
    return "image,text" if pictures else "text"


def _teach(source: Path, target: Path, words: list[str]) -> None:
    """Summaries of any words that end in [RET], by transformers' own loss."""
    retriever = Retriever.load(source)
    inputs, model = retriever.inputs, retriever.plain.train()
    draw = random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(240):
        rows = []
        for _ in range(16):
            asked = inputs.text_ids(" ".join(draw.choices(words, k=draw.randint(5, 30))))
            said = inputs.text_ids(" ".join(draw.choices(words, k=30)))
            end = inputs.end_ids[0]
            rows.append([*asked, end, *said[: draw.randint(15, LONGEST - 1)], inputs.ret_id])
        width = max(map(len, rows))
        ids = torch.tensor([[inputs.ret_id] * (width - len(r)) + r for r in rows])
        labels = torch.full_like(ids, -100)
        for row, tokens in zip(labels, rows, strict=True):
            said = tokens[tokens.index(inputs.end_ids[0]) + 1 :]
            row[-len(said) :] = torch.tensor(said)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        kinds = torch.zeros_like(ids)
        model(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    retriever.save(target)


# -- how it is measured ----------------------------------------------------------------------------


class Meter:
    """Seconds and parts of each step, and the memory that the steps take above their start."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.parts: defaultdict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self.rss = 0.0

    def begin(self) -> None:
        """Before the first step."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        self.rss = _status("VmRSS")
        self._mark()

    def step(self, tokens: int, prompt_tokens: int) -> None:
        """After each, of which so many tokens were written after so many that were read."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = {"wall_s": wall - self.wall, "cpu_s": cpu - self.cpu, "tokens": tokens}
        found["prompt_tokens"] = prompt_tokens
        self.steps.append({**found, **{f"{k}_s": v for k, v in self.parts.items()}})
        self._mark()

    def _mark(self) -> None:
        self.parts.clear()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """CPU seconds under a name; those of a part inside it are its own."""
        start = time.process_time()
        self._inside.append(name)
        yield
        spent = time.process_time() - start
        self._inside.pop()
        self.parts[name] += spent
        if self._inside:
            self.parts[self._inside[-1]] -= spent

    def wrap(self, owner: Any, name: str, part: str | Callable[..., str]) -> None:
        """Times a function or method under a part, or under the one that its arguments tell."""
        inner = getattr(owner, name)

        @functools.wraps(inner)  # whose signature transformers looks at
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*args, **kwargs)):
                return inner(*args, **kwargs)

        setattr(owner, name, timed)

    def result(self) -> dict[str, Any]:
        """Medians of the steps after the first, MB."""
        after = self.steps[1:]
        found = {name: median(step.get(name, 0.0) for step in after) for name in after[0]}
        return {**found, "peak_mb": _status("VmHWM") - self.rss, "start_mb": self.rss}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1]) / 1024


def measure_elva(place: Path, rows: int, steps: int, pictures: bool) -> dict[str, Any]:
    """Our stage on the action, a step a query."""
    from dataclasses import replace

    import elva_kernels
    from elva.processes import Processes
    from elva.training import stage as stages
    from elva.training.callbacks import Callback
    from elva.training.examples import Examples
    from elva.training.loop import Loop
    from elva.training.plan import Saving
    from elva.training.summaries import Summaries
    from elva.training.tokens import TokenLosses

    meter = Meter()
    settings = replace(STAGE, micro_batch_size=rows, tasks={TASKS[pictures]: 1.0})
    retriever = Retriever.load(place / "model")
    retriever.inputs.pictures.workers = 0  # one thread, as TRL has
    retriever.freeze_vision(True)
    retriever.plain.train()
    processes = Processes()
    for name in ("ranking_reward", "reward_from_scores", "group_advantages"):
        meter.wrap(elva_kernels, name, "kernel")
    meter.wrap(Summaries, "write", "sampling")
    meter.wrap(TokenLosses, "losses", "forward")
    meter.wrap(retriever, "hold", "vision")
    examples = Examples(mbeir.load(place / "data", split=SPLIT), settings)
    work = stages.Stage(
        retriever, settings, examples, steps, seed=(0, "3"), arguments={}, title="action",
        processes=processes, say=lambda line: None,
    )  # fmt: skip
    assert work.tokens.reference is not None
    meter.wrap(work.tokens.reference, "hidden_states", "reference")

    class Step(Callback):
        def on_stage_begin(self, loop: Loop) -> None:
            meter.begin()

        def on_step_end(self, loop: Loop, metrics: Any) -> None:
            assert metrics["frac_no_ret"] < 0.5 and metrics["policy"] != 0
            assert work.last is not None
            read = GROUPS * sum(map(len, work.last.asked.prompts))
            meter.step(round(metrics["completion_length"] * ROWS), read)

    loop = Loop(
        retriever, work, settings, steps, directory=place / "elva" / str(os.getpid()),
        processes=processes, saving=Saving(1e9), arguments={}, callbacks=[Step()],
    )  # fmt: skip
    meter.wrap(loop.accelerator, "backward", "backward")
    meter.wrap(loop.optimizer, "step", "optimizer")
    loop.train()
    return meter.result()


def measure_trl(place: Path, rows: int, steps: int, pictures: bool) -> dict[str, Any]:
    """TRL's trainer on the rows of the action, a step a query's 22 prompts."""
    from datasets import Dataset
    from datasets import Image as Picture
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    meter = Meter()
    inputs = Retriever.load(place / "model").inputs
    data = mbeir.load(place / "data", split=SPLIT)
    pool, items = data.pool(TASKS[pictures]), list[Item]()
    for query in data.queries:
        ids = [*query.positives, *query.negatives]
        items += [query, *(pool[pool.row(id)] for id in ids)]
    prompts = [inputs.prompt(item).input_ids.tolist() for item in items]
    tokenizer = AutoTokenizer.from_pretrained(place / "model", eos_token=RET, padding_side="left")
    names = {str(i): ids for i, ids in enumerate(prompts)}
    tokens, read = [0], [0]
    processing: Any = tokenizer
    table: dict[str, list[Any]] = {"prompt": list(names)}
    if pictures:
        processing = _processor(inputs.image_processor, tokenizer)
        said = [item.prompted if isinstance(item, Query) else item.text for item in items]
        # Words that are followed by a prompt are made tokens of without it, and so end in a space.
        table = {"prompt": [[{"role": "user", "content": f"{x}  {PROMPT}"}] for x in said],
                 "image": [str(item.image) for item in items]}  # fmt: skip
    dataset = Dataset.from_dict(table)
    dataset = dataset.cast_column("image", Picture()) if pictures else dataset

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens[0] = sum(map(len, completion_ids))
        return [hash(tuple(ids)) % 1000 / 1000 for ids in completion_ids]

    class Step(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step(tokens[0], read[0])

    config = GRPOConfig(
        output_dir=str(place / "trl" / str(os.getpid())), use_cpu=True, bf16=False, max_steps=steps,
        per_device_train_batch_size=rows, gradient_accumulation_steps=ROWS // rows,
        num_generations=GROUPS, max_completion_length=LONGEST, temperature=STAGE.temperature,
        top_k=0, top_p=1.0, beta=STAGE.beta, epsilon=STAGE.epsilon, loss_type=STAGE.loss_type,
        scale_rewards=STAGE.scale_rewards, use_bias_correction_kl=False,
        mask_truncated_completions=True, shuffle_dataset=False,
        learning_rate=STAGE.learning_rate, weight_decay=STAGE.weight_decay, max_grad_norm=1.0,
        lr_scheduler_type="constant", gradient_checkpointing=False, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration.from_pretrained(place / "model")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.model.visual.requires_grad_(False)
    meter.wrap(model.model, "get_image_features", "vision")
    trainer = GRPOTrainer(
        model, reward, config, train_dataset=dataset, processing_class=processing,
        callbacks=[Step()],
    )  # fmt: skip
    if not pictures:  # the very tokens that ours reads, and no seconds for making them
        trainer._tokenize_prompts = lambda some: ([names[name] for name in some], None, {})
    single = trainer._generate_single_turn
    known = {tuple(ids) for ids in prompts}

    def turn(prompt_ids: list[list[int]], *rest: Any, **how: Any) -> Any:
        assert {tuple(ids) for ids in prompt_ids} <= known
        read[0] = sum(map(len, prompt_ids))
        return single(prompt_ids, *rest, **how)

    trainer._generate_single_turn = turn
    meter.wrap(trainer, "_generate", "sampling")
    meter.wrap(
        trainer, "_get_per_token_logps_and_entropies",
        lambda *_, **__: "forward" if torch.is_grad_enabled() else "reference",
    )  # fmt: skip
    meter.wrap(trainer.accelerator, "backward", "backward")
    trainer.train()
    return meter.result()


def _processor(image_processor: Any, tokenizer: Any) -> Any:
    """Qwen2-VL's, whose part for videos needs torchvision and is left out."""
    from transformers import Qwen2VLProcessor

    class Pictures(Qwen2VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                super().check_argument_for_proper_class(argument_name, argument)

    return Pictures(image_processor, tokenizer, None, chat_template=tokenizer.chat_template)


# -- in turns --------------------------------------------------------------------------------------


def _in_a_process(place: Path, side: str, rows: int, steps: int, pictures: bool) -> dict[str, Any]:
    words = ["--measure", side, "--rows", str(rows), "--steps", str(steps), "--place", str(place)]
    words += ["--pictures"] * pictures
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.action_against_trl", *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{side}, {rows} rows: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a side and micro-batch."""
    parts = (
        "vision_s",
        "sampling_s",
        "reference_s",
        "forward_s",
        "backward_s",
        "kernel_s",
        "optimizer_s",
    )
    heads = ("side", "micro-batch", "cpu_s", "wall_s", "peak_mb", "tokens", "prompt_tokens", *parts)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["side"], str(row["rows"]), f"{row['cpu_s']:.2f}", f"{row['wall_s']:.2f}"]
        cells += [f"{row['peak_mb']:.0f}", f"{row['tokens']:.0f}"]
        cells.append(f"{row['prompt_tokens']:.0f}")
        cells += [f"{row[part]:.3f}" if part in row else "-" for part in parts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(place: Path, turns: int, steps: int, pictures: bool) -> list[dict[str, Any]]:
    """Every side at every micro-batch, in turns; medians."""
    write(place, steps, pictures)
    cases = [(side, rows) for side, sizes in SIDES.items() for rows in sizes]
    found: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for turn in range(turns):
        for case in cases if turn % 2 == 0 else cases[::-1]:
            found[case].append(_in_a_process(place, *case, steps, pictures))
    return [
        {"side": side, "rows": rows, "turns": some,
         **{name: median(one.get(name, 0.0) for one in some) for name in some[0]}}
        for (side, rows), some in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.action_against_trl", description=__doc__
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=4, help="of each process; the first is not counted"
    )
    parser.add_argument("--pictures", action="store_true", help="in every row, beside its words")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        torch.set_num_threads(1)
        measure = {"elva": measure_elva, "trl": measure_trl}[given.measure]
        print(json.dumps(measure(given.place, given.rows, given.steps, given.pictures)))
        return
    with tempfile.TemporaryDirectory() as place:
        rows = compare(Path(place), given.turns, given.steps, given.pictures)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    kept = {"machine": report.machine(), "versions": versions, "steps": given.steps, "rows": rows}
    print(report.write("action-pictures" if given.pictures else "action", kept))
    print(table(rows))
    best = {
        side: min((r for r in rows if r["side"] == side), key=lambda r: r["cpu_s"])
        for side in SIDES
    }
    least = {side: min(r["peak_mb"] for r in rows if r["side"] == side) for side in SIDES}
    print(
        f"CPU seconds of the fastest: {best['trl']['cpu_s'] / best['elva']['cpu_s']:.2f} x as fast"
    )
    print(f"peak of the smallest: {least['elva'] / least['trl']:.2f} of TRL's")


if __name__ == "__main__":
    main()
