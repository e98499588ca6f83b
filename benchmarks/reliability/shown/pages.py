"""What makes pages, and what may become of a text there: text."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import torch

from benchmarks import reported
from elva.commands.report import report
from elva.demo import view
from elva.demo.desk import Asked, Move, Moved
from elva.demo.switches import Switches
from elva.mrbench.review import PAGE, write_review
from elva.search import Answer, Hit

Page = Callable[[str, Path], str]


class Skeleton(HTMLParser):
    """A page's tags with the names of their attributes, and apart from them its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("!--",))

    def handle_data(self, data: str) -> None:
        self.text += data


def demo(text: str, place: Path) -> str:
    """All that the page of `elva demo` shows."""
    hits = [Hit(1, text, text, 0.5, text, None), Hit(2, "b", "b", 0.4, text, None)]
    answer = Answer(hits, text, torch.ones(1, 2))
    asked = Asked(None, False, Switches(text, (), "words"), answer)
    now = Moved(text, answer, [Move(hits[0], hits[1]), Move(hits[1], None)], 0.1)
    return "".join([
        view.title(text), view.own(1, [text]), view.found(asked, 2), view.moved(asked, now, [], 2)
    ])  # fmt: skip


def review(text: str, place: Path) -> str:
    """The review of `elva mrbench`; data holds no halves of surrogate pairs, as JSON is read."""
    text = re.sub("[\ud800-\udfff]", "", text)
    grain = text.replace(";", ",")  # it ends one, and another has tags of its own
    write_review(place, [["", f"9:{text}", text, text, grain, text]])
    return (place / PAGE).read_text(encoding="utf-8")


def reports(text: str, place: Path) -> str:
    """The page of a run, of which every free text is this one."""
    text = re.sub("[\ud800-\udfff]", "", text)
    # A file of data has lines: `strict` reads a line's end as its end.
    root = reported.write_data(place / "data", first=" ".join(text.split()))
    run = reported.build(root, place, called=text)
    found = run.read("2", "evaluation.json")
    for sample in found["samples"]["t2i"]:
        sample["summary"] = text
    found["figures"]["grain_reading"] = {text: {"accuracy": 0.1, "chance": 0.2, "asked": 12}}
    run.write("2", "evaluation.json", found)
    return report(run).read_text(encoding="utf-8")


@lru_cache(maxsize=8)
def harmless(page: Page) -> tuple[tuple[str, ...], ...]:
    """The tags of the same page about a harmless text."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        return tuple(Skeleton(page("a dog", Path(place))).tags)


def stays_text(page: Page) -> Callable[[str, str, Path], None]:
    """A page about a text has the tags of one about another, and the text in what is read."""

    def show(text: str, marker: str, place: Path) -> None:
        made = Skeleton(page(text, place))
        assert tuple(made.tags) == harmless(page), "it became HTML"
        assert marker in made.text, "it is lost"

    return show


PAGES: dict[str, tuple[int, Callable[[str, str, Path], None]]] = {
    "demo": (1, stays_text(demo)),
    "review": (1, stays_text(review)),
    "report": (50, stays_text(reports)),
}
"""A page -> how many texts come to one that it is made of, and what makes it."""
