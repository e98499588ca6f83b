"""Screenshots of `elva demo` over a trained run: `python -m benchmarks.screens_demo RUN`.

Writes benchmarks/screens/demo-search.png and demo-grains.png, in 256 colours. It needs Chromium, as
Debian packages it, and playwright.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from elva.commands.demo import serving
from elva.demo.switches import known_grains
from elva.run import Run
from elva.searched import data_of, open_searched

SCREENS = Path(__file__).parent / "screens"
QUERY, OFF = "woman firefighter: medium-dark skin tone", "medium-dark skin tone"
MOST_BYTES = 300_000


def screens(directory: Path) -> list[Path]:
    """The files written, each under `MOST_BYTES`."""
    run = Run.open(directory)
    searched = open_searched(run)
    data = data_of(run)
    heading = f"{len(searched.index):,} test pictures of {directory.name}"
    with (
        serving(searched, known_grains(data), heading, k=8) as url,
        sync_playwright() as playwright,
    ):
        chromium = shutil.which("chromium") or "chromium"
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(url)
        page.fill("#words textarea", QUERY)
        page.press("#words textarea", "Enter")
        page.wait_for_selector("#found li")
        first = _shot(page, SCREENS / "demo-search.png")
        page.locator("#grains label", has_text=OFF).locator("input").click()
        page.wait_for_selector("#found table")
        second = _shot(page, SCREENS / "demo-grains.png")
        browser.close()
    return [first, second]


def _shot(page: Page, path: Path) -> Path:
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)  # for what fades
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    path.parent.mkdir(exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: must have at most {MOST_BYTES:,} bytes, got {size:,}")
    return path


if __name__ == "__main__":
    for written in screens(Path(sys.argv[1])):
        print(f"{written}  {written.stat().st_size:,} bytes")
