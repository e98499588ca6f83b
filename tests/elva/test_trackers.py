"""What trackers are told: right values at steps that go on from stage to stage, once, and nothing
that they do costs a run."""

import json
import signal
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from elva import checkpoint
from elva.cli import app
from elva.commands.train import train
from elva.errors import UserError
from elva.progress import SILENT
from elva.recipes import resolve
from elva.run import Run
from elva.training.callbacks import Callback
from elva.training.loop import Loop

Start = Callable[..., BaseProcess]
STAGES = ["0", "1"]
LIMIT = 3
TENSORBOARD, TRACKIO = LoggerType("tensorboard"), LoggerType("trackio")

KILLED = """
import signal
from elva.training.callbacks import Trackers
def killed(self, loop, metrics, os=os, signal=signal, told=Trackers.on_step_end):
    told(self, loop, metrics)
    if loop.title == "stage 1" and loop.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Trackers.on_step_end = killed
"""


def made(tmp_path: Path, recipe_file: Path, *changes: str) -> Run:
    recipe = resolve("smoke", recipe_file, ["evaluate=false", *changes])
    return Run.create(tmp_path / "run", recipe)


@pytest.mark.thorough
def test_tensorboard_reads_each_step_of_two_stages_once_though_one_was_killed(
    recipe_file: Path, start: Start, tmp_path: Path
) -> None:
    """Killed after its third step of stage 1, whose checkpoint is of the second."""
    there = ["train", "--output", "run", "--stages", ",".join(STAGES), "--limit", str(LIMIT)]
    settings = ("evaluate=false", "report_to=tensorboard", "save_seconds=1e6", "save_steps=2")
    words = [*there, "--recipe", "smoke", "--config", str(recipe_file)]
    words += [word for setting in settings for word in ("--set", setting)]
    for turn, code in ((words, -signal.SIGKILL), ([*there, "--resume"], 0)):
        process = start(*turn, directory=tmp_path, before=KILLED if code else "")
        process.join(120)
        assert process.exitcode == code, (tmp_path / "printed").read_text()
    run = Run.open(tmp_path / "run")
    events = EventAccumulator(str(run.directory / "elva")).Reload()
    assert len(list((run.directory / "elva").glob("events.*"))) == 2, "one run, by two processes"
    scalars = events.Tags()["scalars"]
    for place, name in enumerate(STAGES):
        lines = run.metrics(name)
        assert [line["step"] for line in lines] == [1, 2, 3]
        wanted = lines[0].keys() - {"stage", "step"}
        assert {"loss", "lm", "grad_norm", "learning_rate"} <= wanted
        assert {tag for tag in scalars if tag.startswith(f"stage-{name}/")} == {
            f"stage-{name}/{key}" for key in wanted
        }
        for key in wanted:
            told = events.Scalars(f"stage-{name}/{key}")
            assert [event.step for event in told] == [place * LIMIT + i for i in (1, 2, 3)]
            values = [line[key] for line in lines]
            assert [event.value for event in told] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("dry", [True, False])
def test_a_tracker_that_is_not_installed_is_a_line_before_work(
    dry: bool, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [TENSORBOARD])
    monkeypatch.chdir(tmp_path)
    words = ["train", "--recipe", "smoke", "--config", str(recipe_file), "--set",
             "report_to=tensorboard,wandb", "--stages", "0"]  # fmt: skip
    done = CliRunner().invoke(app, [*words, *["--dry-run", "--json"] * dry])
    line = "train: report_to must name installed trackers, got wandb; pip install wandb"
    if dry:
        assert done.exit_code == 0 and json.loads(done.stdout)["problems"] == [line]
    else:
        assert done.exit_code == 2 and done.stderr.splitlines() == [f"elva: {line}"]
    assert not list(tmp_path.iterdir())


class _Failing(tracking.GeneralTracker):
    name = "trackio"
    requires_logging_directory = False

    def __init__(self, run_name: str, **settings: object) -> None:
        super().__init__()
        self.settings, self.told = settings, 0

    def start(self) -> None:
        print("what a tracker says")

    @property
    def tracker(self) -> None: ...

    def store_init_configuration(self, values: dict) -> None:
        assert values["stages.0.learning_rate"] == 5e-3

    def log(self, values: Mapping[str, float], step: int | None, **_: object) -> None:
        self.told += 1
        if step == 2:
            raise ConnectionError("no route\nto the server")

    def finish(self) -> None:
        raise ConnectionError("still no route")


@pytest.mark.thorough
def test_a_tracker_that_fails_is_said_and_left_out(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", _Failing)
    monkeypatch.setattr(tracking, "_available_trackers", [TENSORBOARD, TRACKIO])
    run = made(tmp_path, recipe_file, "report_to=tensorboard,trackio")
    lines: list[str] = []
    reporter = type("Heard", (), {
        "start": SILENT.start, "advance": SILENT.advance, "say": lines.append, "finish": id,
    })  # fmt: skip
    train(run, reporter, stages=["0"], controls=False, limit=LIMIT)
    said = [line for line in lines if "trackio" in line]
    assert len(said) == 2 and said[0].startswith("stage 0: step 2: trackio fails and is told no")
    assert said[0].endswith("ConnectionError: no route to the server")
    assert said[1].endswith("ConnectionError: still no route")
    assert run.is_trained("0") and len(run.metrics("0")) == LIMIT
    events = EventAccumulator(str(run.directory / "elva")).Reload()
    assert [event.step for event in events.Scalars("stage-0/loss")] == [1, 2, 3]
    assert "what a tracker says" not in capsys.readouterr().out


def test_a_tracker_that_does_not_start_is_a_line(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: _Failing) -> None:
        raise PermissionError("no API key\nconfigured")

    monkeypatch.setattr(_Failing, "start", start)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", _Failing)
    monkeypatch.setattr(tracking, "_available_trackers", [TRACKIO])
    run = made(tmp_path, recipe_file, "report_to=trackio")
    with pytest.raises(UserError, match=r"that start, got trackio; PermissionError: no API key c"):
        train(run, SILENT, stages=["0"], controls=False, limit=1)
    assert not run.metrics_file.exists()


class _Raises(Callback):
    """A user's own, with a defect."""

    def __init__(self, event: str) -> None:
        self.event = event

    def on_step_end(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        if self.event == "step" and loop.step == 3:
            raise KeyError("mine")

    def on_save(self, loop: Loop, checkpoint: Path) -> None:
        if self.event == "save" and loop.step == 2:
            raise KeyError("mine")


@pytest.mark.thorough
@pytest.mark.parametrize("event", [pytest.param("step", marks=pytest.mark.thorough), "save"])
def test_a_callback_that_raises_costs_no_checkpoint(
    event: str, recipe_file: Path, tmp_path: Path
) -> None:
    """Both times the checkpoint after the second step is there, and the run goes on from it."""
    run = made(tmp_path, recipe_file, "save_seconds=1e6", "save_steps=1")
    settings = {"stages": ["0"], "controls": False, "limit": LIMIT}
    with pytest.raises(KeyError, match="mine"):
        train(run, SILENT, callbacks=[_Raises(event)], **settings)
    found = checkpoint.newest(run.stage("0"))
    assert found is not None and checkpoint.step_of(found) == 2
    before = run.metrics("0")
    train(run, SILENT, **settings)
    assert run.is_trained("0")
    assert [line["step"] for line in run.metrics("0")] == [1, 2, 3]
    assert run.metrics("0")[: len(before)] == before, "the third step again, to the bit"
