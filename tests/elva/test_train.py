"""`elva train` end to end on a small corpus: files, figures, resuming, bad input. Of kill -9:
benchmarks/reliability, `kills-training`."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean

import pytest
from typer.testing import CliRunner

from elva.cli import app
from elva.commands.train import train
from elva.errors import UserError
from elva.evaluation.trained import evaluate_stage
from elva.recipe import Recipe
from elva.recipes import resolve
from elva.run import Run
from elva.training.callbacks import Callback
from elva.training.estimate import describe
from elva.training.loop import BEST, Loop

Start = Callable[..., BaseProcess]


class Silent:
    """A reporter that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, what: str, total: int | None, unit: str = "steps") -> None: ...
    def advance(self, done: int, values: dict[str, float] | None = None) -> None: ...
    def say(self, line: str) -> None:
        self.lines.append(line)

    def finish(self, line: str) -> None:
        self.lines.append(line)


def weights(run: Path) -> dict[str, str]:
    """Of each stage's model: its weights, or its adapter's."""
    files = sorted(run.glob("*/model/**/*.safetensors"))
    return {f.relative_to(run).parts[0]: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_run_directory_is_complete(finished: Path) -> None:
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "report.html"):
        assert (finished / name).stat().st_size > 0
    run = Run.open(finished)
    assert run.trained == ["0", "1", "2", "3", "infonce", "soft-rank", "grpo"]
    facts = json.loads((finished / "run.json").read_text())
    assert {"torch", "transformers"} <= set(facts["versions"]) and facts["seed"] == 0
    steps = [len(run.metrics(name)) for name in run.trained]
    assert steps == [80, 3, 4, 4, 2, 2, 2]
    assert not list(finished.rglob("*.partial")) and not list(finished.rglob("checkpoint-*"))
    assert not [p for p in finished.rglob("*") if p.suffix in (".pt", ".bin", ".pth", ".pkl")]


def test_figures_are_shares_and_agree_with_their_samples(finished: Path) -> None:
    run = Run.open(finished)
    for name in run.trained:
        result = run.read(name, "evaluation.json")
        ranks = [s["rank"] for s in result["samples"]["t2i"]]
        assert result["figures"]["t2i_recall_at_5"] == pytest.approx(
            sum(r <= 5 for r in ranks) / len(ranks)
        )
        for sample in result["samples"]["t2i"]:
            first = sample["top"][0]["id"] in sample["positives"]
            assert first or sample["rank"] > 1
        distances = result["grain_distances"]
        assert "entity" in distances and all(-1e-6 < d < 2 for ds in distances.values() for d in ds)
        means = {kind: pytest.approx(fmean(ds)) for kind, ds in distances.items()}
        assert result["figures"]["grain_distance"] == means


def test_evaluate_repeats_the_table(finished: Path, start: Start, tmp_path: Path) -> None:
    before = Run.open(finished).read("2", "evaluation.json")["figures"]
    words = ("evaluate", str(finished), "--stage", "2", "--json")
    assert ended(start(*words, directory=tmp_path)) == 0, (tmp_path / "printed").read_text()
    assert Run.open(finished).read("2", "evaluation.json")["figures"] == before


def ended(process: BaseProcess) -> int:
    """Its exit code, once it is there."""
    process.join(300)
    assert process.exitcode is not None, "still running after five minutes"
    return process.exitcode


@pytest.mark.thorough
def test_stage_three_alone_starts_from_another_run(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "third", recipe)
    train(run, Silent(), stages=["3"], start_from=Run.open(finished), controls=False, limit=2)
    assert run.trained == ["3"]
    assert run.read("3", "stage.json")["steps"] == 2


