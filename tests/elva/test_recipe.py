"""Recipes: every field refuses what is against its rule, in one line, before anything is made."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from transformers.trainer_utils import SchedulerType
from typer.testing import CliRunner

import elva_kernels
from elva import recipe
from elva.cli import app
from elva.data.schema import TASKS
from elva.errors import UserError
from elva.recipe import Recipe
from elva.recipes import RECIPES, read_recipe, resolve
from elva.settings import Places, Rule, build
from elva.training import objective

WRONG: dict[object, tuple[str, ...]] = {
    float: ("many", ".nan", "nan", ".inf", "-.inf", "1e400", "1" + "0" * 400, "true", "[1]"),
    int: ("many", "0.5", "1e400", "1" + "0" * 40, "-1" + "0" * 40, "true", "{a: 1}"),
    str: ("1", "null", "[a]", r'"\0"', r'"\uD800"'),
    bool: ("1", "maybe", "null"),
}
"""What no field of a type takes, as `--set` reads it."""


def fields(kind: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, annotation) of every leaf, one entry standing for all of a mapping."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        inner = f"{path}.{name}" if path else name
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, inner)
        elif typing.get_origin(hint) is not Annotated and dataclasses.is_dataclass(
            (typing.get_args(hint) or (None,))[-1]
        ):
            yield from fields(typing.get_args(hint)[-1], f"{inner}.{entry(name)}")
        else:
            yield inner, hint


def entry(name: str) -> str:
    return {"stages": "3", "controls": "infonce"}[name]


def required(hint: Any) -> Any:
    """The annotation without its None."""
    if typing.get_origin(hint) in (Annotated, Literal) or not typing.get_args(hint):
        return hint
    return next(a for a in typing.get_args(hint) if a is not type(None))


FIELDS = dict(fields(Recipe))


def refused(*assignments: str, file: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        resolve("emoji", file, assignments)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 1200
    return line


def test_the_walk_finds_every_dataclass() -> None:
    assert len(FIELDS) > 80
    assert {"stages.3.reward.margin", "controls.infonce.lora.rank", "model.scratch.heads"} <= set(
        FIELDS
    )


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_has_a_rule_and_refuses_what_is_against_it(path: str) -> None:
    hint = required(FIELDS[path])
    if typing.get_origin(hint) is Literal:
        wrong: tuple[str, ...] = ("foo", "1", "[a]", "null")
    elif hint is bool:
        wrong = WRONG[bool]
    else:
        assert typing.get_origin(hint) is Annotated, f"{path} has no rule"
        assert all(isinstance(rule, Rule) for rule in hint.__metadata__)
        of = hint.__origin__
        wrong = ("1", "[a]", "{foo: 1}") if typing.get_origin(of) is not None else WRONG[of]
    if hint is not FIELDS[path]:
        wrong = tuple(value for value in wrong if value != "null")
    for value in wrong:
        line = refused(f"{path}={value}")
        assert line.startswith(f"recipe: {path}") and " must " in line, (value, line)
        assert ", got " in line


@pytest.mark.parametrize("path", [p for p, h in FIELDS.items() if required(h) is not bool])
def test_numbers_below_their_range_are_refused(path: str) -> None:
    """Whatever says "at least", "over" or "from" in its rule holds to it."""
    hint = required(FIELDS[path])
    for rule in getattr(hint, "__metadata__", ()):
        if "at least 0" in rule.words or ("over" in rule.words and hint.__origin__ in (int, float)):
            assert rule.words in refused(f"{path}=-1")
        if rule.words.startswith("be from 1 ") or rule.words == "be finite and over 0":
            assert rule.words in refused(f"{path}=0")


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("stages.3.reward.rank_penalty=-1",
         "recipe: stages.3.reward.rank_penalty must be finite and at least 0, got -1"),
        ("stages.3.scale_rewards=foo",
         "recipe: stages.3.scale_rewards must be one of group, batch, none, got 'foo'"),
        ("stages.3.learning_rate=nan",
         "recipe: stages.3.learning_rate must be finite and at least 0, got 'nan'"),
        ("stages.3.learning_rate=1e400",
         "recipe: stages.3.learning_rate must be finite and at least 0, got '1e400'"),
        ("stages.3.tasks.t2x=1", "recipe: stages.3.tasks.t2x must be one of t2i,"),
        ("stages.3.tasks={t2i: 0, i2t: 0}", "recipe: stages.3.tasks must have a share over 0"),
        ("stages.../up.steps=1", "recipe: stages. must be a word of letters"),
        ("name=../up", "recipe: name must be a word of letters"),
        ("stages.9.lm=1", "recipe: stages.9 must have steps or epochs"),
        ("stages.9.steps=1",
         "recipe: stages.9 must have lm, ret, infonce, pathwise or policy over 0"),
        ("stages.3={completions: gold, policy: 1}",
         "recipe: stages.3.completions must be sampled where policy or anchor is over 0"),
        ("stages.3={completions: gold, num_generations: 2}",
         "recipe: stages.3.num_generations must be 1 where completions are gold"),
        ("stages.3.negatives.in_batch=false",
         "recipe: stages.3.negatives.in_batch must be true where infonce is over 0"),
        ("stages.3={infonce: 0, pathwise: 1, negatives: {in_batch: false}}",
         "recipe: stages.3.negatives must leave something to rank against"),
        ("controls.grpo.anchor=1", "recipe: controls.grpo.anchor must be 0 where policy is over 0"),
        ("stages.3.share=0", "recipe: stages.3.share must be over 0 and at most 1, got 0"),
        ("controls.grpo.num_generations=1",
         "recipe: controls.grpo.num_generations must be at least 2 where policy is over 0"),
        ("stages.3={hard_batches: true, batches: mixed}",
         "recipe: stages.3.batches must be task where hard_batches is true"),
        ("stages.3={train_vision: true, anchor: 1, lora: {rank: 4}}",
         "recipe: stages.3.train_vision must be false where an adapter is held to its start"),
        ("stages.0.learn_infonce_temperature=true",
         "recipe: stages.0.learn_infonce_temperature must be false where infonce is 0"),
        ("stages.0.final_infonce_temperature=0.02",
         "recipe: stages.0.final_infonce_temperature must be left out where none is used"),
        ("stages.2.final_rank_temperature=0.02",
         "recipe: stages.2.final_rank_temperature must be left out where reward.rank_temperature"),
        ("controls.infonce.relevance=start",
         "recipe: controls.infonce.relevance must be none where nothing is ranked"),
        ("stages.3.pairings=all",
         "recipe: stages.3.pairings must be own where nothing is ranked, or num_generations is 1"),
        ("trainer.per_device_train_batch_size=4", "recipe: trainer must hold no more than bf16,"),
        ("trainer.gradient_accumulation_steps=2", "(batch size: stages.N.batch_size,"),
        ("trainer.ignore_data_skip=true", "recipe: trainer must hold no more than bf16,"),
        ("trainer.optim=adafactor", "optim one of adamw_torch, adamw_torch_fused, sgd"),
        ("controls.3={steps: 3, lm: 1}", "recipe: controls.3 must have a name that no stage has"),
        ("model.scratch.heads=5", "hidden_size must be a multiple of twice the 5 heads, got 128"),
        ("trainer.foo=1", "recipe: trainer must hold no more than bf16,"),
        ("trainer.adam_beta1=x", "recipe: trainer must be arguments of transformers' Training"),
        ("trainer.adam_beta1=.nan", "recipe: trainer.adam_beta1 must be finite"),
        ("a\nb=1", "recipe: a?b is not a field"),
        ("seed=" + "1" * 5000, "recipe: seed must be a int, got '1111"),
        ("seed=0x" + "1" * 8000, "got a number of thousands of digits"),
        ("seed=" + "[" * 5000, "recipe: seed must be a int, got '[[["),
        ("a." * 5000 + "a=1", "recipe: a is not a field"),
    ],
)  # fmt: skip
def test_a_bad_assignment_is_one_line(assignment: str, line: str) -> None:
    assert line in refused(assignment)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nstages:\n  3:\n    reward:\n      rank_penalty: -1\n",
         "{}:5: stages.3.reward.rank_penalty must be finite and at least 0, got -1"),
        ("seed: 1\nseed: 2\n", "{0}:2: seed must be set once, is set at {0}:1 too"),
        ("stages:\n  2: {{steps: 1}}\n  '2': {{steps: 2}}\n", "{0}:3: stages.2 must be set once"),
        ("[" * 5000, "{}: must be a readable YAML file; it is nested too deeply"),
        ("seed: " + "1" * 5000, "{}: must be a readable YAML file; Exceeds the limit"),
        ("stages: &a\n  x: *a\n", "{}:2: stages.x.x is not a field"),
        ("seed: 1\n---\nseed: 2\n", "{}: must be a readable YAML file; expected a single document"),
        ("", "{}:1: must be a mapping of recipe fields, got None"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_names_its_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("{{", "{").replace("}}", "}"))
    assert line.format(file) in refused(file=file)


def test_aliases_are_read_once_however_often_they_stand(tmp_path: Path) -> None:
    """Ten levels of ten aliases each would be ten thousand million lines."""
    file = tmp_path / "recipe.yaml"
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 11)]
    file.write_text("\n".join(["l0: &l0 [x]", *levels, "trainer: {a: *l10}"]))
    assert "l0 is not a field" in refused(file=file)
    file.write_text("stages:\n  2: &s {steps: 3, lm: 1, tasks: {t2i: 1}}\n  4: *s\n")
    assert resolve("emoji", file).stages["4"].steps == 3


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_keep_their_own_rules(name: str, tmp_path: Path) -> None:
    """They are written as Python, so nothing has built them; and a run's file reads back whole."""
    own = RECIPES[name]
    assert build(Recipe, asdict(own), Places("recipe")) == own
    assert not list(own.idle())
    import yaml

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(asdict(own), sort_keys=False))
    assert read_recipe(file) == own


