"""The laboratory of grain blindness: its arms, its statistics, its figures, a trial, its page."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.grains import __main__ as laboratory
from benchmarks.grains import arms, measure, page, statistics, trial
from benchmarks.grains.statistics import difference, hits, holm
from elva.errors import UserError
from elva.recipes import RECIPES
from elva.run import Run

ROOT = Path(__file__).parents[2]
APART = range(200)  # each query of an entity of its own


# -- arms ------------------------------------------------------------------------------------------


def test_arms_are_changes_of_the_recipes_last_stage() -> None:
    known, recipe = arms.arms(), RECIPES["emoji"]
    shipped = {"infonce": "infonce-tau-20", "soft-rank": "hard-soft-start", "grpo": "grpo-lr-5e-5"}
    assert known["hard"].stage == recipe.stages["3"]
    for name, stage in recipe.controls.items():
        assert known[shipped[name]].stage == replace(stage, steps=80), name
    for name, arm in known.items():
        of = arm.described.of
        if of is not None:
            assert arm.stage != known[of].stage or arm.described.draws, name
    assert known["hard-again"].stage == known["hard"].stage
    assert known["start"].stage is None
    assert known["grpo-20"].stage.steps == 20 * known["grpo"].stage.steps


def test_a_bad_arm_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text(
        "base: {infonce: 1.0, steps: 2}\narms:\n  one: {group: ours, what: x, stage: {steps: no}}\n"
    )
    with pytest.raises(UserError, match=r"arms.yaml:3: arms.one.stage.steps must be"):
        arms.arms(file)
    lost = tmp_path / "lost.yaml"
    lost.write_text(
        "base: {infonce: 1.0, steps: 2}\narms:\n  one: {group: ours, what: x, against: [two]}\n"
    )
    with pytest.raises(UserError, match=r"lost.yaml:3: arms.one.against.0 must be an arm of the"):
        arms.arms(lost)
    other = tmp_path / "other.yaml"
    other.write_text("base: {infonce: 1.0, steps: 2}\narms:\n  t-0.1: {group: ours, what: x}\n")
    with pytest.raises(UserError, match=r"other.yaml:2: arms must be a word of letters"):
        arms.arms(other)


# -- statistics ------------------------------------------------------------------------------------


def results(
    lift: float, noise: int, starts: int = 5, seeds: int = 3, spread: float = 0.0
) -> statistics.Results:
    """Ranks of 200 queries, of which a share is 1; `spread`: of starts and of seeds, each."""
    ease = np.random.default_rng(7).random(200)
    of_start = np.random.default_rng([noise, 1]).normal(0, spread, starts)
    of_seed = np.random.default_rng([noise, 2]).normal(0, spread, seeds)
    found = {}
    for pair in np.ndindex(starts, seeds):
        moved = np.random.default_rng([noise, 3, *pair]).normal(0, 0.1, 200)
        moved += lift + of_start[pair[0]] + of_seed[pair[1]]
        ranks = np.where(ease + moved > 0.5, 1, 9).tolist()
        found[pair] = {"ranks": {"t2i": ranks, "i2t": ranks}, "pairs": [0, *ranks[1:]]}
    return found


def test_a_difference_is_the_mean_of_pairs_with_an_interval() -> None:
    ours, theirs = results(0.1, 1), results(0.0, 2)
    found = difference(ours, theirs, "recall", APART)
    plain = np.mean([hits(ours[pair], "t2i") - hits(theirs[pair], "t2i") for pair in ours])
    assert found.mean == pytest.approx(plain) and found.pairs == 15
    assert 0 < found.low < found.mean < found.high and found.p < 0.001
    none = difference(results(0.0, 3), theirs, "recall", APART)
    assert none.low < 0 < none.high and none.p > 0.05
    fewer = {pair: ours[pair] for pair in ours if pair != (0, 2)}
    assert difference(fewer, theirs, "recall", APART).pairs == 10
    assert difference(ours, ours, "recall", APART) == (0.0, 0.0, 0.0, 1.0, 15)
    one = {pair: ours[pair] for pair in ours if pair[1] == 0}
    assert difference(one, theirs, "recall", APART).pairs == 5


def test_of_one_random_effect_it_is_students_test() -> None:
    """scipy.stats.ttest_1samp([0.1, 0.4, -0.2, 0.3], 0): p .33925, interval -.27100 to .57100."""

    def of(right: int) -> Any:
        return {"ranks": {"t2i": [*[1] * right, *[9] * (10 - right)]}}

    ours = {(start, 0): of(right) for start, right in enumerate((6, 9, 3, 8))}
    theirs = {pair: of(5) for pair in ours}
    found = difference(ours, theirs, "t2i", [0] * 10)  # one entity, one seed: starts alone differ
    assert found == pytest.approx((0.15, -0.27100, 0.57100, 0.33925, 4), abs=1e-5)


@pytest.mark.parametrize(
    ("spreads", "width"),  # of starts, seeds, queries, two of them, all
    [((0.02, 0, 0.1, 0.005, 0.15, 0, 0.3), 1.2),
     pytest.param((0, 0.01, 0.05, 0, 0.1, 0.05, 0.3), 1.3, marks=pytest.mark.thorough),
     pytest.param((0, 0, 0, 0, 0, 0, 0.4), 1.65, marks=pytest.mark.thorough)],
)  # fmt: skip
def test_an_interval_holds_the_truth_as_often_as_it_says_and_is_no_wider(
    spreads: tuple[float, ...], width: float,
) -> None:  # fmt: skip
    """Of tables drawn by the model itself: 95 % holds in 92 % or more of 300 (nearly sure), and the
    median interval is at most `width` times that of one who knows the variances."""
    shape, draw = (5, 6, 100), np.random.default_rng(1)
    axes = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    true = sum(s**2 / np.prod([shape[i] for i in a]) for a, s in zip(axes, spreads, strict=True))
    held, widths = 0, []
    for _ in range(300):
        table = sum(
            draw.normal(0, s, [n if i in a else 1 for i, n in enumerate(shape)])
            for a, s in zip(axes, spreads, strict=True)
        )
        low, high, _ = statistics.interval(table)
        held += low <= 0 <= high
        widths.append((high - low) / (2 * 1.96 * true**0.5))
    assert held >= 276 and np.median(widths) < width


def test_an_effect_of_the_seeds_order_widens_the_interval() -> None:
    """A seed's order moves all starts alike: five starts do not average it away."""
    theirs = results(0.0, 2)
    ours = {
        (start, seed): theirs[start, seed] if seed else results(0.2, 2)[start, seed]
        for start, seed in theirs
    }
    found = difference(ours, theirs, "t2i", APART)
    assert found.mean > 0.03 and found.low <= 0 and found.high > 2 * found.mean


