"""M-BEIR as it is published, by the command line alone: checked, trained on, embedded, evaluated,
mined, trained on again, with a model of the released structure and the paper's own recipe."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from elva.cli import app
from elva.run import Run
from tests.elva.published import DATASETS, published

SHORT = [
    *("stages.1.epochs=12", "stages.1.learning_rate=1e-3", "stages.2.learning_rate=1e-3"),
    *("stages.2.epochs=1", "stages.3.steps=3", "stages.3.learning_rate=1e-3"),
    *(f"stages.{s}.max_completion_length=12" for s in (1, 2, 3)),
    *(f"stages.{s}.micro_batch_size=256" for s in (1, 2, 3)),
    *("stages.3.batch_size=2", "stages.3.num_generations=3", "evaluate_limit=8"),
    "stages.3.share=1", "stages.3.negatives={given: 8, mined: 4, random: 4, in_batch: false}",
]  # fmt: skip
"""The recipe on two cores: its losses and its order, not its sizes."""


def elva(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def tree(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(corpus, tmp_path_factory.mktemp("published") / "M-BEIR")


@pytest.fixture(scope="module")
def run(
    tree: Path, released: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every stage of `elva train --recipe elva-2b --model DIR --data DIR`."""
    output = tmp_path_factory.mktemp("runs") / "paper"
    recipe = ("--recipe", "elva-2b", "--model", released("untied"), "--data", tree)
    short = [word for change in SHORT for word in ("--set", change)]
    plan = json.loads(elva("train", *recipe, *short, "--dry-run", "--json"))
    assert plan["problems"] == [] and plan["evaluation"].startswith("test: t2i, t2t, t2it, i2t")
    assert plan["plan"]["2"]["data"]["queries"]["it2it"] == 48
    assert plan["parameters"] < 500_000, "counted in the checkpoint's own files"
    printed = elva("train", *recipe, *short, "--output", output)
    assert "t→i R@1" in printed
    return output


def stages(run: Path, name: str) -> list[dict[str, Any]]:
    return Run.open(run).metrics(name)


@pytest.mark.thorough
def test_the_larger_models_recipe_trains_its_three_stages(
    tree: Path, released: Callable[[str], Path], tmp_path: Path
) -> None:
    elva("train", "--recipe", "elva-7b", "--model", released("untied"), "--data", tree, "--output",
         tmp_path / "run", *(w for change in SHORT for w in ("--set", change)), "--set",
         "evaluate=false", "--limit", "1")  # fmt: skip
    assert Run.open(tmp_path / "run").trained == ["1", "2", "3"]
    assert [row["step"] for name in "123" for row in stages(tmp_path / "run", name)] == [1] * 3


def test_a_published_tree_is_whole(tree: Path) -> None:
    found = json.loads(elva("data", "check", tree, "--json"))
    assert found["bad"] == [] and found["missing_pictures"] == 0
    assert "16 of its 16 test sets are whole" in elva("data", "check", tree, "--split", "test")


@pytest.mark.thorough
def test_ret_is_learnt_and_stage_three_moves_weights(run: Path) -> None:
    """Found by audit: frac_no_ret 1.0, loss 0.0, largest weight change 0.0 in each of them."""
    for name in ("1", "2"):
        log = stages(run, name)
        assert fmean(step["frac_no_ret"] for step in log[-4:]) < 0.05
        assert all(step["completion_length"] > 1.5 for step in log), "summaries say something"
    assert stages(run, "2")[-1]["ret_share"] > stages(run, "1")[0]["ret_share"] + 0.1
    third = stages(run, "3")
    assert third[0]["kl"] == 0.0 and third[-1]["kl"] > 0.0
    assert all(step["reward_std"] > 0 and step["frac_zero_std"] < 1 for step in third)
    assert {"reward_share_mined", "reward_share_random", "reward_outranked_mined"} <= set(third[0])
    before, after = (
        load_file(run / f"stage-{s}" / "model" / "adapter" / "adapter_model.safetensors")
        for s in (2, 3)
    )
    assert max((after[n].float() - w.float()).abs().max() for n, w in before.items()) > 1e-5


@pytest.mark.thorough
def test_given_negatives_and_every_task_reach_the_loss(run: Path, tree: Path) -> None:
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    given = [row for row in rows if "infonce_share_given" in row]
    assert {"1", "2"} <= {row["stage"] for row in given}, "webqa's"
    assert all(0 < row["infonce_share_given"] < 1 for row in given)
    figures = Run.open(run).read("2", "evaluation.json")["figures"]
    asked = [name for name in figures if name.endswith("_queries")]
    assert len(asked) == 8 and all(figures[f"{t}_reward"] for t in ("t2t", "it2it"))


@pytest.mark.thorough
def test_embed_evaluate_and_mine_take_it_from_there(
    run: Path, tree: Path, released: Callable[[str], Path], tmp_path: Path
) -> None:
    for pools in ("local", "global"):
        elva("embed", run, "--data", tree, "--output", tmp_path / pools, "--pools", pools)
        words = ("--embeddings", tmp_path / pools, "--data", tree, "--pools", pools, "--json")
        result = json.loads(elva("evaluate", *words, "--output", tmp_path / f"{pools}-figures"))
        assert len(result["sets"]) == 16 == sum(len(tasks) for *_, tasks in DATASETS.values())
        assert all(0 <= row[f"hit_at_{row['k']}"] <= 1 for row in result["sets"].values())
    assert result["sets"]["oven_task6"]["k"] == 5 and result["sets"]["fashioniq_task7"]["k"] == 10
    elva("embed", run, "--data", tree, "--split", "train", "--task", "t2t",
         "--output", tmp_path / "train")  # fmt: skip
    elva("mine", "--data", tree, "--embeddings", tmp_path / "train", "--task", "t2t",
         "--num-negatives", "5", "--num-random", "3", "--output", tmp_path / "mined")  # fmt: skip
    mined = [
        json.loads(line)
        for file in (tmp_path / "mined" / "query" / "train").iterdir()
        for line in file.read_text().splitlines()
    ]
    assert {len(row["neg_cand_list"]) for row in mined} == {8}
    elva("train", "--recipe", "elva-2b", "--model", released("untied"), "--data",
         tmp_path / "mined", "--stages", "3", "--from", run, "--output", tmp_path / "third",
         *(w for change in SHORT for w in ("--set", change)), "--set", "evaluate=false",
         "--set", "stages.3.negatives={given: 8, mined: 0, random: 0, in_batch: false}",
         "--limit", "1")  # fmt: skip
    first = stages(tmp_path / "third", "3")[0]
    assert first["reward_share_given"] == pytest.approx(1.0), (
        "what was mined is what it ranks against"
    )
