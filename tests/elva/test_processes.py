"""Several processes train as one: gradients, weights, resuming on another number, one writer."""

import json
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from elva import checkpoint
from elva.errors import RunError
from elva.processes import Processes, check_wrapping
from elva.training.states import bound_weight
from tests.elva.sharing import CASES, STEPS

ZERO_CASES = ("grpo", "mixed")
ROOT = Path(__file__).parent.parent.parent
Start = Callable[..., BaseProcess]
Released = Callable[[str], Path]
Shared = Callable[[str], Path]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def together(start: Start, count: int, directory: Path, statements: str) -> None:
    """Statements in so many processes that know of each other."""
    directory.mkdir(exist_ok=True)
    at = port()
    every = [
        start(
            directory=directory,
            before=(
                f"os.environ.update(RANK='{i}', LOCAL_RANK='{i}', WORLD_SIZE='{count}', "
                f"LOCAL_WORLD_SIZE='{count}', MASTER_ADDR='127.0.0.1', MASTER_PORT='{at}')\n"
                f"sys.path.append({str(ROOT)!r})\n{statements}\nsys.exit(0)"
            ),
        )
        for i in range(count)
    ]  # fmt: skip
    for process in every:
        process.join(240)
    assert [p.exitcode for p in every] == [0] * count, (directory / "printed").read_text()