def test_queries_of_one_entity_are_no_evidence_of_their_own() -> None:
    """Each asked ten times over, in an entity: as if it had been asked once."""
    ours, theirs = results(0.1, 1), results(0.0, 2)
    once = difference(ours, theirs, "t2i", APART)
    tenfold = [
        {pair: {"ranks": {"t2i": one["ranks"]["t2i"] * 10}} for pair, one in arm.items()}
        for arm in (ours, theirs)
    ]
    assert difference(*tenfold, "t2i", [*APART] * 10) == pytest.approx(once)
    more = difference(*tenfold, "t2i", range(2000))
    assert more.mean == pytest.approx(once.mean) and more.high < once.high


def test_rivals_that_a_query_lacks_are_not_counted() -> None:
    figures = {"ranks": {"t2i": [1, 7, 5], "i2t": [1, 1, 9]}, "pairs": [0, 1, 2]}
    assert hits(figures, "recall").tolist() == [1.0, 0.5, 0.0]
    assert hits(figures, "recall_5").tolist() == [1.0, 0.5, 0.5]
    np.testing.assert_array_equal(hits(figures, "own"), [np.nan, 1.0, 0.0])
    assert statistics.mean({(0, 0): figures}, "own") == 0.5


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


# -- figures ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(corpus: Path) -> measure.Corpus:
    return measure.Corpus.of(corpus)


