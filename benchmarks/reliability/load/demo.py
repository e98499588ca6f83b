"""`elva demo` with 50 visitors at once on the loopback interface: each gets the answers to their
own words, or is turned away by a full queue and asks again."""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from benchmarks.reliability.load import memory
from benchmarks.reliability.row import Outcome, Row, Trials
from elva.data import Item
from elva.model.identity import Identity

if TYPE_CHECKING:
    from elva.collection import Collection
    from elva.model.rollout import Encoded

VISITORS, SMOKE_VISITORS = 50, 2
SHOWN = 12
MOST_MB = 300.0
WORDS = [f"{colour} {thing}" for colour in ("red", "green", "blue", "black", "white")
         for thing in ("dog", "cat", "house", "car", "tree", "boat", "bird", "fish")]  # fmt: skip


class Words:
    """An `Encoder` of texts: the sum of their words' drawn vectors."""

    identity = Identity("words", revision="1", preprocessing="words")
    about: ClassVar[dict[str, Any]] = {}
    embedding_size = 64
    modalities = frozenset({"text"})
    instructions = "unread"

    def check(self, item: Item) -> None:
        """Takes every text."""

    def row(self, text: str) -> torch.Tensor:
        seeds = [zlib.crc32(word.encode()) for word in re.findall(r"\w+", text.casefold())]
        drawn = [torch.randn(64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(drawn).sum(0)

    def __call__(self, items: Sequence[Item], progress: Any = None) -> Encoded:
        from elva.model.rollout import Encoded

        rows = [self.row(item.text or "") for item in items]
        return Encoded(torch.stack(rows), [""] * len(items))


class Visitor:
    """Who asks in a session of their own, as the page does.

    Args:
        right: words -> ids of the answers in their order.
    """

    def __init__(self, url: str, number: int, right: Mapping[str, list[str]]) -> None:
        import httpx

        # A connection a request: the server closes one that is idle for 5 s, and a visitor that
        # this machine keeps waiting would send into it, which a browser tries again by itself.
        each = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=f"{url}/gradio_api", timeout=120, limits=each)
        self.number, self.right = number, right
        self.counts: Counter[str] = Counter()
        self.times: list[float] = []
        self.wrong: list[str] = []

    def visit(self, stop: threading.Event) -> None:
        """Ask until told to stop, and once at least."""
        asked = 0
        with self.client:
            while not asked or not stop.is_set():
                words = WORDS[(7 * self.number + asked) % len(WORDS)]
                session, began = f"s{self.number}x{asked}", time.perf_counter()
                asked += 1
                try:
                    found = self.ask(words, session)
                except Exception as error:  # noqa: BLE001  the next question is asked all the same
                    self.wrong.append(f"{type(error).__name__} {error}"[:300])
                    continue
                if found is None:
                    self.counts["turned away"] += 1
                    time.sleep(0.2)
                    continue
                self.times.append(1e3 * (time.perf_counter() - began))
                self.counts["answers"] += 1
                if found != self.right[words]:
                    self.wrong.append(f"{words}: {found} for {self.right[words]}"[:300])

    def ask(self, words: str, session: str) -> list[str] | None:
        """Ids of the answers as the page shows them; None where the queue is full."""
        body = {"data": [None, words, None, "what is here"], "fn_index": 0, "session_hash": session}
        joined = self.client.post("/queue/join", json=body)
        if joined.status_code == 503:
            return None
        joined.raise_for_status()
        with self.client.stream("GET", "/queue/data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                said = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if said.get("msg") == "process_completed":
                    assert said["success"], said["output"]
                    return re.findall(r'data-id="(\d+)"', json.dumps(said["output"]["data"])
                                      .replace('\\"', '"'))  # fmt: skip
        raise AssertionError("no answer came")


def collection(place: Path) -> Collection:
    """An index of three texts for each of `WORDS`."""
    from elva.collection import Collection
    from elva.search import Searcher

    texts = [f"{words} {more}" for words in WORDS for more in ("one", "two", "three")]
    items = [Item(str(i), text, None, "text") for i, text in enumerate(texts)]
    searcher = Searcher(Words())
    return Collection(searcher, searcher.index(place / "i", items, dtype="float32"))


def answers(searched: Collection) -> dict[str, list[str]]:
    """Words -> ids by plain cosines; the page asks `Red dog.`."""
    reader = Words()
    texts = searched.index.table["text"].to_pylist()
    rows = torch.stack([reader.row(text) for text in texts]).double().numpy()
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    found = {}
    for words in WORDS:
        cosines = rows @ reader.row(words).double().numpy()
        found[words] = [str(i) for i in np.argsort(-cosines, kind="stable")[:SHOWN]]
    return found


def trials(wanted: Trials) -> Outcome:
    """As many seconds of visits; by two visitors where they are few."""
    from elva.commands.demo import serving

    outcome = Outcome(tried=wanted.count)
    count = VISITORS if wanted.count >= 30 else SMOKE_VISITORS
    with tempfile.TemporaryDirectory(prefix="elva-load-") as scratch:
        searched = collection(Path(scratch))
        right = answers(searched)
        with serving(searched, {}, "words", k=SHOWN) as url:
            url, ended = url.rstrip("/"), threading.Event()
            ended.set()
            Visitor(url, 0, right).visit(ended)  # what is made once is made
            before, stop = memory.resident_mb(), threading.Event()
            visitors = [Visitor(url, number, right) for number in range(count)]
            with ThreadPoolExecutor(count) as pool:
                visits = [pool.submit(one.visit, stop) for one in visitors]
                time.sleep(wanted.count)
                stop.set()
                for visit in visits:
                    visit.result(180)
            grown = memory.resident_mb() - before
    times = [took for one in visitors for took in one.times]
    for one in visitors:
        outcome.counts.update(one.counts)
        outcome.wrong += [f"second {wanted.first}, visitor {one.number}: {x}" for x in one.wrong]
    if grown > MOST_MB:
        outcome.wrong.append(f"second {wanted.first}: {grown:.0f} MB more than before")
    if count == VISITORS and not outcome.counts["turned away"]:
        outcome.wrong.append(f"second {wanted.first}: a queue without a bound, nobody turned away")
    if not times:
        outcome.wrong.append(f"second {wanted.first}: nobody was answered")
        return outcome
    outcome.measured("visitors", count)
    outcome.measured("MB grown", round(grown, 1))
    outcome.measured("ms, median", round(float(np.median(times)), 1))
    outcome.measured("ms, 99 of 100", round(float(np.quantile(times, 0.99)), 1))
    return outcome


def said(kept: Mapping[str, Any]) -> str:
    counts, most = kept["counts"], kept["most"]
    return (
        f"{most['visitors']:.0f} visitors, {counts['answers']:,} answers, "
        f"{counts.get('turned away', 0):,} turned away; {most['ms, median']:,.0f} ms, 99 of 100 in "
        f"{most['ms, 99 of 100']:,.0f}; {most['MB grown']:.0f} MB more"
    )


def missing() -> str:
    """What this machine lacks for it."""
    lacks = [name for name in ("gradio", "httpx") if find_spec(name) is None]
    return f"no {lacks[0]}: pip install 'elva[demo]'" if lacks else memory.missing()


ROW = Row(
    title="`elva demo` with 50 visitors at once: the right answers, a bounded queue, memory",
    goal="two minutes, 0 wrong",
    unit="seconds",
    amount=120,
    smoke=2,
    chunk=120,
    run=trials,
    said=said,
    missing=missing,
)
