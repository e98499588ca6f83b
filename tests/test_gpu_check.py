"""What a GPU will be asked (`benchmarks.gpu_check`), as far as it can be asked without one."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from elva_kernels import available_backends
from elva_kernels.backends import choice, table

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
gpu_check, collect, lines, parts, prove, schedule, tools = (
    importlib.import_module(f"benchmarks.{name}")
    for name in (
        "gpu_check",
        "gpu.collect",
        "gpu.lines",
        "gpu.parts",
        "gpu.prove",
        "gpu.schedule",
        "gpu.tools",
    )
)
Part = schedule.Part
needs_cpu = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the cpu backend stands in for a GPU"
)

# Planted parts: `say` appends a line as a part of ours does.
SAY = """
import json, os, signal, sys, time
directory, part = sys.argv[1:]
file = os.open(directory + "/results.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def say(kind, name, **fields):
    line = json.dumps({"part": part, "kind": kind, "name": name} | fields)
    os.write(file, (line + "\\n").encode())
def figure(name, op):
    row = {"shape": name, "dtype": "bf16", "provider": "ours", "median_ms": 1.0}
    row |= {"p20_ms": 1.0, "p80_ms": 1.0, "best_ms": 1.0}
    say("begun", name, ops=[op], backend="cuda")
    say("figure", name, ops=[op], backend="cuda", **row)
    say("case", name)
def check(name, op, verdict):
    say("begun", name, ops=[op], backend="cuda")
    say("check", name, ops=[op], backend="cuda", verdict=verdict, seconds=0.0)
"""


def planted(directory, name, program, **options):
    """A part that runs `program`, which starts in a few milliseconds."""
    command = (sys.executable, "-I", "-S", "-c", SAY + program, str(directory), name)
    return Part(name, command, **options)


def result_of(directory, chosen, seconds=30.0, jobs=2):
    gpu_check.run(chosen, directory, seconds + gpu_check.RESERVE, jobs)
    result, path = collect.keep(directory)
    assert json.loads(path.read_text()) == result
    return result


def verdicts(result):
    return {x["name"]: x["verdict"] for x in result["checks"]}


@pytest.fixture(autouse=True)
def handlers():
    """Those of the tests, after a run has set its own."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_red_op_has_no_speed_and_every_other_has(tmp_path):
    proofs = [
        planted(tmp_path, "good", "check('a', 'topk', 'green')"),
        planted(tmp_path, "bad", "check('b', 'info_nce', 'red: bits differ')"),
    ]
    figures = "figure('search', 'topk'); figure('loss', 'info_nce')"
    needs = ("good", "bad")
    result = result_of(
        tmp_path, [*proofs, planted(tmp_path, "figures", figures, alone=True, needs=needs)]
    )
    assert [row["shape"] for row in result["rows"]] == ["search"]
    assert result["not_run"] == {"loss": "red: b: red: bits differ"}
    assert verdicts(result)["b"] == "red: bits differ"
    assert collect.table(result).startswith(
        "RED  b: red: bits differ\n1 checks green, 1 red, 1 fig"
    )


def test_what_crashes_hangs_or_breaks_off_loses_only_itself(tmp_path):
    begin = "say('begun', sys.argv[2], ops=['info_nce'], backend='cuda');"
    fault = "os.kill(os.getpid(), signal.SIGSEGV)"
    chosen = [
        planted(tmp_path, "crash", f"{begin} print('so far', flush=True); {fault}"),
        planted(tmp_path, "hang", f"{begin} time.sleep(60)", silence=0.5),
        planted(tmp_path, "half", 'os.write(file, b\'{"part": "half", "kind": "fig\')'),
        planted(tmp_path, "slow", "while 1: say('begun', 'x'); time.sleep(.1)", limit=1.0),
        planted(tmp_path, "rival", "sys.exit('no such thing')", foreign=True),
    ]
    needs = tuple(x.name for x in chosen)
    figures = "figure('search', 'topk'); figure('loss', 'info_nce')"
    result = result_of(
        tmp_path, [*chosen, planted(tmp_path, "figures", figures, alone=True, needs=needs)], jobs=5
    )
    assert [row["shape"] for row in result["rows"]] == ["search"]
    found = verdicts(result)
    assert found["crash"] == "killed by SIGSEGV: so far"
    assert found["hang"] == "hung: no line in 0 s"
    assert found["x"] == "did not end in 1 s"
    assert result["not_run"]["loss"].startswith("red: ")
    assert result["not_run"]["rival"] == "ended with 1: no such thing"
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {
        "gpu",
        "log.txt",
        "results.jsonl",
    }


def test_a_part_that_crashes_goes_on_behind_what_it_has_lost(tmp_path):
    program = """
begun = [json.loads(x)["name"] for x in open(directory + "/results.jsonl")]
for name in "abcd":
    if name not in begun:
        say("begun", name, ops=["op " + name], backend="cuda")
        if name in "bc":
            os.abort()
        figure(name, "op " + name)
"""
    result = result_of(tmp_path, [planted(tmp_path, "figures", program, alone=True)])
    assert [row["shape"] for row in result["rows"]] == ["a", "d"]
    assert list(verdicts(result)) == ["b", "c"]


def test_others_rest_while_a_part_is_alone(tmp_path):
    beside = """
check("before", "topk", "green")
for _ in range(40):
    print(time.monotonic())
    time.sleep(0.02)
"""
    alone = "print('from', time.monotonic()); time.sleep(.5); print('to', time.monotonic())"
    # Were its rest counted, the first would take longer than it may.
    chosen = [
        planted(tmp_path, "beside", beside, limit=1.2),
        planted(tmp_path, "soon", "time.sleep(.3)"),
        planted(tmp_path, "alone", alone, alone=True, needs=("soon",)),
    ]
    result = result_of(tmp_path, chosen)
    assert verdicts(result) == {"before": "green"}
    told = (tmp_path / "log.txt").read_text().split("== ")[1:]
    logs = {log.split("\n")[0]: log.split("\n", 1)[1].split() for log in told}
    start, end = float(logs["alone"][1]), float(logs["alone"][3])
    times = list(map(float, logs["beside"]))
    assert len(times) == 40
    assert any(x > end for x in times)
    assert sum(start < x < end for x in times) <= 1  # the one that was being printed


def test_all_ends_in_its_time(tmp_path):
    chosen = [
        planted(tmp_path, "long", "figure('first', 'topk'); time.sleep(60)", alone=True),
        planted(tmp_path, "never", "figure('second', 'topk')", alone=True),
    ]
    start = time.monotonic()
    result = result_of(tmp_path, chosen, seconds=5.0)
    assert time.monotonic() - start < 8
    assert [row["shape"] for row in result["rows"]] == ["first"]
    assert result["not_run"] == {
        "long": "stopped, no time left of 5 s",
        "never": "no time left of 5 s",
    }
    assert not any(map(lines.is_red, lines.read(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_keeps_what_it_has(tmp_path, number):
    out = tmp_path / "out"
    program = f"""
import sys
from pathlib import Path
from benchmarks import gpu_check
from benchmarks.gpu.schedule import Part
out = Path({str(out)!r})
command = (sys.executable, "-I", "-S", "-c", {SAY + "figure('first', 'topk'); time.sleep(60)"!r})
gpu_check.run([Part("long", (*command, str(out), "long"))], out, 100, 1)
sys.exit(gpu_check.finish(out))
"""
    run = subprocess.Popen(
        [sys.executable, "-c", program], cwd=BENCHMARKS.parent, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 20
    while not ((out / "results.jsonl").exists() and "case" in (out / "results.jsonl").read_text()):
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.02)
    run.send_signal(number)
    told, _ = run.communicate(timeout=20)
    assert run.returncode == 0 and "first bf16 ours" in told
    (path,) = out.glob("gpu-*.json")
    result = json.loads(path.read_text())
    assert [row["shape"] for row in result["rows"]] == ["first"]
    assert result["not_run"] == {"long": "stopped, interrupted"}


def test_lines_behind_half_a_line_are_read(tmp_path):
    (tmp_path / lines.FILE).write_text('{"part": "a", "kind": "figure", "na')
    lines.write(tmp_path, "b", "check", "c", verdict='red: {"part": 1')
    assert [x["part"] for x in lines.read(tmp_path)] == ["b"]


def test_every_check_is_in_a_part_and_every_need_is_one(tmp_path):
    asked = parts.Asked(str(tmp_path), ("cuda", "triton"), (), 1.0, False)
    found = parts.all_parts(asked)
    names = [x.name for x in found]
    assert len(set(names)) == len(names)
    assert {need for x in found for need in x.needs} <= set(names)
    for backend in ("cuda", "triton"):
        words = {word for x in found if backend in x.command for word in x.command}
        left_out = ("selftest", "graphs") if backend == "triton" else ("none",)
        assert words >= {x for x in prove.CHECKS if not x.endswith(left_out)}
    assert set(parts.SANITIZERS) == set(tools.SANITIZERS) and set(parts.FAMILIES) == set(tools.OPS)
    asked = {op for ops in tools.OPS.values() for op in ops}
    assert asked == {op for _, ops in prove.CHECKS.values() for op in ops}
    with pytest.raises(ValueError, match="--only must name parts"):
        parts.chosen(found, ["figure"])
    assert [x.name for x in parts.chosen(found, ["ncu", "build"])] == [
        "build",
        "ncu-reward",
        "ncu-in_batch",
        "ncu-topk",
    ]


def test_the_example_is_green_where_every_replay_is_the_eager_call(tmp_path, monkeypatch):
    equal = "replay 0: apart 0.0e+00\nreplay 1: apart 0.0e+00\nreplay 2: apart 0.0e+00\n"
    told = {
        (0, equal): "green",
        (0, equal.replace("1: apart 0.0e+00", "1: apart 1.2e-07")): "red: ended with 0: ",
        (2, "it needs a GPU\n"): "red: ended with 2: it needs a GPU",
    }
    command = ["tools", "example", str(tmp_path), "example"]
    for (code, text), verdict in told.items():
        done = subprocess.CompletedProcess(command, code, text)
        monkeypatch.setattr(tools.subprocess, "run", lambda *_, done=done, **__: done)
        monkeypatch.setattr(sys, "argv", command)
        tools.main()
        assert lines.read(tmp_path)[-1]["verdict"].startswith(verdict)


def test_ncu_is_read():
    metrics = '"gpu__time_duration.sum","launch__registers_per_thread"'
    kernel = '"void elva::(anonymous namespace)::topk_scores<elva::Bf16, 1>(ElvaTopkArgs)"'
    page = f"""==PROF== noise
"ID","Kernel Name","Block Size","Grid Size",{metrics}
"","","","","ms","register/thread"
"0",{kernel},"(256, 1, 1)","(132, 1, 1)","1.25","96"
"""
    assert tools.kernels(page) == [
        {
            "name": "topk_scores<Bf16, 1>",
            "us": 1250.0,
            "registers": 96.0,
            "grid": "(132, 1, 1)",
            "block": "(256, 1, 1)",
        }
    ]


@needs_cpu
@pytest.mark.thorough
def test_dry_run_is_green(tmp_path):
    (tmp_path / "benchmarks").symlink_to(BENCHMARKS)  # beside it: the package that is installed
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--out", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "\n116 checks green, 0 red, " in done.stdout
    assert "not run: sanitize-memcheck-reward: it needs a GPU" in done.stdout
    for provider in ("reward 4x102x64 bf16 ours, cpu", "host time of topk bf16 ours, cpu"):
        assert provider in done.stdout


@needs_cpu
@pytest.mark.parametrize(
    ("op", "check", "wrong_result"),  # a gradient on candidates, or the scores
    [
        ("ranking_reward_and_grad", "reward values", 7),
        ("info_nce_and_grad", "in-batch values", 11),
        ("topk", "topk values", 0),
    ],
)
def test_a_wrong_kernel_is_red(tmp_path, monkeypatch, op, check, wrong_result):
    right = table.LAUNCHERS[op]["cpu"]

    def wrong(*tensors, **options):
        results = right(*tensors, **options)
        return tuple(x * 1.01 if i == wrong_result else x for i, x in enumerate(results))

    row = table.LAUNCHERS[op] | {"cpu": wrong}
    monkeypatch.setitem(table.LAUNCHERS, op, row)
    arguments = ["prove", str(tmp_path), "part", "cpu", "bfloat16", check, "--dry-run"]
    monkeypatch.setattr("sys.argv", arguments)
    choice.launcher.cache_clear()
    try:
        prove.main()
    finally:
        monkeypatch.undo()
        choice.launcher.cache_clear()
    (found,) = [x for x in lines.read(tmp_path) if x["kind"] == "check"]
    assert "over its bound" in found["verdict"]
    assert (op, "cpu") in lines.reds(lines.read(tmp_path))


def test_without_a_gpu_it_says_what_can_be_done(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments, told in (
        ([], "--dry-run does what can be done"),
        (["--dry-run", "--only", "x"], "--only must name parts"),
    ):
        monkeypatch.setattr("sys.argv", ["gpu_check", *arguments])
        with pytest.raises(SystemExit, match=told):
            gpu_check.main()