@pytest.mark.thorough
def test_a_control_takes_as_many_steps_as_what_it_is_compared_with(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """However busy the machine is: never until a clock says so."""
    control = replace(recipe.controls["infonce"], steps=None)
    recipe = replace(recipe, controls={"infonce": control}, evaluate=False)
    planned = describe(recipe, found={"infonce": {}})["plan"]
    assert planned["infonce"]["steps"] == planned["3"]["steps"] == recipe.stages["3"].steps == 4
    run = Run.create(tmp_path / "third", recipe)
    train(run, Silent(), stages=["3"], start_from=Run.open(finished))
    assert [run.read(name, "stage.json")["steps"] for name in ("3", "infonce")] == [4, 4]


GRPO = {"policy": 1.0, "pathwise": 0.0, "infonce": 0.0, "lm": 0.0, "hard_batches": False,
        "num_generations": 3, "batch_size": 2, "steps": 4,
        "negatives": {"given": 0, "mined": 3, "random": 2, "in_batch": False}}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {**GRPO, "rollout_candidates": "all", "micro_batch_size": 16},
            marks=pytest.mark.thorough,
        ),
        # test_processes has each of the two by several processes and by one
        pytest.param({**GRPO, "num_iterations": 2}, marks=pytest.mark.thorough),
        pytest.param({**GRPO, "lora": {"rank": 4, "alpha": 8}}, marks=pytest.mark.thorough),
        {
            **GRPO,
            "pathwise": 0.5,
            "infonce": 0.5,
            "refresh_steps": 2,
            "negatives": {"given": 1, "mined": 3, "random": 2, "in_batch": True},
        },
        pytest.param(
            {**GRPO, "policy": 0.0, "pathwise": 1.0, "reward": {"rank_temperature": 0.03}},
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {**GRPO, "policy": 0.0, "pathwise": 1.0, "rollout_candidates": "all"},
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["all", "two-iterations", "lora", "mixed", "soft-pathwise", "pathwise-all"],
)
def test_every_objective_of_stage_three_trains(
    changes: dict[str, object], finished: Path, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = resolve("smoke", recipe_file, [f"stages.3={json.dumps(changes)}"])
    run = Run.create(tmp_path / "third", recipe)
    train(run, Silent(), stages=["3"], start_from=Run.open(finished), controls=False)
    steps = run.metrics("3")
    assert len(steps) == 4 and all(math.isfinite(s["loss"]) for s in steps)
    assert sum(steps[0][k] for k in ("rank_1", "rank_2_3", "rank_4_10", "rank_11_up")) == (
        pytest.approx(1.0)
    )
    if changes["policy"]:
        assert abs(steps[0]["kl"]) < 1e-6, "the reference is the model that stage 3 started from"
        assert min(s["frac_no_ret"] for s in steps) < 1, "no rollout counted"
        assert max(s["kl"] for s in steps) > 0
    assert weights(run.directory)["stage-3"] != weights(finished)["stage-2"]


class Heard(Callback):
    """A user's callback: what it was told of."""

    def __init__(self) -> None:
        self.figures: list[float] = []
        self.saved: list[bool] = []

    def on_evaluate(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self.figures.append(metrics[loop.metric])

    def on_save(self, loop: Loop, checkpoint: Path) -> None:
        self.saved.append(checkpoint.is_dir())


@pytest.mark.thorough
def test_a_stage_ends_early_with_the_weights_of_its_best_evaluation(
    recipe_file: Path, tmp_path: Path
) -> None:
    changes = ("eval_steps=2", "load_best_model_at_end=true", "early_stopping_patience=2",
               "metric_for_best_model=eval_t2i_recall_at_5")  # fmt: skip
    recipe = resolve("smoke", recipe_file, [f"stages.0.{change}" for change in changes])
    run, heard = Run.create(tmp_path / "best", recipe), Heard()
    train(run, Silent(), stages=["0"], controls=False, limit=40, callbacks=[heard])
    done, figures = run.read("0", "stage.json"), heard.figures
    best = figures.index(max(figures))
    assert done["best"]["step"] == 2 * (best + 1) and done["steps"] == 2 * len(figures) < 40
    assert len(figures) == best + 1 + 2, "two evaluations without a better one"
    assert run.read("0", "evaluation.json")["split"] == "test", "what is reported"
    chosen_on = evaluate_stage(run, "0", Silent(), split="val")
    assert chosen_on is not None and chosen_on["figures"]["t2i_recall_at_5"] == max(figures)
    assert heard.saved and all(heard.saved)


class Spoils(Callback):
    """Changes a byte of the best weights after each evaluation."""

    def on_evaluate(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        for file in (loop.directory / BEST).glob("*/weights.safetensors"):
            content = bytearray(file.read_bytes())
            content[-1] = (content[-1] + 1) % 256
            file.write_bytes(content)


@pytest.mark.thorough
def test_damaged_best_weights_are_refused_by_name_and_the_stage_trained_again(
    recipe_file: Path, tmp_path: Path
) -> None:
    changes = ("eval_steps=1", "load_best_model_at_end=true",
               "metric_for_best_model=t2i_recall_at_5")  # fmt: skip
    recipe = resolve("smoke", recipe_file, [f"stages.0.{change}" for change in changes])
    run = Run.create(tmp_path / "best", recipe)
    with pytest.raises(
        UserError, match=r"stage-0/best/checkpoint-0000000\d: .*another SHA"
    ) as told:
        train(run, Silent(), stages=["0"], controls=False, limit=2, callbacks=[Spoils()])
    assert "delete its stage's directory" in str(told.value) and not run.is_trained("0")
    shutil.rmtree(run.stage("0"))
    train(run, Silent(), stages=["0"], controls=False, limit=2)
    assert run.is_trained("0") and not (run.stage("0") / BEST).exists()


def test_a_metric_that_is_none_is_one_line(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["stages.0.eval_steps=1", "stages.0.metric_for_best_model=nope"]
    run = Run.create(tmp_path / "none", resolve("smoke", recipe_file, changes))
    with pytest.raises(UserError, match=r"metric_for_best_model must be one of .*got nope"):
        train(run, Silent(), stages=["0"], controls=False, limit=1)


def test_a_stage_without_its_start_says_what_to_do(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "third", recipe)
    with pytest.raises(UserError, match=r"stage 3 starts from stage 2.*--from RUN"):
        train(run, Silent(), stages=["3"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--recipe", "nope"), "recipe: must be one of emoji"),
        (("--set", "stages.2.lr=1"), "stages.2.lr is not a field"),
        (("--set", "stages.2.steps=many"), "stages.2.steps must be a int"),
        (("--set", "seed"), "--set: must read FIELD=VALUE"),
        (("--config", "absent.yaml"), "absent.yaml: must be a readable YAML file"),
        (("--resume",), "pass --output RUN too"),
        (("--stages", "9"), "stages must be among 0, 1, 2, 3"),
        (("--from", "absent"), "must hold a run, got no recipe.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "--recipe", "smoke", *words])
    assert done.exit_code == 2, done.output
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("model")), "something was trained"


def test_a_directory_with_a_run_is_not_overwritten(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    done = CliRunner().invoke(app, ["train", "--recipe", "smoke", "--output", str(finished)])
    assert done.exit_code == 2 and "must be empty to start a run in" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.parametrize("recipe", ["elva-2b", "elva-7b"])
def test_dry_run_resolves_to_the_papers_table(recipe: str) -> None:
    """Liu et al., ELVA, arXiv:2606.20280, sec. 4.1."""
    done = CliRunner().invoke(app, ["train", "--recipe", recipe, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["recipe"]["model"]["path"].startswith("Qwen/Qwen2-VL-")
    first, second, third = (plan["recipe"]["stages"][k] for k in ("1", "2", "3"))
    assert (first["batch_size"], first["learning_rate"], first["epochs"]) == (576, 4e-5, 2)
    assert (second["batch_size"], second["learning_rate"], second["epochs"]) == (960, 1e-4, 1)
    assert (third["learning_rate"], third["num_generations"], third["beta"]) == (1e-6, 8, 0.2)
    assert (third["negatives"]["mined"], third["negatives"]["random"]) == (50, 50)
    assert third["share"] == 0.01 and not third["symmetric"]
    assert third["rollout_candidates"] == "all" and third["instances"] == 11_000
    reward = third["reward"]
    assert (reward["w_margin"], reward["w_rank"], reward["rank_temperature"]) == (0.4, 0.6, 0.0)
    assert not any(s["train_vision"] for s in (first, second, third))
    assert plan["plan"]["2"]["steps"] == round(1_100_000 / 960)
    hours = [stage["hours"] for stage in plan["plan"].values()]
    here = "not measured: no data here"
    assert hours == ["not known: epochs over data that is not here", here, here]


def test_a_run_starts_where_a_kill_left_half_a_recipe(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml.partial").write_text("name:")
    assert Run.open(Run.create(tmp_path, recipe).directory).recipe == recipe


def test_dry_run_measures_and_writes_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--recipe", "smoke", "--config", str(recipe_file), "--dry-run", "--json"]
    done = CliRunner().invoke(app, [*words, "--limit", "7"])
    assert done.exit_code == 0 and not list(tmp_path.iterdir())
    plan = json.loads(done.stdout)
    stages = plan["plan"]
    assert [stage["steps"] for stage in stages.values()] == [7, 3, 4, 4, 2, 2, 2]
    for stage in stages.values():
        assert 0.001 < stage["seconds_a_step"] < 5 and 3 < stage["data"]["prompt_tokens"] < 60
        at_least = stage["steps"] * stage["seconds_a_step"] / 3600
        assert at_least - 1e-4 <= stage["hours"] < at_least + 60 / 3600  # and a pool's embedding
    assert plan["hours"] == pytest.approx(sum(s["hours"] for s in stages.values()), abs=1e-4)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    recipe_file: Path, start: Start, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE makes every write beyond 200 kB fail, as a full disk does."""
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    )
    run = tmp_path / "full"
    words = ("train", "--recipe", "smoke", "--config", str(recipe_file), "--output", str(run))
    code = ended(start(*words, directory=tmp_path, before=limit))
    printed = (tmp_path / "printed").read_text()
    assert code == 2, printed
    assert "cannot write" in printed and "Traceback" not in printed
    assert not list(run.rglob("*.partial"))


FULL = """
def full(path, *flags, os=os, real=os.open, **more):
    if str(path).endswith("checkpoint-00000005.partial/state.json.partial"):
        raise OSError(28, os.strerror(28), str(path))
    return real(path, *flags, **more)
os.open = full
"""


@pytest.mark.thorough
def test_a_full_disk_and_a_damaged_checkpoint_cost_steps_and_no_bits(
    finished: Path, recipe_file: Path, start: Start, tmp_path: Path
) -> None:
    """A disk that is full at the fifth checkpoint ends the run in a line and keeps the two before
    it; of those the newer one is damaged, named, and training goes on from the other."""
    run = tmp_path / "full"
    words = ("--recipe", "smoke", "--config", str(recipe_file), "--output", str(run))
    assert ended(start("train", *words, directory=tmp_path, before=FULL)) == 2
    printed = (tmp_path / "printed").read_text()
    assert printed.splitlines()[-1].startswith("elva: ") and "Traceback" not in printed
    assert "cannot write, No space left on device" in printed.splitlines()[-1]
    kept = sorted(path.name for path in (run / "stage-0").iterdir())
    assert kept == ["checkpoint-00000003", "checkpoint-00000004"]
    weights_file = run / "stage-0" / kept[1] / "weights.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    (tmp_path / "printed").unlink()
    resume = ("--output", str(run), "--resume", "--stages", "0")
    code = ended(start("train", *resume, directory=tmp_path))
    printed = (tmp_path / "printed").read_text()
    assert code == 0, printed
    assert "stage-0/checkpoint-00000004: must be as it was written, passed over" in printed
    assert "stage-0: goes on from checkpoint-00000003" in printed
    assert weights(run) == {"stage-0": weights(finished)["stage-0"]}
    assert Run.open(run).metrics("0") == Run.open(finished).metrics("0")
