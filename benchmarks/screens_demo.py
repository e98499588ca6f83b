"""Pictures of `elva demo` over a trained run: `python -m benchmarks.screens_demo RUN`.

Writes benchmarks/screens/demo-search.png and demo-grains.png: a query, and the same with a grain
off.
"""

import argparse
import io
from pathlib import Path

from PIL import Image

from benchmarks.screens import SCREENS, chromium, save
from elva.collection import data_of, open_collection
from elva.commands.demo import serving
from elva.demo.switches import known_grains
from elva.errors import counted
from elva.run import Run

QUERY, OFF = "woman astronaut: medium-dark skin tone", "medium-dark skin tone"
"""A held-out query of the emoji."""

ANSWERS = 8
SIZE = {"width": 1200, "height": 800}


def of_demo(run: Run) -> None:
    """A run's page after a query, and with a grain of it off."""
    collection = open_collection(run)
    pictures, stage = counted(len(collection.index), "test picture"), run.title(run.answering())
    heading = f"{pictures} of {run.directory.name}, {stage}"
    known = known_grains(data_of(run))
    with serving(collection, known, heading, k=ANSWERS) as url, chromium() as browser:
        page = browser.new_page(viewport=SIZE)
        page.goto(url)
        page.fill("#words textarea", QUERY)
        page.press("#words textarea", "Enter")
        for name, waited_for in (("search", "#found li"), ("grains", "#found table")):
            page.wait_for_selector(waited_for)
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # for what fades
            shot = page.screenshot(full_page=True)
            save(SCREENS / f"demo-{name}.png", Image.open(io.BytesIO(shot)))
            if name == "search":
                page.locator("#grains label", has_text=OFF).locator("input").click()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    of_demo(Run.open(parser.parse_args().run))
