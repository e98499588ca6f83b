"""The pages of runs in a browser: they open from a file, fetch nothing, and fit their screen."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from benchmarks import reported
from elva.commands.report import report
from elva.recipe import Recipe
from elva.run import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FORGED = "<script>document.title = 'forged'</script><img src=x onerror=\"document.title='forged'\">"


class Pages(NamedTuple):
    """The page of a run, and one that compares it with another."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Of runs whose every free text is a forged one."""
    parent = tmp_path_factory.mktemp("forged")
    root = reported.write_data(parent / "data", first=FORGED)
    runs = []
    for seed in (0, 1):
        run = reported.build(root, parent / f"<i>{seed}", called=FORGED, seed=seed)
        found = run.read("2", "evaluation.json")
        for sample in found["samples"]["t2i"]:
            sample["summary"] = FORGED
        found["plane"]["points"] = [p | {"grains": {FORGED: FORGED[i // 3 :]}}
                                    for i, p in enumerate(found["plane"]["points"])]  # fmt: skip
        found["grain_distances"][FORGED] = [0.1] * 12
        worst = {"accuracy": 0.1, "chance": 0.2, "asked": 12}
        found["figures"]["grain_reading"] = {FORGED: worst}
        run.write("2", "evaluation.json", found)
        runs.append(run)
    return Pages(report(runs[0]), report(runs, parent / "two.html"))


@pytest.fixture
def opened(browser: "Browser") -> Iterator[Callable[..., "Page"]]:
    """Opens a page as a person would, and holds that it said nothing and asked for nothing else."""
    contexts, said, asked = [], [], []

    def open_page(path: Path, width: int = 1280, **options: str) -> "Page":
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("which", Pages._fields)
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_fits_its_screen_and_shows_every_picture(
    pages: Pages, opened: Callable[..., "Page"], which: str, width: int
) -> None:
    page = opened(getattr(pages, which), width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    shown = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert all(shown) and len(shown) == (0 if which == "two" else page.locator("img").count())
    boxes = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.clientWidth)")
    assert len(boxes) >= 4 and min(boxes) > 250


@pytest.mark.parametrize("which", Pages._fields)
def test_what_a_run_says_stays_text(
    pages: Pages, opened: Callable[..., "Page"], which: str
) -> None:
    page = opened(getattr(pages, which))
    assert page.title() != "forged" and page.locator("script").count() == 0
    assert FORGED in page.inner_text("body")
    assert page.locator("i:not([aria-hidden])").count() == 0


def test_colours_follow_the_scheme_and_paper_is_light(
    pages: Pages, opened: Callable[..., "Page"]
) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    curve = "getComputedStyle(document.documentElement).getPropertyValue('--chart-last').trim()"
    light, dark = opened(pages.one, color_scheme="light"), opened(pages.one, color_scheme="dark")
    assert light.evaluate(paper) == "rgb(255, 255, 255)" and light.evaluate(curve) == "#0072b2"
    assert dark.evaluate(paper) == "rgb(22, 26, 31)" and dark.evaluate(curve) == "#56b4e9"
    dark.emulate_media(media="print")
    assert dark.evaluate(paper) == "rgb(255, 255, 255)" and dark.evaluate(curve) == "#0072b2"


@pytest.mark.parametrize("which", Pages._fields)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_can_be_read_by_everybody(
    pages: Pages, opened: Callable[..., "Page"], which: str, scheme: str
) -> None:
    page = opened(getattr(pages, which), color_scheme=scheme)
    assert page.get_attribute("html", "lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert page.evaluate("[...document.images].every(i => i.alt)")
    named = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.ariaLabel)")
    assert all(named) and len(set(named)) == len(named)
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.caption.innerText)")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)
    for element in ("body", ".note", "td small, tr.muted td", "caption"):
        assert contrast(page, element) >= 4.5, element


def contrast(page: "Page", element: str) -> float:
    """WCAG's, of an element's text on the page."""
    colour = f"getComputedStyle(document.querySelector({element!r})).color"
    ink, paper = (
        [int(part) for part in page.evaluate(one)[4:-1].split(",")]
        for one in (colour, "getComputedStyle(document.body).backgroundColor")
    )

    def luminance(rgb: list[int]) -> float:
        parts = [c / 255 for c in rgb]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted([luminance(ink), luminance(paper)])
    return (high + 0.05) / (low + 0.05)


def test_a_run_that_has_nothing_yet_has_a_page_that_opens(
    opened: Callable[..., "Page"], tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", Recipe("tiny", stages={}))
    page = opened(report(run), 360)
    assert "no stage is finished yet" in page.inner_text(".lead")
