"""`elva demo` in headless Chromium, asked as a visitor asks and as an attacker does.

No model learns to tell emoji apart in a test's time. `Reader` knows them: a text by its words, a
picture by the name of what it shows. What the page says is compared with plain cosines of its rows.
A trained run is asked in `test_a_trained_run_is_shown_as_it_is_searched`.
"""

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from elva.cli import app
from elva.collection import Collection
from elva.commands import demo as command
from elva.commands.demo import Server, serving
from elva.data import Item, load
from elva.data.schema import Grain, mask_grains
from elva.demo import desk, page
from elva.demo.switches import known_grains, switches
from elva.index import Index
from elva.model.identity import Identity
from elva.model.modalities import MODALITIES
from elva.model.rollout import Encoded
from elva.report.pictures import names as names_of
from elva.search import Searcher
from tests.elva import sentence_models

gradio = pytest.importorskip("gradio", reason="no gradio: pip install 'elva[demo]'")
httpx = pytest.importorskip("httpx")

FORGED = "<img src=x onerror=\"document.title='owned'\"> ${document.title='owned'} {{value}}"
QUERY = "index pointing up: dark skin tone"
ENTER = "#words textarea"
DROP = 4
"""The number of the event by which pictures are dropped: as the page wires them."""


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w-]+", text.casefold())


class Reader:
    """An `Encoder`: texts are the sum of their words' vectors, pictures those of their names."""

    identity = Identity("reader of names", revision="1", preprocessing="words")
    about: ClassVar[dict[str, Any]] = {}
    embedding_size = 256
    modalities = frozenset(MODALITIES)
    instructions = "unread"

    def __init__(self, names: dict[bytes, str]) -> None:
        """`names`: by a picture's content."""
        self.names, self.gate = names, threading.Event()
        self.gate.set()

    def check(self, item: Item) -> None:
        item.load_image()

    def row(self, text: str) -> torch.Tensor:
        total = torch.zeros(self.embedding_size)
        for word in words_of(text):
            seed = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            total += torch.randn(self.embedding_size, generator=seed)
        return total

    def said(self, item: Item) -> str:
        if item.image is None:
            return item.text or ""
        content = Item(item.id, None, item.image, "image").content_hash()
        return f"{self.names.get(content, 'unknown')} {item.text or ''}"

    def __call__(self, items: Any, progress: Any = None) -> Encoded:
        assert self.gate.wait(30)
        said = [self.said(item) for item in items]
        return Encoded(torch.stack([self.row(text) for text in said]), [f"read {t}" for t in said])


class Emoji(NamedTuple):
    """An index of emoji and what is known of them."""

    collection: Collection
    known: dict[str, tuple[Grain, ...]]
    names: dict[str, str]
    files: dict[str, Path]

    def order(self, text: str) -> tuple[list[str], np.ndarray]:
        """Ids by cosine to a text, best first, and the cosines: plain numpy."""
        reader = self.collection.searcher.encoder
        ids = self.collection.index.table["id"].to_pylist()
        rows = np.stack([reader.row(self.names[id]).double().numpy() for id in ids])
        asked = reader.row(text).double().numpy()
        cosines = rows @ asked / np.linalg.norm(rows, axis=1) / np.linalg.norm(asked)
        best = np.argsort(-cosines, kind="stable")
        return [ids[at] for at in best], cosines[best]


