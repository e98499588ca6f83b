"""The report of a run, made from files alone: no model is trained or loaded here."""

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import reported
from elva.cli import app
from elva.commands.report import figures as figures_of
from elva.commands.report import report
from elva.data import Item
from elva.errors import RunError
from elva.recipe import Recipe, StageConfig
from elva.report import charts, drawing, figures, gallery, pictures
from elva.report.table import as_json, table
from elva.run import Run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reported.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Run:
    """Two stages and a control, finished and evaluated."""
    return reported.build(root, tmp_path)


@pytest.fixture(scope="module")
def page(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of such a run."""
    return report(reported.build(root, tmp_path_factory.mktemp("reported")))


def text(drawn: object) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(drawn)
    return console.export_text()


# -- figures ---------------------------------------------------------------------------------------


def test_rows_are_the_finished_stages_then_the_controls(run: Run) -> None:
    rows = figures.rows_of(run)
    assert [(r.title, r.role) for r in rows] == [
        ("stage 1", "before"), ("stage 2", "last"), ("control infonce", "control")
    ]  # fmt: skip
    (run.stage("2") / "stage.json").unlink()
    assert figures.row_with(figures.rows_of(run), "last").title == "stage 1"


def test_the_least_grain_is_over_types_with_enough_queries(run: Run) -> None:
    kind, distance = figures.rows_of(run)[1].least_grain
    assert kind == "tone" and distance == pytest.approx(0.2)  # size has one query only


def test_the_grain_that_is_read_worst(run: Run) -> None:
    assert figures.rows_of(run)[1].least_read == ("tone", pytest.approx(0.9))
    found = as_json(run)["rows"][1]
    assert (found["least_read_type"], found["least_read_accuracy"]) == ("tone", pytest.approx(0.9))


def test_json_and_table_hold_the_same_figures(run: Run) -> None:
    data = json.loads(json.dumps(as_json(run)))
    assert data["chance"] == pytest.approx(
        {f"{t}_recall_at_{k}": k / 6 for t in ("t2i", "i2t") for k in (1, 5)}
    )
    assert [r["figures"]["t2i_recall_at_1"] for r in data["rows"]] == pytest.approx(
        [2 / 6, 4 / 6, 0.5]
    )
    assert [r["kind"] for r in data["rows"]] == ["stage", "stage", "control"]
    drawn = text(table(run))
    assert re.search(r"stage 2 +0\.667 +0\.833 +0\.667 +0\.833 +0\.900 tone +4 +2", drawn)
    assert re.search(r"chance +0\.167 +0\.833", drawn)


def test_the_best_of_a_column_is_bold_in_every_row_that_has_it(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    line = {m[1]: m[0] for m in re.finditer(r"<th[^>]*>(stage \d|control \w+)</th>.*?</tr>", html)}
    assert "<b>0.667</b>" in html and "<b>1.000</b>" in html  # t->i R@1 of stage 2, R@5 of infonce
    assert len(line) == 3


# -- the page --------------------------------------------------------------------------------------


def test_the_page_is_one_file_and_every_text_is_escaped(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    shown = re.findall(r'src="data:image/webp;base64,([^"]*)"', html)
    assert len(shown) == html.count("<img") == html.count("src=") > 50
    for picture in set(shown):
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.size == (192, 144)
    assert [path.name for path in page.parent.iterdir() if path.suffix == ".png"] == []
    assert "red &lt;b&gt;square&lt;/b&gt;" in html and "<b>square" not in html
    assert "<script" not in html and "http://" not in html and "https://" not in html
    assert "summary of 7:50 &amp; more" in html
    assert not list(page.parent.rglob("*.partial"))


def test_the_page_says_what_was_measured(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert "was trained for 8 steps, in stage 1 (4 steps) and stage 2 (4 steps)" in html
    assert "After stage 2 (4 steps) its t→i R@1 on held-out queries is 0.667 (0.333 to 1" in html
    assert "after stage 1 it was 0.333, a difference of +0.333 (-0.333 to +0.833), too " in html
    assert "the best control, infonce (4 steps), has 0.500, a difference of +0.167 (" in html
    assert "Steps: 4 in stage 2 and 4 in control infonce." in html
    assert "the ten hardest negatives get 100% of InfoNCE&#39;s push (T = 0.05)" in html
    assert "of the latter 25% pulls negatives nearer" in html
    assert "50% + 25% of the variance" in html and html.count("<svg") == 12
    assert "of 6 queries the right answer rises in 3, falls in 1 and stays in 2" in html
    assert "3 win the first place, 1 lose it" in html
    assert "6 queries t→i against 6 candidates" in html
    assert "won by stage 2: 3, lost by stage 2: 1, both right: 1, both wrong: 1" in html


def test_the_right_answer_is_framed_once_for_each_side_that_shows_it(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    cards = re.findall(r"<article.*?</article>", html, flags=re.S)
    assert len(cards) == 6 + gallery.SHOWN["i2t"]
    for card in cards:
        ranks = [int(r) for r in re.findall(r"right answer at rank (\d)", card)]
        assert card.count('class="hit"') == sum(rank <= 5 for rank in ranks)


def test_openmoji_is_credited() -> None:
    assert pictures.attribution(["7:1"]) is None
    assert "OpenMoji" in pictures.attribution(["7:1", "10:4"])


# -- several runs ----------------------------------------------------------------------------------


def test_runs_are_compared_on_the_queries_of_both(root: Path, tmp_path: Path) -> None:
    one, two = (reported.build(root, tmp_path / name, seed=i) for i, name in enumerate("ab"))
    found = two.read("2", "evaluation.json")
    for sample, rank in zip(found["samples"]["t2i"], [1, 1, 1, 1, 1, 6], strict=True):
        sample["rank"] = rank
    found["samples"]["t2i"][5]["positives"] = ["7:0"]  # another question under the same id
    found["figures"]["t2i_recall_at_1"] = 5 / 6
    two.write("2", "evaluation.json", found)
    done = invoke("report", one.directory, two.directory, "--output", tmp_path / "x.html", "--json")
    said = json.loads(done.stdout)
    (apart, _) = said["differences"]
    assert (apart["ours"], apart["theirs"]) == ("b/run: stage 2", "a/run: stage 2")
    assert (apart["mean"], apart["queries"], apart["steps"]) == (pytest.approx(0.2), 5, [4, 4])
    assert said["recipe_differences"] == {"seed": [0, 1]}
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "2 runs: a/run, b/run" in html and "Seeds: a/run 0, b/run 1." in html
    assert (
        "b/run: stage 2 (4 steps) has t→i R@1 0.833, +0.200 (+0.000 to +0.600), too small" in html
    )
    assert re.search(r'<th scope="row">seed</th><td>0</td><td>1</td>', html)
    rows = re.findall(r'<tr><th scope="row">(\w/run: [\w ]+)</th><td>4<', html)
    arms = ["stage 2", "control infonce"]
    assert rows == [f"{name}/run: {arm}" for name in "ab" for arm in arms]
    assert not (one.directory / "report.html").exists()


def test_what_cannot_be_reported_is_one_line(run: Run, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run.directory)
    for words, rule in (
        ((run.directory, link), "report: runs must differ, got"),
        ((run.directory, "--output", tmp_path / "x.pdf"), "--output: must end in .html, got"),
        ((run.directory, "--output", tmp_path), "--output: must end in .html, got"),
        ((run.directory, tmp_path), "must hold a run, got no recipe.yaml"),
    ):
        done = invoke("report", *words)
        assert done.exit_code == 2 and rule in done.stderr and done.stderr.count("\n") == 1


def test_json_has_the_intervals_of_the_page(run: Run) -> None:
    said = json.loads(invoke("report", run.directory, "--json").stdout)
    html = Path(said["page"]).read_text(encoding="utf-8")
    found = said["intervals"]["stage 2"]["t2i_recall_at_1"]
    assert found["mean"] == pytest.approx(4 / 6) and found["queries"] == 6
    assert f"<small>{found['low']:.3f} to {found['high']:.3f}</small>" in html
    assert {d["theirs"] for d in said["differences"]} == {"stage 1", "control infonce"}


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


# -- half a run ------------------------------------------------------------------------------------


def test_a_run_without_a_finished_stage_has_a_report(root: Path, tmp_path: Path) -> None:
    stages = {"1": StageConfig(data=str(root), steps=4)}
    run = Run.create(tmp_path / "run", Recipe("tiny", stages=stages))
    html = report(run).read_text(encoding="utf-8")
    assert "no stage is finished yet" in html and "<img" not in html
    assert "<svg" not in html
    assert as_json(run)["rows"] == [] and "stage" not in text(table(run))


def test_missing_files_and_nulls_leave_gaps_not_errors(run: Run) -> None:
    (run.stage("infonce") / "evaluation.json").unlink()
    found = run.read("2", "evaluation.json")
    found["figures"]["t2i_recall_at_1"] = None
    found["grain_distances"]["tone"] = [None] * 10
    run.write("2", "evaluation.json", {"figures": found["figures"]})
    run.metrics_file.write_text('{"stage": "1", "step": 1, "lm": null}\n{"stage": "2", "st')
    (run.directory / "run.json").unlink()
    html = report(run).read_text(encoding="utf-8")
    assert "How training went" not in html and "It has not been evaluated yet." in html
    assert re.search(r'<th scope="row">control infonce</th><td>4</td><td>-</td>', html)


def test_data_that_is_gone_is_said_not_raised(run: Run) -> None:
    stages = {n: StageConfig(data="gone", steps=4) for n in ("1", "2")}
    html = report(Run(run.directory, Recipe("tiny", stages=stages))).read_text(encoding="utf-8")
    assert "No examples are shown. gone: must be a directory" in html


def test_pictures_of_other_data_are_not_shown_beside_these_words(run: Run) -> None:
    found = run.read("2", "evaluation.json")
    found["samples"]["t2i"][3]["query"] = "another corpus"
    run.write("2", "evaluation.json", found)
    html = report(run).read_text(encoding="utf-8")
    assert "must be the data that stage 2 was evaluated on, got another query 7:53" in html
    assert "<article" not in html


def test_a_damaged_evaluation_is_one_line(run: Run) -> None:
    (run.stage("1") / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match=r"evaluation\.json: must be JSON, .*; elva evaluate"):
        report(run)


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("stage-2/evaluation.json", lambda e: e["samples"]["t2i"][0].pop("rank"),
         r"evaluation\.json: samples\.t2i\[0\] must have 'rank', got none; .*: elva evaluate"),
        ("stage-2/evaluation.json", lambda e: e["samples"].update(t2i="old"), "t2i must be a list"),
        ("stage-2/evaluation.json", lambda e: e["figures"].update(t2i_recall_at_1="1"),
         r"figures\.t2i_recall_at_1 must be a number or null, got '1'"),
        ("stage-2/evaluation.json", lambda e: e.update(plane={"points": []}), "have 'explained'"),
        ("stage-2/evaluation.json", lambda e: e.update(pushes={"infonce": []}), "must have 'task'"),
        ("stage-2/stage.json", lambda e: e.update(steps=[3]), r"steps must be .*, got \[3\]"),
        ("run.json", lambda e: e.update(machine="fast"), "machine must be an object, got 'fast'"),
    ],
)  # fmt: skip
def test_a_file_of_another_layout_is_one_line(run: Run, file: str, change: Any, line: str) -> None:
    path = run.directory / file
    found = json.loads(path.read_text("utf-8"))
    change(found)
    path.write_text(json.dumps(found), "utf-8")
    with pytest.raises(RunError, match=line) as caught:
        report(run)
    assert "\n" not in str(caught.value)
    path.write_text("[1]", "utf-8")
    with pytest.raises(RunError, match=r"it must be an object, got \[1\]"):
        report(run)


def test_what_is_no_number_is_not_drawn_and_names_are_no_formulas(run: Run) -> None:
    """Lines of metrics that are none are left out; a grain type may have any name."""
    found = run.read("2", "evaluation.json")
    found["grain_distances"]["$\\foo$ <i>"] = [0.25] * 12
    found["figures"]["t2i_recall_at_5"] = float("nan")
    run.write("2", "evaluation.json", found)
    with run.metrics_file.open("ab") as file:
        file.write(b'[]\n5\n"x"\n\xff\xfe\n{"stage": ["2"], "step": 1, "lm": 1}\n{"step": 1}\n')
        file.write(b'{"stage": "2", "step": 9, "lm": "high", "loss": NaN}\n')
    assert run.metrics()[-1] == {"stage": "2", "step": 9, "loss": None}
    html = report(run).read_text(encoding="utf-8")
    assert "$\\foo$ &lt;i&gt;" in html and "<i>" not in html and ">nan<" not in html
    json.dumps(figures_of([run]), allow_nan=False)


def test_a_second_report_has_the_same_bytes(page: Path) -> None:
    before = {str(p): p.read_bytes() for p in page.parent.rglob("*") if p.is_file()}
    report(Run.open(page.parent))
    assert {str(p): p.read_bytes() for p in page.parent.rglob("*") if p.is_file()} == before


# -- parts -----------------------------------------------------------------------------------------


def test_choose_takes_equal_numbers_and_fills_up() -> None:
    outcomes = {f"7:{i}": ("won by x" if i < 2 else "both right") for i in range(40)}
    chosen = gallery.choose(outcomes, 8)
    assert list(chosen.values()) == ["won by x"] * 2 + ["both right"] * 6
    assert chosen == gallery.choose(dict(reversed(outcomes.items())), 8)
    assert gallery.choose({}, 8) == {}


def test_smoothing_is_a_mean_that_leaves_out_what_is_missing() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    assert charts.smoothed(values) == pytest.approx([1.0, 2.0, 4.0, 4.0])
    assert charts.smoothed(np.full(200, 2.5)) == pytest.approx(np.full(200, 2.5))


def test_a_chart_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(ranks: list[int]) -> bytes:
        drawn = charts.rank_chart(9, {drawing.Series("stage 1", "last"): ranks})
        drawing.write_png(tmp_path / "ranks.png", drawn)
        return (tmp_path / "ranks.png").read_bytes()

    before = draw([1, 2])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        draw([9, 9])
    assert (tmp_path / "ranks.png").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_sheet_draws_any_text_and_no_more_than_its_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "SHEET_TILES", 7)
    picture = pictures.small(Item("7:0", None, Image.new("RGB", (900, 900)), "image"))
    tiles = [(picture, "1", "$\\bad{ 你好 " + "x" * 90)] * (pictures.SHEET_TILES + 5)
    pictures.sheet(tmp_path / "a.png", "$x$ _ " + "w" * 500, tiles, "credit")
    pictures.sheet(tmp_path / "b.png", "", [], None)
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 2 * pictures.SHEET_COLUMNS * drawing.DOTS_PER_INCH
        assert image.height == (2 * 2.6 + 1) * drawing.DOTS_PER_INCH  # two rows hold seven