def embedded(corpus: measure.Corpus, blind: str | None = None) -> dict[str, torch.Tensor]:
    """Rows that are the grains of what they show: one-hot values, without one type of grain."""
    pool = corpus.pools["t2i"]
    values = sorted({kind for grains in corpus.grains.values() for kind in grains.items()})
    place = {value: i for i, value in enumerate(values)}

    def row(grains: Any, *, without: Any = None) -> torch.Tensor:
        out = torch.full((len(values),), 1e-3)
        for kind, text in grains.items():
            if kind != blind and (kind, text) != without:
                out[place[kind, text]] = 1.0
        return out

    found = {"t2i": torch.stack([row(corpus.grains[pool[i].id]) for i in range(len(pool))])}
    found["i2t"] = found["t2i"][: len(corpus.pools["i2t"])]
    for name, split in corpus.splits.items():
        asked = [corpus.grains[q.positives[0]] for q in split.queries["t2i"]]
        found[f"{name}.t2i"] = torch.stack([row(grains) for grains in asked])
        found[f"{name}.i2t"] = found[f"{name}.t2i"][: len(split.queries["i2t"])]
        found[f"{name}.parts"] = torch.stack(
            [row(asked[i], without=(g.type, g.text)) for i, g, _ in split.parts]
        )
    return found


@pytest.mark.thorough
def test_who_sees_every_grain_has_them_far_apart_and_who_is_blind_has_not(drawn: Path) -> None:
    known = measure.Corpus.of(drawn)
    seen = measure.figures(embedded(known), known, "test")
    blind = measure.figures(embedded(known, blind="tone"), known, "test")
    assert seen["grains"]["distance"]["tone"] > 0.1 > 1e-6 > blind["grains"]["distance"]["tone"]
    assert seen["grains"]["lead"] > blind["grains"]["lead"]
    assert sum(hits(seen, "t2i")) > sum(hits(blind, "t2i"))
    assert seen["grains"]["probe"]["tone"] == 1.0
    assert blind["grains"]["probe"]["tone"] < 0.5
    assert 0 < seen["grains"]["within"] < seen["grains"]["across"]
    assert seen["grains"]["relative"] == pytest.approx(
        seen["grains"]["distance"]["all"] / seen["grains"]["across"]
    )


def test_the_entities_that_are_kept_are_those_of_the_corpus(drawn: Path) -> None:
    known = measure.Corpus.of(drawn)
    kept = json.loads(trial.ENTITIES.read_text(encoding="utf-8"))
    assert kept == {name: split.entity_numbers() for name, split in known.splits.items()}
    assert {name: max(kept[name]) + 1 for name in kept} == {"val": 65, "test": 122}


# -- a trial ---------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_trial_is_trained_measured_and_kept(
    finished: Path, corpus: Path, known: measure.Corpus, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    known = replace(known, splits=dict.fromkeys(("val", "test"), known.splits["test"]))
    described = arms.arms()["hard-soft"].described
    stage = replace(arms.arms()["hard-soft"].stage, data=str(corpus), steps=2, batch_size=8)
    made = {"hard-soft": arms.Arm("hard-soft", described, stage)}
    monkeypatch.setattr(trial, "arms", lambda: made)
    monkeypatch.setattr(trial, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(trial, "corpus_of", lambda recipe: known)
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "3").symlink_to(finished)
    one = trial.Trial(tmp_path, "hard-soft", 3, 1)
    assert not one.is_done
    one.run()
    assert one.is_done and not (tmp_path / "trials" / "hard-soft-3-1").exists()
    kept = one.read()
    assert (kept["start"], kept["seed"], kept["stage"]["steps"]) == (3, 1, 2)
    assert len(kept["val"]["ranks"]["t2i"]) == len(known.splits["val"].queries["t2i"])
    assert "test" not in kept
    one.measure("test")
    assert len(one.read()["test"]["pairs"]) == len(known.splits["test"].queries["t2i"])
    before = one.file.read_bytes()
    for split in ("val", "test"):
        one.measure(split)
    assert one.file.read_bytes() == before
    seconds, first = one.cost()
    assert seconds > 0 and 0 < first <= 1 and not (tmp_path / "trials" / "hard-soft-3-1").exists()
    assert one.file.read_bytes() == before
    made["hard-soft"] = replace(made["hard-soft"], stage=replace(stage, steps=3))
    assert not one.is_done
    made["hard-soft"] = replace(made["hard-soft"], stage=replace(stage, steps=1, pathwise=0.0))
    assert one.cost()[1] is None


