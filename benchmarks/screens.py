"""Pictures of pages for READMEs, in headless Chromium: `python -m benchmarks.screens PAGE ...`."""

import argparse
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from elva.commands.report import report
from elva.files import write_bytes
from elva.run import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SCREENS = Path(__file__).parent / "screens"
MOST_BYTES = 300_000
"""Ours: of a picture that a README loads."""

WIDTH, HEIGHT = 1040, 1700


def installed_chromium() -> str | None:
    """Where Chromium is."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser without a screen, with a user's directory of its own."""
    from playwright.sync_api import sync_playwright

    found = installed_chromium()
    if found is None:
        raise SystemExit("screens: Chromium must be installed; apt-get install chromium")
    quiet = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=quiet)
        yield browser
        browser.close()


def save(path: Path, picture: Image.Image) -> None:
    """Write a picture of at most `MOST_BYTES`, in 256 colours."""
    buffer = io.BytesIO()
    # The default's median cut merges the rare colours of curves.
    few = picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3)
    few.save(buffer, format="PNG", optimize=True)
    if len(buffer.getvalue()) > MOST_BYTES:
        raise SystemExit(f"screens: {path} must have {MOST_BYTES} bytes at most")
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, buffer.getvalue())
    print(f"{path}: {len(buffer.getvalue()):,} bytes")


def of_report(run: Path, path: Path) -> None:
    """A run's page from its top in light, and from its examples in dark, beside each other."""
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        page = report(Run.open(run), Path(scratch) / "report.html")
        sides = []
        for scheme, start in (("light", "h1"), ("dark", "h2:text('found for')")):
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            tab.goto(page.as_uri())
            top = tab.locator(start).first.bounding_box()
            shown = tab.screenshot(full_page=True)
            with Image.open(io.BytesIO(shown)) as whole:
                first = int(top["y"]) - 24 if top is not None else 0
                sides.append(whole.crop((0, first, WIDTH, first + HEIGHT)))
            tab.close()
    picture = Image.new("RGB", (2 * WIDTH, HEIGHT))
    for place, side in enumerate(sides):
        picture.paste(side, (place * WIDTH, 0))
    save(path, picture)


def main() -> None:
    """Take the pictures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    pages = parser.add_subparsers(dest="page", required=True)
    of = pages.add_parser("report", help="The page of a run.")
    of.add_argument("run", type=Path, help="A run directory of elva train.")
    of.add_argument("--output", type=Path, default=SCREENS / "report.png")
    asked = parser.parse_args()
    of_report(asked.run, asked.output)


if __name__ == "__main__":
    main()
