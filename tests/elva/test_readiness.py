"""What is found before the first step: by `elva train` in one line, by `--dry-run` as a list."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elva.cli import app
from elva.errors import UserError
from elva.recipe import ModelConfig
from elva.recipes import resolve
from elva.run import Run, evaluated
from elva.training import readiness
from elva.training.estimate import at_hand


def refused(tmp_path: Path, *words: str | Path) -> str:
    words = ("--recipe", "elva-2b", "--stages", "1", "--output", tmp_path / "run", *words)
    done = CliRunner().invoke(app, ["train", *map(str, words)])
    assert done.exit_code == 2, (done.output, done.exception)
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()
    return done.stderr


DAMAGES: dict[str, Callable[[Path], object]] = {
    "config.json is a list": lambda m: (m / "config.json").write_text("[]"),
    "config.json says a kind alone": lambda m: (m / "config.json").write_text(
        '{"model_type": "qwen2_vl"}'
    ),
    "weights are cut": lambda m: (m / "model.safetensors").write_bytes(
        (m / "model.safetensors").read_bytes()[:5]
    ),
    "no tokenizer": lambda m: (m / "tokenizer.json").unlink(),
    "no image processor": lambda m: (m / "preprocessor_config.json").unlink(),
    "no chat template": lambda m: (m / "chat_template.jinja").unlink(),
    "another family": lambda m: (m / "config.json").write_text('{"model_type": "llama"}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_one_line(
    damage: str, released: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(released("tied"), model)
    DAMAGES[damage](model)
    assert "model.path must be a" in refused(tmp_path, "--model", model, "--data", corpus)


def test_data_that_a_stage_cannot_train_on_is_one_line(
    released: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    model = ("--model", released("tied"), "--data", corpus)
    line = refused(tmp_path, *model, "--set", "stages.1.tasks={t2it: 1}")
    assert "must have train queries of t2it, got" in line
    pictures = tmp_path / "corpus"
    shutil.copytree(corpus, pictures, symlinks=True)
    (pictures / "mbeir_images").unlink()
    shutil.copytree(corpus / "mbeir_images", pictures / "mbeir_images")
    for path in (pictures / "mbeir_images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    line = refused(
        tmp_path, *model, "--data", pictures, "--set", "stages.1.tasks={t2i: 1}"
    )  # fmt: skip
    assert "unreadable picture" in line


def test_a_dry_run_lists_what_is_missing_and_trains_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--recipe", "elva-2b", "--dry-run", "--json"]
    plan = json.loads(CliRunner().invoke(app, words).stdout)
    assert [line.removeprefix("recipe: ").partition(" ")[0] for line in plan["problems"]] == [
        "stages.1.data",
        "stages.2.data",
        "stages.3.data",
    ]
    other = ["--config", str(recipe_file), "--set", "controls.grpo.data=absent"]
    words = ["train", "--recipe", "smoke", *other, *words[3:]]
    plan = json.loads(CliRunner().invoke(app, words).stdout)
    assert "controls.grpo.data must be" in plan["problems"][0]


def test_stages_that_share_data_have_it_read_once(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    load = readiness.load
    monkeypatch.setattr(
        readiness, "load", lambda root, **kinds: read.append(root) or load(root, **kinds)
    )
    recipe = resolve("smoke", recipe_file)
    assert set(readiness.look(recipe).stages) == {*recipe.stages, *recipe.controls}
    assert len(read) == 1


def test_two_processes_do_not_train_one_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", resolve("smoke"))
    with (
        run.locked(),
        pytest.raises(UserError, match="must be trained by one process, got a second"),
        Run.open(run.directory).locked(),
    ):
        raise AssertionError("both are in")
    with run.locked():
        pass


def test_sizes_are_those_of_the_checkpoint(released: Callable[[str], Path]) -> None:
    found = at_hand(ModelConfig(str(released("untied")), parameters=2_000_000_000))
    assert (found.hidden_size, found.layers) == (64, 2) and found.parameters is not None
    assert 300_000 < found.parameters < 500_000


def test_what_is_evaluated_on_is_the_last_stages_that_can_be(corpus: Path, tmp_path: Path) -> None:
    """Mined data are training queries alone: the stage before them says what is evaluated."""
    mined = tmp_path / "mined"
    shutil.copytree(corpus / "query" / "train", mined / "query" / "train")
    changes = [f"stages.{s}.data={corpus}" for s in "012"] + [f"stages.3.data={mined}"]
    assert evaluated(resolve("smoke", None, changes)) == (corpus, "test")
    changes = [f"stages.{s}.data={mined}" for s in "0123"]
    assert evaluated(resolve("smoke", None, changes)) == (mined, None)


def test_shares_of_tasks_are_replaced_by_a_mapping_and_changed_by_a_path() -> None:
    assert resolve("emoji", None, ["stages.2.tasks={}"]).stages["2"].tasks == {}
    assert resolve("emoji", None, ["stages.1.tasks={t2i: 1}"]).stages["1"].tasks == {"t2i": 1}
    changed = resolve("emoji", None, ["stages.2.tasks.t2i=0.9"]).stages["2"].tasks
    assert changed == {"t2i": 0.9, "i2t": 0.3, "it2i": 0.2}


def test_a_revision_is_a_hub_names(
    released: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    given = ("--model", released("tied"), "--data", corpus, "--revision", "abc")
    assert "model.revision must be left out of a directory, got 'abc'" in refused(tmp_path, *given)
    line = refused(tmp_path, "--recipe", "smoke", "--revision", "abc", "--stages", "0")
    assert "model.revision must be left out of a model that is made from nothing" in line
    assert resolve("elva-2b", revision="abc").model.revision == "abc"


def test_bounds_of_a_picture_that_leave_no_size_are_one_line(
    released: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    given = ("--model", released("tied"), "--data", corpus, "--set")
    size = json.loads((released("tied") / "preprocessor_config.json").read_text())["size"]
    least, most = size["shortest_edge"], size["longest_edge"]
    line = " ".join(refused(tmp_path, *given, f"model.max_pixels={least - 1}").split())
    assert f"the checkpoint's own minimum {least}, got {least - 1}; set model.min_pixels" in line
    line = " ".join(refused(tmp_path, *given, f"model.min_pixels={most + 1}").split())
    assert f"the checkpoint's own maximum {most}, got {most + 1}; set model.max_pixels" in line


def test_a_booster_of_what_is_no_retriever_is_one_line(
    released: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    given = ("--recipe", "booster", "--stages", "3", "--model", released("tied"), "--data", corpus)
    line = " ".join(refused(tmp_path, *given).split())
    assert "model.pooling must say how" in line and "add --set model.pooling=last" in line
    recipe = resolve("booster", None, [f"stages.3.data={corpus}"], model=str(released("tied")))
    for asked in ("last", "ret"):
        model = replace(recipe.model, pooling=asked)
        readiness._refuse_unfit(replace(recipe, model=model), recipe.stages)
    writes = replace(recipe.stages["3"], max_completion_length=4)
    readiness._refuse_unfit(recipe, {"3": writes})


def test_attention_that_is_not_installed_is_one_line(
    released: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    given = ("--model", released("tied"), "--data", corpus, "--set")
    line = refused(tmp_path, *given, "model.attention=flash_attention_2")
    assert "model.attention must be sdpa or eager here, got flash_attention_2" in line
    assert "model.attention must be" in refused(tmp_path, *given, "model.attention=fast")
