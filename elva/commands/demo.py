"""`elva demo`: a page to search a run or an index by, with grains as switches."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from elva.collection import Collection, data_of, open_collection
from elva.data import load
from elva.demo.desk import MOST_MB, Desk
from elva.demo.switches import Known, known_grains
from elva.errors import UserError, counted
from elva.index import Index
from elva.progress import SILENT, Reporter
from elva.report.render import render
from elva.run import Run

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_UPLOADS = "uploads"
MOST_KEPT = 2 << 30
_MOST_UPLOAD = 256 << 20
"""Ours, bytes: of all that visitors sent and is kept at once, and of one request's files."""
MOST_VISITORS = 1000
"""Ours: whose last answers and pictures are kept; of more, those who asked last."""

EXAMPLES = 6
TAKEN = "demo: --port must be free, got {}; choose another"


@dataclass(frozen=True)
class Server:
    """Where a page is served, and to how many.

    Args:
        host: address to listen at.
        port: the port; the first free one from 7860 on for None.
        share: have gradio tunnel the page to a public address.
        show: open a browser.
        limit: searches that may wait; more are turned away.
    """

    host: str = _LOOPBACK[0]
    port: int | None = None
    share: bool = False
    show: bool = False
    limit: int = 16

    @property
    def is_local(self) -> bool:
        """Whether this machine alone reaches it."""
        return self.host in _LOOPBACK and not self.share

    def check(self) -> None:
        """UserError for what cannot be served, before work starts."""
        if self.limit < 1:
            raise UserError(f"demo: --limit must be at least 1, got {self.limit}; pass 16")
        if self.port is None:
            return
        if not 1 <= self.port <= 65535:
            raise UserError(f"demo: --port must be 1 to 65535, got {self.port}; pass 7860")
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((_LOOPBACK[0], self.port))
            except OSError:
                raise UserError(TAKEN.format(self.port)) from None


LOCAL = Server()


def check() -> None:
    """Refuse to begin without gradio."""
    if find_spec("gradio") is None:
        raise UserError("demo: gradio must be installed, got none; pip install 'elva[demo]'")


def newest_run(parent: Path = Path("runs")) -> Path:
    """The run under `parent` that was begun last, of those with a trained stage."""
    begun = sorted(parent.glob("*/recipe.yaml"), key=lambda file: -file.stat().st_mtime)
    for file in begun:
        if Run.open(file.parent).trained:
            return file.parent
    raise UserError(
        f"demo: a run or an index must be named, got none and no trained run in {parent}/; "
        "e.g. elva demo my.index"
    )


def demo(
    target: Run | Index,
    *,
    stage: str | None = None,
    model: Path | None = None,
    data: Path | None = None,
    k: int = 12,
    server: Server = LOCAL,
    ready: Callable[[str], None] = lambda url: None,
    reporter: Reporter = SILENT,
) -> None:
    """Serve the page until the process is interrupted or told to end.

    Args:
        stage, model: as of `open_collection`.
        data: a data directory whose grains.jsonl names the grains of queries; a run's own for None.
        k: answers that are shown, 1 to 100.
        server: where it is served; another address than this machine's own is said in a line.
        ready: called with the page's address once it is served.

    Raises:
        UserError: no gradio, a port that is taken, a target that cannot be searched.
    """
    check()
    if not 1 <= k <= 100:
        raise UserError(f"demo: -k must be 1 to 100, got {k}; ask for 12")
    server.check()
    if data is None and isinstance(target, Run):
        data = data_of(target)
    elif data is not None and not (data / "grains.jsonl").is_file():
        raise UserError(f"demo: --data must hold grains.jsonl, got {data}; leave it out")
    collection = open_collection(target, stage=stage, model=model, reporter=reporter)
    known = {} if data is None else known_grains(data)
    if server.host not in _LOOPBACK:
        reporter.say(
            f"note: everyone who reaches {server.host} can search this, and upload pictures"
        )
    with serving(
        collection, known, _heading(target, stage, collection),
        examples=_examples(target, data), k=k, server=server,
    ) as url:  # fmt: skip
        ready(url)
        _until_told()


@contextmanager
def serving(
    collection: Collection,
    known: Known,
    heading: str,
    *,
    examples: Sequence[str] = (),
    k: int = 12,
    server: Server = LOCAL,
) -> Iterator[str]:
    """The page's address while it is served; what visitors sent is removed at the end.

    Args:
        known: grains that the data names, of `known_grains`.
        heading: what is searched, in a line.
        examples: queries to begin with.
        k, server: as of `demo`.

    Raises:
        UserError: a port that is taken.
    """
    with tempfile.TemporaryDirectory(prefix="elva-demo-") as place:
        uploads = Path(place) / _UPLOADS
        uploads.mkdir()
        with _environment(uploads):
            from elva.demo.page import build  # gradio takes seconds

            page = build(Desk(collection, known, Path(place), k=k), heading, examples)
            page.queue(max_size=server.limit, default_concurrency_limit=1, api_open=False)
            try:
                yield _launch(page, uploads, server)
            finally:
                page.close(verbose=False)


def _heading(target: Run | Index, stage: str | None, collection: Collection) -> str:
    """What is searched, in a line."""
    if isinstance(target, Run):
        pictures = counted(len(collection.index), "test picture")
        return f"{pictures} of {target.directory}, {target.title(target.answering(stage))}"
    name = collection.searcher.encoder.identity.name
    return f"{counted(len(target), 'item')} of {target.directory}, by {name}"


def _examples(target: Run | Index, data: Path | None) -> list[str]:
    """Some queries of a run's test split, of several grains each."""
    if not isinstance(target, Run) or data is None:
        return []
    queries = load(data, split="test", tasks=["t2i"]).queries
    step = max(1, len(queries) // EXAMPLES)
    return [query.text or "" for query in islice(queries, 0, step * EXAMPLES, step)]


@contextmanager
def _environment(uploads: Path) -> Iterator[None]:
    """gradio's settings, which it reads from the environment, and none that a user's has for
    another page: nothing is reported, fetched or shared."""
    before = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    for name in before:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(uploads)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[name]
        os.environ |= before


def _launch(page: Any, uploads: Path, server: Server) -> str:
    """Begin to serve the page; its address."""
    from starlette.middleware import Middleware

    from elva.demo.guard import Guard
    from elva.demo.page import theme

    known = frozenset({*_LOOPBACK, "[::1]"}) if server.is_local else frozenset()
    guard = Middleware(
        Guard, place=uploads.parent, uploads=uploads, hosts=known, most_upload=_MOST_UPLOAD,
        most_kept=MOST_KEPT,
    )  # fmt: skip
    try:
        _, local, shared = page.launch(
            server_name=server.host, server_port=server.port, share=server.share,
            inbrowser=server.show, quiet=True, state_session_capacity=MOST_VISITORS,
            prevent_thread_lock=True, show_error=False, max_file_size=MOST_MB << 20, ssr_mode=False,
            footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False,
            pwa=False, css=render("demo.css"), theme=theme(),
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None,
                        "openapi_url": None},
        )  # fmt: skip
    except OSError as error:
        if "port" not in str(error):
            raise
        raise UserError(TAKEN.format(server.port or "none from 7860 on")) from None
    return str(shared or local)


def _until_told() -> None:
    """Wait for Ctrl-C or the end that a service manager asks for."""
    ended = threading.Event()
    before = {one: signal.signal(one, lambda *_: ended.set()) for one in
              (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    try:
        while not ended.wait(1):
            pass
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