def test_names_are_those_that_are_taken_further_down() -> None:
    schedules = {schedule.value for schedule in SchedulerType}
    assert schedules - set(typing.get_args(recipe.Schedule)) == {"reduce_lr_on_plateau", "greedy"}
    assert set(typing.get_args(recipe.Schedule)) < schedules
    assert tuple(TASKS) == recipe.TASKS
    import torch

    for scale in typing.get_args(required(FIELDS["stages.3.scale_rewards"])):
        objective.advantages(torch.ones(2, 3), scale)
    least = recipe.COLDEST
    with pytest.raises(ValueError, match=f"at least {least}"):
        elva_kernels.info_nce(torch.ones(2, 3), torch.ones(2, 3), temperature=least / 2)


def test_processes_that_cannot_meet_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, ["train", "--recipe", "smoke", "--output", "run"])
    assert done.exit_code == 2 and not list(tmp_path.iterdir())
    assert "processes must have RANK" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--stages", "7"), "train: stages must be among 0, 1, 2, 3, got '7'"),
        (("--stages", "7", "--dry-run"), "train: stages must be among 0, 1, 2, 3, got '7'"),
        (("--set", "stages.3.lm=-1", "--dry-run"), "stages.3.lm must be finite"),
        (("--set", "stages.3.data=absent"), "stages.3.data must be emoji or a directory"),
        (("--set", "model.path=/absent/model"), "model.path must be a checkpoint directory"),
    ],
)
def test_no_run_directory_is_made_for_what_cannot_be_trained(
    words: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "--recipe", "smoke", "--output", "run", *words])
    assert done.exit_code == 2, done.output
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["-1", "true", "2.0", "null", "'2'", "65"])
def test_a_number_of_threads_is_refused_by_its_name(value: str) -> None:
    with pytest.raises(UserError, match="must have a dataloader_num_workers from 0 to 64"):
        resolve("emoji", None, [f"trainer.dataloader_num_workers={value}"])
    assert resolve("emoji", None, ["trainer.dataloader_num_workers=0"]).trainer


def test_temperatures_cool_geometrically_from_the_first_step_to_the_last() -> None:
    stage = resolve("emoji").controls["soft-rank"]
    assert stage.cooled(0.5) is stage
    cooling = replace(stage, final_infonce_temperature=0.0125, final_rank_temperature=0.12)
    for share, infonce, rank in ((0.0, 0.05, 0.03), (0.5, 0.025, 0.06), (1.0, 0.0125, 0.12)):
        found = cooling.cooled(share)
        assert found.infonce_temperature == pytest.approx(infonce)
        assert found.reward.rank_temperature == pytest.approx(rank)
    assert cooling.cooled(0.5).reward.w_rank == stage.reward.w_rank
