"""`elva inspect`: a training seen from its files, while it lasts and when it does not end."""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elva.cli import app
from elva.commands.follow import Follower, follow, line, sparkline
from elva.errors import RunError
from elva.progress import SILENT, Noted
from elva.recipe import Recipe, StageConfig
from elva.run import LOCK, Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    stage = StageConfig(data=".", steps=40)
    return Run.create(tmp_path / "run", Recipe("tiny", stages={"1": stage, "2": stage}))


@contextmanager
def held(run: Run) -> Iterator[None]:
    """As by a process that trains it: a lock is a file's, not a process's."""
    with open(run.directory / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def said(run: Run, **changes: object) -> None:
    status = {"what": "stage 2", "done": 10, "total": 40, "unit": "steps", "rate": 0.5}
    run.status_file.write_text(json.dumps(status | {"time": time.time()} | changes))


def test_a_training_is_followed_step_by_step(run: Run) -> None:
    follower = Follower(run)
    with held(run):
        standing = follower.look()
        assert (standing.state, standing.stage, standing.curves) == ("training", None, {})
        for step in range(1, 11):
            run.log("2", step, {"loss": 1.0 / step, "frac_no_ret": float("nan"), "reward": step})
        said(run)
        standing = follower.look()
        assert (standing.state, standing.stage, standing.what) == ("training", "stage 2", "stage 2")
        assert (standing.done, standing.total, standing.rate, standing.left_s) == (10, 40, 0.5, 60)
        assert standing.values == {"loss": 0.1, "reward": 10.0}
        assert standing.curves["loss"] == pytest.approx([1 / step for step in range(1, 11)])
        words = "stage 2, 10 of 40 steps, 0.5 steps/s, 60 s left, loss 0.100, reward 10.000"
        assert line(standing) == words
        run.log("2", 11, {"loss": 0.05})
        assert follower.look().values == {"loss": 0.05}


def test_half_written_lines_wait_and_foreign_ones_are_passed_over(run: Run) -> None:
    run.log("1", 1, {"loss": 1.0})
    with open(run.metrics_file, "a") as file:
        file.write('\n[]\n{"stage": "9", "step": 1, "loss": 5}\n{"stage": "1"}\nnull\n{"sta')
        file.write("")
    follower = Follower(run)
    assert follower.look().curves == {"loss": [1.0]}
    with open(run.metrics_file, "a") as file:
        file.write('ge": "1", "step": 2, "loss": "x", "reward": true}\n{"stage": "1", "step": 3')
    standing = follower.look()
    assert standing.curves == {"loss": [1.0, None]} and standing.values == {}


def test_a_resumed_stage_is_read_anew(run: Run) -> None:
    for step in range(1, 6):
        run.log("1", step, {"loss": float(step)})
    follower = Follower(run)
    assert follower.look().curves["loss"] == [1, 2, 3, 4, 5]
    run.forget_after("1", 2)
    run.log("1", 3, {"loss": 30.0})
    assert follower.look().curves["loss"] == [1, 2, 30]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"done": "x", "total": null, "rate": "fast"}'])
def test_a_broken_status_is_no_traceback(run: Run, text: str) -> None:
    run.status_file.write_text(text)
    with held(run):
        standing = Follower(run).look()
    assert (
        standing.state == "training" and standing.done is standing.rate is standing.left_s is None
    )


def test_one_that_died_is_said_so_and_how_to_go_on(run: Run) -> None:
    run.log("2", 10, {"loss": 1.0})
    said(run, time=time.time() - 600)
    done = CliRunner().invoke(app, ["inspect", str(run.directory)])
    assert done.exit_code == 1
    words = "stage 2, 10 of 40 steps, loss 1.000; died 10 min ago: no process trains it; go on with"
    assert done.stdout == f"{words} elva train --resume --output {run.directory}\n"
    found = json.loads(CliRunner().invoke(app, ["inspect", str(run.directory), "--json"]).stdout)
    assert (found["state"], found["left_s"], found["curves"]) == ("died", None, {"loss": [1.0]})


def test_one_with_steps_whom_nobody_trains_is_not_starting(run: Run) -> None:
    """However young it is, and whether or not it kept a status."""
    run.log("1", 1, {"loss": 2.0})
    assert Follower(run).look().state == "died"


def test_before_the_first_step_it_starts_and_an_old_one_has_stopped(run: Run) -> None:
    assert line(Follower(run).look()) == "starting: no step yet"
    os.utime(run.directory / "recipe.yaml", (0, 0))
    assert [one.state for one in follow(run, 0.0)] == ["stopped"]


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert done.exit_code == 2 and "must hold a run, got no recipe.yaml" in done.stderr


def test_who_asks_does_not_keep_a_training_from_starting(run: Run) -> None:
    """Its lock is held for a moment, and tried for longer."""
    with open(run.directory / LOCK, "w") as asked:
        fcntl.flock(asked, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (asked, fcntl.LOCK_UN)).start()
        with run.locked():
            assert run.is_training
            with pytest.raises(RunError, match="by one process, got a second"), run.locked():
                pass
        assert not run.is_training


def test_noted_keeps_the_bar_and_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    noted = Noted(SILENT, tmp_path / "status.json")
    noted.start("stage 2", 50)
    for done in range(21, 31):  # resumed at 20
        clock[0] += 0.5
        noted.advance(done)
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["what"], found["total"], found["rate"]) == ("stage 2", 50, pytest.approx(2.0))
    assert found["done"] == 30 and found["pid"] == os.getpid()
    noted.close()
    assert not list(tmp_path.iterdir())


def test_sparklines() -> None:
    assert sparkline([0.0, 1.0, None, 2.0]) == "▁▅ █" and sparkline([None]) == " "
    assert sparkline([3.0] * 5) == "▁▁▁▁▁" and sparkline([]) == ""
    assert sparkline([float(x) for x in range(1000)], 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.thorough
def test_a_real_training_is_followed_until_it_is_killed(
    recipe_file: Path, tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    """By `elva inspect` in a pipe: from before its first step on, and it says that it died."""
    words = ("train", "--recipe", "smoke", "--config", str(recipe_file), "--output", "run")
    training = start(*words, directory=tmp_path)
    try:
        wait_for((tmp_path / "run" / "recipe.yaml").is_file, training)
        run = Run.open(tmp_path / "run")
        watching = start("inspect", "run", directory=tmp_path, before=INTO_SEEN)
        wait_for(lambda: len(run.metrics("0")) >= 2, training)
        standing = Follower(run).look()
        assert standing.state == "training" and standing.stage == "stage 0"
        assert standing.curves["loss"][0] is not None
        wait_for((tmp_path / "seen").is_file, training)
    finally:
        training.kill()
    watching.join(60)
    assert watching.exitcode == 1
    first, *_, last = (tmp_path / "seen").read_text().splitlines()
    assert first.startswith(("starting: no step yet", "begins", "stage 0")) and "died" in last


INTO_SEEN = """
seen = os.open("seen", os.O_WRONLY | os.O_CREAT)
os.dup2(seen, 1)"""
"""What it prints goes there."""


def wait_for(there: Callable[[], bool], process: BaseProcess, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.05)


def test_a_run_that_ended_has_no_status(finished: Path) -> None:
    run = Run.open(finished)
    assert not run.status_file.exists()
    standing = Follower(run).look()
    assert standing.state == "finished" and standing.trained == [*map(run.title, run.trained)]
    assert line(standing).startswith("finished: stage 0, stage 1")