@pytest.fixture(scope="module")
def shared(
    start: Start, released: Released, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Where every case lies as processes have left it, "2-fsdp2" of two that share weights out."""
    out, known = tmp_path_factory.mktemp("shared"), set[str]()
    given = f"{str(released('untied'))!r}, {str(corpus)!r}, {str(out)!r}"

    def by(processes: str) -> Path:
        count, _, how = processes.partition("-")
        if processes not in known:
            names = ZERO_CASES if how == "zero" else CASES
            calls = "\n".join(
                f"sharing.run({name!r}, {given}, by={how or 'ddp'!r})" for name in names
            )
            together(start, int(count), out, f"from tests.elva import sharing\n{calls}")
            known.add(processes)
        return out

    return by


@pytest.mark.parametrize(
    "count", ["2", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("2-fsdp2", "3"))]
)
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_one_process(shared: Shared, name: str, count: str) -> None:
    every = ("1", count)
    one, many = (load_file(shared(n) / f"{name}-{n}" / "kept.safetensors") for n in every)
    assert one.keys() == many.keys()
    scale = max(value.abs().max().item() for key, value in one.items() if key[0] in "012")
    assert scale > 1e-4
    for key, value in many.items():
        assert (value - one[key]).abs().max() <= 1e-12 * max(1.0, scale), key
    logs = [json.loads((shared(n) / f"{name}-{n}" / "log.json").read_text()) for n in every]
    assert len(logs[0]) == len(logs[1]) == STEPS
    for single, several in zip(*logs, strict=True):
        assert single.keys() == several.keys()
        assert several == pytest.approx(single, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ZERO_CASES)
@pytest.mark.thorough
def test_weights_of_deepspeed_equal_those_of_one_process(shared: Shared, name: str) -> None:
    """In fp32, which ZeRO keeps of weights and moments whatever the model's dtype."""
    one, many = (load_file(shared(n) / f"{name}-{n}" / "kept.safetensors") for n in ("1", "2-zero"))
    ends = [key for key in one if key.startswith("end|")]
    assert ends and all(key in many for key in ends)
    assert max((one[k] - many[k]).abs().max().item() for k in ends) <= 5e-7


@pytest.mark.thorough
def test_two_processes_give_the_same_bits_again(
    shared: Shared, start: Start, released: Released, corpus: Path, tmp_path: Path
) -> None:
    words = ("mixed", str(released("untied")), str(corpus), str(tmp_path))
    together(start, 2, tmp_path, f"from tests.elva import sharing\nsharing.run(*{words})")
    first, again = (load_file(p / "mixed-2" / "kept.safetensors") for p in (shared("2"), tmp_path))
    assert all(torch.equal(value, again[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("before", "after", "by", "least"),
    [
        ("1", 2, "ddp", 1e-12),
        pytest.param("2-fsdp2", 1, "ddp", 1e-12, marks=pytest.mark.thorough),
        pytest.param("1", 3, "ddp", 1e-12, marks=pytest.mark.thorough),
        pytest.param("2-zero", 1, "ddp", 5e-7, marks=pytest.mark.thorough),
        pytest.param("3", 2, "ddp", 1e-12, marks=pytest.mark.thorough),
        pytest.param("1", 2, "zero", 5e-7, marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_a_run_goes_on_on_another_number_of_processes(
    shared: Shared, start: Start, released: Released, corpus: Path, tmp_path: Path,
    before: str, after: int, by: str, least: float,
) -> None:  # fmt: skip
    at = shared(before) / f"mixed-{before}" / "stage-3"
    words = ("mixed", str(released("untied")), str(corpus), str(tmp_path), str(at))
    call = f"from tests.elva import sharing\nsharing.run(*{words}, by={by!r})"
    together(start, after, tmp_path, call)
    whole = load_file(shared("1") / "mixed-1" / "kept.safetensors")
    how = f"-{by}" * (by != "ddp")
    resumed = load_file(tmp_path / f"mixed-{after}{how}-resumed" / "kept.safetensors")
    ends = [key for key in whole if key.startswith("end|")]
    assert ends and not any(key.startswith("0|") for key in resumed), "it did go on"
    assert max((whole[k] - resumed[k]).abs().max().item() for k in ends) <= least


@pytest.mark.parametrize(
    "by",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.thorough),
        pytest.param("zero", marks=pytest.mark.thorough),
    ],
)
def test_elva_train_on_two_processes_writes_one_run(
    recipe_file: Path, start: Start, tmp_path: Path, by: str
) -> None:
    words = ["train", "--recipe", "smoke", "--config", str(recipe_file), "--output", "run",
             "--no-controls", "--limit", "2", "--stages", "0,1"]  # fmt: skip
    call = f"sys.argv[:] = ['elva', *{words!r}]\nfrom elva.cli import app\napp()"
    wrapper = "sharing.wrapping.Accelerator = sharing.WRAPPERS"
    call = f"from tests.elva import sharing\n{wrapper}[{by!r}]\n{call}"
    together(start, 2, tmp_path, call)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in lines] == [
        ("0", 1), ("0", 2), ("1", 1), ("1", 2),
    ]  # fmt: skip
    printed = (tmp_path / "printed").read_text()
    assert printed.count("run directory") == 1 and printed.count("stage 1: 2 steps") == 1
    with pytest.raises(AssertionError, match="run: must be empty to start a run in"):
        together(start, 2, tmp_path, call)
    printed = (tmp_path / "printed").read_text()
    assert printed.count("must be empty") == 1 and "Traceback" not in printed


FAULTS = {
    # How the second of two ends -> what is said, in one line; its exit code, and the first one's.
    "kill": ("os.kill(os.getpid(), 9)", "elva: train: all 2 processes must answer", -9, 2),
    "interrupt": ("raise KeyboardInterrupt", "elva: interrupted; go on with --resume", 130, 2),
    "bad data": ("raise DataError('pool.jsonl:7: no picture')", "elva: pool.jsonl:7", 2, 2),
    "nan": ("metrics['loss'] = float('nan')", "elva: train: stage 0: loss must be finite", 2, 2),
}  # fmt: skip
FAULTY = """
import os
from elva.errors import DataError
from elva.training.callbacks import Callback
class Faulty(Callback):
    def on_step_end(self, loop, metrics):
        if loop.processes.index in {who} and loop.step == 2:
            {fault}
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("kill", marks=pytest.mark.thorough),
        pytest.param("nan", marks=pytest.mark.thorough),
        pytest.param("interrupt", marks=pytest.mark.thorough),
        pytest.param("bad data", marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_where_one_ends_all_end_and_one_says_why(
    name: str, recipe_file: Path, start: Start, tmp_path: Path
) -> None:
    """A loss that is no number is one everywhere: the step's losses are sums over processes."""
    fault, line, code, others = FAULTS[name]
    who = (0, 1) if name == "nan" else (1,)
    (tmp_path / "faulty.py").write_text(FAULTY.format(who=who, fault=fault))
    words = ["train", "--recipe", "smoke", "--config", str(recipe_file), "--output", "run",
             "--no-controls", "--limit", "4", "--stages", "0", "--callback", "faulty:Faulty",
             "--set", "save_seconds=1e6", "--set", "save_steps=1"]  # fmt: skip
    call = f"sys.argv[:] = ['elva', *{words!r}]\nfrom elva.cli import app\napp()"
    with pytest.raises(AssertionError) as ended:
        together(start, 2, tmp_path, f"sys.path.append({str(tmp_path)!r})\n{call}")
    assert f"[{others}, {code}]" in str(ended.value)
    printed = (tmp_path / "printed").read_text()
    said = [line for line in printed.splitlines() if line.startswith("elva: ")]
    assert len(said) == 1 and said[0].startswith(line)
    assert "Traceback" not in printed
    found = checkpoint.newest(tmp_path / "run" / "stage-0")
    assert found is not None and checkpoint.step_of(found) == 1, "there is what to go on from"


def test_a_parameter_is_bounded_wherever_it_is_held() -> None:
    class Held(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = (torch.nn.Parameter(torch.tensor([x])) for x in (-3.0, -1.0))

    model = Held()
    for name in ("low", "high"):
        bound_weight(model, name, -2.0)
    assert (model.low.item(), model.high.item()) == (-2.0, -1.0)


def test_shares_are_neighbours_of_like_number() -> None:
    one = Processes()
    for count in (1, 2, 3, 7):
        one.count = count
        for things in (0, 1, 2, 5, 960):
            shares = [one.share(things, i) for i in range(count)]
            assert [i for share in shares for i in share] == list(range(things))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


LAUNCHES = sorted((ROOT / "elva" / "launch").glob("*.yaml"))


@pytest.mark.parametrize("file", LAUNCHES, ids=[file.stem for file in LAUNCHES])
def test_accelerate_reads_the_launch_files_as_they_say(file: Path) -> None:
    """By its own parser, to the environment that it gives each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = ["--config_file", str(file), "-m", "elva", "train"]
    args, config, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    written = yaml.safe_load(file.read_text())
    assert config is not None and args.num_processes == written["num_processes"]
    assert args.num_processes == (16 if written["num_machines"] == 2 else 8)
    env = prepare_multi_gpu_env(args) if not args.use_deepspeed else {}
    assert args.use_deepspeed == (file.stem == "zero2")
    assert str(args.zero_stage) == ("2" if args.use_deepspeed else "None")
    assert (env.get("ACCELERATE_USE_FSDP") == "true") == (file.stem == "fsdp2")
    if file.stem == "fsdp2":
        assert env["FSDP_VERSION"] == "2" and env["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        assert env["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in env, "the model's own"
    if written["num_machines"] == 2:
        assert (args.machine_rank, args.main_process_port, args.nproc_per_node) == (0, 29500, "8")


WRAPPED = {
    "ACCELERATE_USE_FSDP": {"FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "ACCELERATE_USE_DEEPSPEED": {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    },
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapper_that_is_not_to_be_had_is_refused(
    wrapper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {wrapper: "true", "WORLD_SIZE": "2"}
    with pytest.raises(RunError, match="mixed_precision must be no, got bf16"):
        check_wrapping({"ACCELERATE_MIXED_PRECISION": "bf16"})
    check_wrapping({**asked, wrapper: "false"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="must have a GPU for each of several processes"):
        check_wrapping(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_wrapping(asked)
    for key, value in WRAPPED[wrapper].items():
        with pytest.raises(RunError, match=f"{key.lower()} must be .*, got {value}; change"):
            check_wrapping({**asked, key: value})