@pytest.fixture(scope="module")
def emoji(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Emoji:
    """The corpus' pictures by name, and one whose name is an attack."""
    place = tmp_path_factory.mktemp("emoji")
    names = names_of(corpus)
    items = [item for item in load(corpus, split="test", tasks=["t2i"]).pool("t2i")
             if item.id in names]  # fmt: skip
    sentence_models.noise(0).save(place / "forged.png")
    items.append(Item("10:99999", None, place / "forged.png", "image"))
    names["10:99999"] = FORGED
    reader = Reader({item.content_hash(): names[item.id] for item in items})
    searcher = Searcher(reader)
    index = searcher.index(place / "emoji.index", items, dtype="float32", names=names)
    files = {item.id: item.image for item in items if isinstance(item.image, Path)}
    return Emoji(Collection(searcher, index), known_grains(corpus), names, files)


@pytest.fixture(scope="module")
def url(emoji: Emoji) -> Iterator[str]:
    with serving(emoji.collection, emoji.known, "emoji", examples=[QUERY]) as url:
        yield url.rstrip("/")


# -- without a browser -----------------------------------------------------------------------------


def join(url: str, data: list[Any], session: str = "one", fn: int = 0) -> Any:
    body = {"data": data, "fn_index": fn, "session_hash": session}
    return httpx.post(f"{url}/gradio_api/queue/join", json=body)


def upload(url: str, name: str, content: bytes) -> Any:
    files = {"files": (name, content, "image/png")}
    return httpx.post(f"{url}/gradio_api/upload", files=files, timeout=60)


def test_a_full_queue_turns_visitors_away_and_all_is_removed_at_the_end(emoji, monkeypatch):
    """Of five at once one is answered and two wait; the others get 503."""
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_SHARE", "true")
    before = set(Path(tempfile.gettempdir()).glob("elva-demo-*"))
    reader = emoji.collection.searcher.encoder
    with serving(emoji.collection, {}, "emoji", server=Server(limit=2)) as url:
        url = url.rstrip("/")
        assert url.startswith("http://127.0.0.1:")
        assert upload(url, "a.png", b"content").status_code == 200
        (mine,) = set(Path(tempfile.gettempdir()).glob("elva-demo-*")) - before
        assert [one.read_bytes() for one in mine.rglob("a.png")] == [b"content"]
        assert httpx.get(f"{url}/gradio_api/file=/etc/passwd").status_code == 403
        reader.gate.clear()
        try:
            codes = []
            for visitor in "abcde":
                codes.append(join(url, [None, "cat", None, "what is here"], visitor).status_code)
                time.sleep(0.3)  # for the first to be taken out of the queue
        finally:
            reader.gate.set()
    assert codes == [200, 200, 200, 503, 503]
    assert not mine.exists() and os.environ["GRADIO_SHARE"] == "true"


@pytest.mark.thorough
def test_a_visitors_pictures_go_when_they_were_not_asked_for(emoji, monkeypatch, tmp_path):
    """An hour, here a second, after they were last dropped or asked."""
    monkeypatch.setattr(page, "SESSION_SECONDS", 1)
    sentence_models.noise(1).save(tmp_path / "a.png")
    before = set(Path(tempfile.gettempdir()).glob("elva-demo-*"))
    with serving(emoji.collection, {}, "emoji") as url:
        (sent,) = upload(url.rstrip("/"), "a.png", (tmp_path / "a.png").read_bytes()).json()
        (mine,) = set(Path(tempfile.gettempdir()).glob("elva-demo-*")) - before
        named = {"path": sent, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        assert join(url.rstrip("/"), [None, [named]], fn=DROP).status_code == 200
        until(lambda: [*mine.glob("own-*/0000.png")])
        until(lambda: not [*mine.glob("own-*")])


def test_the_pictures_of_the_visitor_who_asked_longest_ago_go_first(emoji, monkeypatch, tmp_path):
    """Two visitors are kept. One upload, dropped 50 times, lies on the disk once."""
    monkeypatch.setattr(command, "MOST_VISITORS", 2)
    sentence_models.noise(1).save(tmp_path / "a.png")
    before = set(Path(tempfile.gettempdir()).glob("elva-demo-*"))
    with serving(emoji.collection, {}, "emoji") as url:
        url = url.rstrip("/")
        (sent,) = upload(url, "a.png", (tmp_path / "a.png").read_bytes()).json()
        (mine,) = set(Path(tempfile.gettempdir()).glob("elva-demo-*")) - before
        named = {"path": sent, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        assert join(url, [None, [named] * 50], "first", DROP).status_code == 200
        until(lambda: [*mine.glob("own-*/0049.png")])
        assert {file.stat().st_ino for file in mine.rglob("*.png")} == {Path(sent).stat().st_ino}
        for visitor in "abc":
            join(url, [None, "cat", None, "what is here"], visitor)
        until(lambda: gc.collect() >= 0 and not [*mine.glob("own-*")])


def test_uploads_that_break_off_or_come_from_another_page_leave_nothing(emoji, monkeypatch):
    """What is on its way counts as what is there: the second of 40 KB has no room beside the
    first; the smallest file counts 16 KiB."""
    monkeypatch.setattr(command, "MOST_KEPT", 60_000)
    head = (
        "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 40000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: "
        'form-data; name="files"; filename="torn.png"\r\n\r\nxxxx'
    )
    before = set(Path(tempfile.gettempdir()).glob("elva-demo-*"))
    with serving(emoji.collection, {}, "emoji") as url:
        url = url.rstrip("/")
        (mine,) = set(Path(tempfile.gettempdir()).glob("elva-demo-*")) - before
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as torn:
            torn.sendall(head.encode())
            until(lambda: [*(mine / "uploads").iterdir()])
            assert upload(url, "b.png", b"x" * 40_000).status_code == 413
        until(lambda: not [*(mine / "uploads").iterdir()])
        for origin, status in (("http://another.example", 403), ("null", 403), (url, 200)):
            found = httpx.post(
                f"{url}/gradio_api/upload", files={"files": ("a.png", b"x")},
                headers={"origin": origin},
            )  # fmt: skip
            assert found.status_code == status
        assert [upload(url, f"{i}.png", b"%d" % i).status_code for i in range(4)] == [
            200, 200, 200, 413,
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/gradio_api/file=/etc/passwd", 403),
        ("GET", "/gradio_api/file=%2fetc%2fpasswd", 403),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/", 403),
        ("GET", "/file=/etc/passwd", 404),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/", 404),
        ("GET", "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd", 403),
        ("GET", "/gradio_api/info", 404),
        ("GET", "/docs", 404),
        ("POST", "/gradio_api/run/ask", 404),
        ("POST", "/gradio_api/vibe-edit/", 404),
        ("DELETE", "/", 404),
    ],
)
def test_the_server_has_no_other_doors(url, method, path, status):
    """As bytes: httpx would shorten paths."""
    found = httpx.request(method, url + path, json={} if method == "POST" else None)
    assert found.status_code == status and "root:" not in found.text


def test_files_beside_the_uploads_and_links_out_of_them_are_not_served(url, emoji, tmp_path):
    (sent,) = upload(url, "a.png", b"content").json()
    assert httpx.get(f"{url}/gradio_api/file={sent}").content == b"content"
    link = Path(sent).with_name("link.png")
    link.symlink_to("/etc/passwd")
    beside = Path(sent).parents[2] / "own-secret.png"
    beside.write_bytes(b"content")
    for file in (link, beside, f"{sent}/../../../own-secret.png", next(iter(emoji.files.values()))):
        assert httpx.get(f"{url}/gradio_api/file={file}").status_code == 403
        named = {"path": str(file), "meta": {"_type": "gradio.FileData"}}
        assert join(url, [None, "cat", named, "what is here"]).status_code == 403


def test_requests_are_bounded_and_addressed_to_the_server(url):
    assert httpx.get(url, headers={"host": "rebound.example"}).status_code == 421
    assert join(url, [None, "x" * (1 << 20), None, ""]).status_code == 413
    large = upload(url, "a.png", b"x" * ((desk.MOST_MB << 20) + 1))
    assert large.status_code == 413 and "20971520" in large.text
    chunked = httpx.post(f"{url}/gradio_api/upload", content=iter([b"x"]))
    assert chunked.status_code == 411
    for address in ("http://127.0.0.1:1/a.png", "data:image/png;base64,AAAA"):
        named = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
        assert join(url, [None, "cat", named, ""]).status_code == 403


def test_a_page_is_served_as_text_of_nobody_elses(url):
    (sent,) = upload(url, "a.html", b"<script>alert(1)</script>").json()
    found = httpx.get(f"{url}/gradio_api/file={sent}")
    assert found.headers["content-disposition"].startswith("attachment")
    assert found.headers["content-type"] == "application/octet-stream"
    assert "default-src 'self'" in found.headers["content-security-policy"]


def test_grains_are_the_datas_else_by_rules_else_words(emoji):
    known = switches(QUERY, emoji.known)
    assert (known.source, known.names) == ("data", ["index", "pointing up", "dark skin tone"])
    assert known.without([1, 2]) == "Index." and known.without([0, 1, 2]) == ""
    ruled = switches("a sleeping cat  on a red sofa", emoji.known)
    assert (ruled.source, ruled.names) == ("rules", ["sleeping", "cat", "on", "red", "sofa"])
    assert [grain.type for grain in ruled.grains][:2] == ["action", "entity"]
    assert ruled.without([2, 3, 4]) == "A sleeping cat a."
    spelled = switches("chat noir chat blanc", {})
    assert spelled.source == "words" and spelled.names == ["Chat", "noir", "chat", "blanc"]
    assert switches("cat", {}).grains == () and switches("noir " * 30, {}).grains == ()


def test_several_grains_are_masked_at_once(emoji):
    """Of every known text, each pair: what is left are the other words, in their order."""
    pairs = 0
    for text, found in emoji.known.items():
        for one in found:
            for two in found[found.index(one) + 1 :]:
                rest = text
                for start, end in (two.span, one.span):
                    rest = f"{rest[:start]} {rest[end:]}"
                left = words_of(mask_grains(text, [one, two]))
                assert [w for w in left if w != "and"] == [w for w in words_of(rest) if w != "and"]
                pairs += 1
    assert pairs > 150


# -- in a browser ----------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A page, and what it asked for and complained of."""

    page: Any
    requests: list[str]
    faults: list[str]

    def ask(self, words: str) -> None:
        self.page.fill(ENTER, words)
        self.page.press(ENTER, "Enter")
        self.page.wait_for_function(
            "words => document.querySelector('#found .asked b')?.textContent == words",
            arg=words[0].upper() + words[1:] + ("" if words[-1] in ".?!" else "."),
        )

    def texts(self, selector: str) -> list[str]:
        return [one.strip() for one in self.page.locator(selector).all_text_contents()]

    def ids(self) -> list[str]:
        return [one.get_attribute("data-id") for one in self.page.locator("#found li").all()]

    def flip(self, name: str) -> None:
        self.page.locator("#grains label", has_text=f"{name} ·").locator("input").click()


@pytest.fixture
def shown(url: str, browser: Any) -> Iterator[Shown]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    seen = Shown(tab, [], [])
    tab.on("request", lambda request: seen.requests.append(request.url))
    tab.on("pageerror", lambda error: seen.faults.append(str(error)))
    tab.on("console", lambda said: said.type == "error" and seen.faults.append(said.text))
    tab.goto(url)
    tab.wait_for_selector(ENTER)
    yield seen
    context.close()
    hosts = {one.split("/")[2] for one in seen.requests if one.startswith("http")}
    assert hosts == {url.removeprefix("http://")}
    assert seen.faults == []


def test_a_query_finds_the_right_emoji_first(shown, emoji):
    """Its twelve answers and scores are those of plain cosines; a pictures stands on each."""
    shown.ask(QUERY)
    order, cosines = emoji.order(QUERY)
    assert shown.texts("#found .name")[0] == QUERY and shown.ids() == order[:12]
    notes = shown.texts("#found li .note")
    assert [float(one.split(" ")[0]) for one in notes] == pytest.approx(cosines[:12], abs=6e-4)
    assert notes[0].endswith(f"read {QUERY}") or f"read {QUERY}" in notes[0]
    assert shown.texts("#found .asked q") == [f"read {QUERY[0].upper()}{QUERY[1:]}."]
    loaded = "pictures => pictures.map(one => one.naturalWidth)"
    widths = shown.page.eval_on_selector_all("#found li img", loaded)
    assert len(widths) == 12 and min(widths) > 0
    assert "OpenMoji" in shown.texts("#found .credit")[0]


def test_a_grain_that_is_off_moves_ranks_and_back(shown, emoji):
    shown.ask(QUERY)
    before = shown.ids()
    assert [one.split(" · ")[0] for one in shown.texts("#grains label span")] == [
        "index", "pointing up", "dark skin tone",
    ]  # fmt: skip
    shown.flip("dark skin tone")
    shown.page.wait_for_selector("#found table")
    order, _ = emoji.order("index pointing up")
    assert shown.texts("#found .asked b") == ["Index pointing up."] and shown.ids() == order[:12]
    rows = [row.split() for row in shown.texts("#found tbody tr td:nth-child(2)")]
    assert [int(row[0]) for row in rows] == [*range(1, 13)]
    now = [order.index(id) + 1 for id in before]
    assert [int(one) for one in shown.texts("#found tbody td:nth-child(3)")] == now
    arrows = [f"▲ {was - at}" if at < was else f"▼ {at - was}" if at > was else "="
              for was, at in enumerate(now, start=1)]  # fmt: skip
    assert shown.texts("#found tbody td.arrow") == arrows and len(set(arrows)) > 3
    whole, part = (emoji.collection.searcher.encoder.row(text) for text in
                   (QUERY, "index pointing up"))  # fmt: skip
    apart = 1 - torch.nn.functional.cosine_similarity(whole, part, dim=0).item()
    assert f"moved by {apart:.3f}" in " ".join(shown.texts("#found > * .note"))
    shown.flip("dark skin tone")
    shown.page.wait_for_selector("#found table", state="detached")
    assert shown.ids() == before
    for name in ("index", "pointing up", "dark skin tone"):
        shown.flip(name)
    shown.page.get_by_text("a grain must be left on").wait_for()


@pytest.mark.thorough
def test_dropped_pictures_are_searched_under_their_own_names(shown, emoji, tmp_path):
    """Two pictures and a text; what is found is the visitor's own."""
    by_name = {name: id for id, name in emoji.names.items()}
    for name, file in (("watch", "my watch.png"), ("copyright", "mark.png")):
        shutil.copy(emoji.files[by_name[name]], tmp_path / file)
    (tmp_path / "<b id=forged>notes.png").write_text("no picture")
    shown.page.get_by_text("Your own pictures").first.click()
    shown.page.locator("#files input[type=file]").set_input_files([*tmp_path.glob("*.png")])
    shown.page.wait_for_selector("#where")
    (kept,) = shown.texts("#kept .note")
    assert "2 of your own" in kept and "b id=forged" in kept and "it is a text" in kept
    assert shown.page.locator("#forged").count() == 0
    shown.ask("watch")
    assert shown.texts("#found .name") == ["my watch.png", "mark.png"]
    assert shown.texts("#found li .note")[0].startswith("1.000")
    shown.page.locator("#where label").first.click()
    shown.page.wait_for_function("document.querySelectorAll('#found li').length == 12")
    assert shown.texts("#found .name")[0] == "watch"


@pytest.mark.thorough
def test_a_picture_alone_and_with_words_is_a_query(shown, emoji):
    by_name = {name: id for id, name in emoji.names.items()}
    watch = by_name["watch"]
    shown.page.locator("#image input[type=file]").set_input_files(emoji.files[watch])
    shown.page.wait_for_selector("#image img")
    shown.page.locator("#search").click()
    shown.page.wait_for_selector("#found .asked img")
    assert shown.ids()[0] == watch and shown.texts("#found li .note")[0].startswith("1.000")
    shown.ask("copyright")
    assert set(shown.ids()[:2]) == {watch, by_name["copyright"]}


def test_captions_and_errors_are_never_html(shown, tmp_path):
    shown.ask("owned")
    assert shown.texts("#found .name")[0] == FORGED
    forged = tmp_path / "<img src=x onerror=alert(1)>.png"
    forged.write_text("no picture")
    shown.page.locator("#image input[type=file]").set_input_files(forged)
    shown.page.locator("#search").click()
    shown.page.get_by_text("must be a picture that is read").wait_for()
    assert shown.page.title() == "ELVA" and shown.page.locator("img[src=x]").count() == 0
    shown.faults.clear()  # a picture that is none does not show


def test_the_page_asks_no_other_host_and_fits_a_phone(shown):
    shown.page.evaluate(
        "() => { window.refused = []; document.addEventListener('securitypolicyviolation',"
        " event => window.refused.push(event.blockedURI)) }"
    )
    shown.page.evaluate("() => fetch('http://127.0.0.2:9/x').catch(() => null)")
    shown.page.wait_for_function("window.refused.length == 1")
    shown.requests[:] = [one for one in shown.requests if "127.0.0.2" not in one]
    shown.faults.clear()
    shown.page.set_viewport_size({"width": 360, "height": 800})
    shown.ask(QUERY)
    shown.flip("index")
    shown.page.wait_for_selector("#found table")
    assert shown.page.evaluate("document.documentElement.scrollWidth") == 360


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two pictures by a small CLIP."""
    place = tmp_path_factory.mktemp("small")
    model = sentence_models.clip(place / "clip")
    for seed, name in enumerate(("a.png", "b.png")):
        sentence_models.noise(seed).save(place / name)
    items = [Item(name, None, place / name, "image") for name in ("a.png", "b.png")]
    Searcher(model).index(place / "small.index", items)
    return place / "small.index"


def refused(*words: object) -> str:
    done = CliRunner().invoke(app, ["demo", *map(str, words)])
    assert done.exit_code == 2, done.output
    return done.output


def test_what_cannot_be_served_is_one_line(small, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port must be free, got {port}" in refused(small, "--port", port)
    assert "--port must be 1 to 65535, got 0" in refused(small, "--port", 0)
    assert "-k must be 1 to 100, got 0" in refused(small, "-k", 0)
    assert "--limit must be at least 1, got 0" in refused(small, "--limit", 0)
    assert "--data must hold grains.jsonl" in refused(small, "--data", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "got none and no trained run in runs/" in refused()
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "pip install 'elva[demo]'" in refused(small)


def test_another_host_is_said_and_reached_by_any_name(small, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(command, "_until_told", lambda: None)

    class Listener(command.SILENT.__class__):
        def say(self, line: str) -> None:
            lines.append(line)

    def ready(url: str) -> None:
        port = url.rstrip("/").rpartition(":")[2]
        answer = httpx.get(f"http://127.0.0.1:{port}", headers={"host": "any.example"})
        lines.append(str(answer.status_code))

    command.demo(Index(small), server=Server(host="0.0.0.0"), ready=ready, reporter=Listener())
    assert lines == [
        "note: everyone who reaches 0.0.0.0 can search this, and upload pictures",
        "200",
    ]


class Serving(NamedTuple):
    """`elva demo` in a process of its own, once it says where."""

    process: subprocess.Popen[bytes]
    printed: Path
    url: str

    def end(self, by: int) -> str:
        """What it printed, ended by a signal, with exit code 0."""
        self.process.send_signal(by)
        assert self.process.wait(30) == 0
        return self.printed.read_text()


@contextmanager
def started(*words: str, directory: Path) -> Iterator[Serving]:
    printed = directory / "printed"
    with printed.open("w") as out, subprocess.Popen(
        [sys.executable, "-m", "elva", "demo", *words, "--no-open"],
        stdout=out, stderr=out, cwd=directory, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            until(lambda: "http://" in printed.read_text() or process.poll() is not None)
            (url,) = re.findall(r"http://[0-9.:]+", printed.read_text())
            yield Serving(process, printed, url)
        finally:
            process.kill()


@pytest.mark.thorough
def test_ctrl_c_ends_it_cleanly(small, tmp_path):
    before = set(Path(tempfile.gettempdir()).glob("elva-demo-*"))
    with started(str(small), directory=tmp_path) as server:
        assert httpx.get(server.url).status_code == 200
        printed = server.end(signal.SIGINT)
    assert printed.endswith("demo: ended\n") and "Traceback" not in printed
    assert set(Path(tempfile.gettempdir()).glob("elva-demo-*")) <= before


def until(holds: Any) -> None:
    end = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.thorough
def test_a_trained_run_is_shown_as_it_is_searched(finished, browser, tmp_path):
    """The page of `elva demo RUN` has the answers of `elva search RUN --json`, and the grains that
    the run's data names."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    words = "index pointing up: light skin tone"
    found = CliRunner().invoke(app, ["search", str(run), words, "--json", "-k", "5"])
    hits = json.loads(found.stdout)
    with started(str(run), "-k", "5", directory=tmp_path) as server:
        tab = browser.new_page()
        tab.goto(server.url)
        seen = Shown(tab, [], [])
        seen.ask(words)
        assert seen.ids() == [hit["id"] for hit in hits]
        scores = [one.split(" ")[0] for one in seen.texts("#found li .note")]
        assert scores == [f"{hit['score']:.3f}" for hit in hits]
        assert "index · entity" in seen.texts("#grains label span")
        tab.close()
        server.end(signal.SIGTERM)