def test_a_starts_curve_is_that_of_its_last_stage(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", RECIPES["smoke"])
    for stage, step, more in (("1", 2, {}), ("2", 3, {"loss": 1.0}), ("2", 4, {}), ("2", 8, {})):
        found = {f"eval_{d}_recall_at_1": step / 10 for d in ("t2i", "i2t")}
        run.log(stage, step, more or found)
    assert trial.curve(run) == {d: {"4": 0.4, "8": 0.8} for d in ("t2i", "i2t")}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--arms", "nope"], "must be names of benchmarks/grains/arms.yaml with commas between, "
                             "got 'nope'"),
        (["--arms", ""], "with commas between, got ''"),
        (["--starts", "9"], "must be of 0, 1, 2, 3, 4 with commas between, got '9'"),
        (["--seeds", "0"], "must be a whole number over 0, got '0'"),
        (["--jobs", "x"], "must be a whole number over 0, got 'x'"),
        (["--measure", "test", "--arms", "hard-tau-10"], "must be done, with its embeddings"),
        (["--costs", "--arms", "hard"], "start 0 must be trained under"),
        (["--costs", "--dry-run"], "not allowed with argument"),
    ],
)  # fmt: skip
def test_a_bad_option_is_said_in_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", ["grains", "--place", str(tmp_path), *words])
    with pytest.raises(SystemExit) as ended:
        laboratory.main()
    said = f"{ended.value.code}\n{capsys.readouterr().err}"
    assert line in said and not [*tmp_path.iterdir()]


# -- the page --------------------------------------------------------------------------------------


def test_the_readme_has_the_tables_of_the_files() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- grains (\w+) (\w+) -->\n(.*?)\n<!-- /grains -->", readme, re.S)
    assert len(shown) >= 3
    for made, split, table in shown:
        assert table == getattr(page, made)(split), (made, split)


def test_the_figures_of_the_words_are_those_of_the_tables() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"\n## Grain blindness\n.*?\n(?=## )", readme, re.S)
    tables = re.findall(r"<!-- grains \w+ \w+ -->.*?<!-- /grains -->", section, re.S)
    words = section
    for table in tables:
        words = words.replace(table, "")
    figure = re.compile(r"\b0\.\d{3}\b|\b\d\d\.\d%")
    said, known = (set(figure.findall(text)) for text in (words, "".join(tables)))
    assert len(said) > 5 and said <= known
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"[+-]0\.\d{3} \[.0\.\d{3}, .0\.\d{3}\]", front)
    compared = page.comparison_table("test")
    assert shown and all(interval in compared for interval in shown)
    (row,) = (line for line in compared.splitlines() if f"{shown[0]} |" in line)
    corrected = re.search(r"p is (0\.\d{3}) by Holm's correction for the (\d+) comp", front)
    assert corrected and row.split(" | ")[4] == corrected[1]
    assert len(compared.splitlines()) - 2 == int(corrected[2])


def test_arms_of_which_a_trial_is_missing_are_not_shown(tmp_path: Path) -> None:
    for name in ("start", "hard-tau-10", "hard-tau-20"):
        shutil.copytree(page.RESULTS / name, tmp_path / name)
    assert [*page.read("val", tmp_path)] == ["start", "hard-tau-10", "hard-tau-20"]
    next((tmp_path / "hard-tau-10").iterdir()).unlink()
    assert [*page.read("val", tmp_path)] == ["start", "hard-tau-20"]


def test_ranks_of_equal_values_are_their_mean() -> None:
    assert page.ranked([0.3, -9.0, 0.3, 5.0]).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_the_plot_is_drawn_from_the_files(tmp_path: Path) -> None:
    page.plot("val", tmp_path / "val.png")
    with Image.open(tmp_path / "val.png") as drawn:
        assert min(drawn.size) > 500 and len(drawn.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_every_file_is_of_an_arm_as_it_is_described() -> None:
    files = [*trial.RESULTS.glob("*/*.json")]
    for file in files:
        kept = json.loads(file.read_text(encoding="utf-8"))
        one = trial.Trial(Path(), kept["arm"], kept["start"], kept["seed"])
        assert one.file == file and one.is_done, file
