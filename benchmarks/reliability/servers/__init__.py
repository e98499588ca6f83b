"""Row of model servers that misbehave: what asks them ends in time, and tells nobody the key."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from PIL import Image

from benchmarks.reliability.row import Outcome, Row, Trials
from benchmarks.reliability.servers.behaviours import (
    GRAINS,
    KEY,
    SENTENCE,
    WAYS,
    Misbehaving,
    Way,
    bomb,
    serving,
)
from elva.data import Item
from elva.errors import UserError, printable
from elva.mrbench import judges, server

TIMEOUT_SECONDS = 0.4
SLACK_SECONDS = 3.0  # of a machine that is busy
MOST_TAKEN = 16 << 20  # bytes: what is read at most, and what the system's buffers hold
MOST_GROWN = 96 << 20  # bytes of memory, of which a question that is never read takes 30 MB
QUERY = "A dog that is red."


class Found(NamedTuple):
    """What a client made of a server: an answer, or a line; and what it left on the disk."""

    answer: Any = None
    line: str = ""
    kept: bytes = b""


def judge(url: str, way: Way) -> judges.OpenAIJudge:
    return judges.OpenAIJudge(url, "m", timeout_seconds=TIMEOUT_SECONDS, tries=way.tries, at_once=1)


def grains(url: str, way: Way) -> Found:
    """The grains of a text; of one that no system's buffers hold where nobody reads."""
    long = " dog" * (3 << 20) if way is WAYS["never reads"] else ""
    found = judge(url, way).grains(QUERY + long)
    return Found([{"grain": one.text, "type": one.type} for one in found])


def describe(url: str, way: Way) -> Found:
    picture = Image.new("RGB", (8, 8), "red")
    return Found(judge(url, way).describe(Item("1", None, picture, "image")))


def build(url: str, way: Way) -> Found:
    """`elva mrbench build` as a user calls it; its output and files, the log of judgements too."""
    from typer.testing import CliRunner

    from elva.cli import app

    known = partial(judges.OpenAIJudge, timeout_seconds=TIMEOUT_SECONDS, tries=way.tries, at_once=1)
    with tempfile.TemporaryDirectory() as place, mock.patch.object(judges, "OpenAIJudge", known):
        root = Path(place)
        write_data(root / "data")
        words = ["mrbench", "build", "--data", root / "data", "--output", root / "out",
                 "--judge", url, "--judge-model", "m"]  # fmt: skip
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        files = [x for x in root.rglob("*") if x.is_file() and "data" not in x.parts]
        kept = b"\n".join(x.read_bytes() for x in files) + done.output.encode()
        if done.exit_code:
            return Found(line=done.output.strip(), kept=kept)
        rows = [json.loads(line) for line in (root / "out" / "grains.jsonl").open()]
    named = [{"grain": x["text"], "type": x["type"]} for row in rows for x in row["grains"]]
    return Found(named, kept=kept)


def write_data(root: Path) -> None:
    """A query and its answer in M-BEIR's layout, both texts."""
    row = {"txt": "a cat", "img_path": None, "modality": "text", "did": "90:1"}
    asked = {
        "qid": "90:1", "query_txt": QUERY, "query_img_path": None, "query_modality": "text",
        "pos_cand_list": ["90:1"], "neg_cand_list": [], "task_id": 1,
    }  # fmt: skip
    files = {
        "cand_pool/local/mbeir_mine_task1_cand_pool.jsonl": json.dumps(row),
        "query/test/mbeir_mine_task1_test.jsonl": json.dumps(asked),
        "qrels/test/mbeir_mine_task1_test_qrels.txt": "90:1 0 90:1 1 1",
        "instructions/query_instructions.tsv": (
            "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n"
            "text\ttext\tmine\t90\tFind it."
        ),
    }
    for name, line in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(line + "\n")


CLIENTS: dict[str, Callable[[str, Way], Found]] = {
    "grains": grains, "describe": describe, "build": build,
}  # fmt: skip
RIGHT = {"grains": GRAINS, "describe": SENTENCE, "build": GRAINS}
STRIDE = 37
"""A prime that does not divide how many cases there are: a few in a row are of several ways."""
_EVERY = [*product(WAYS, CLIENTS)]
CASES = [_EVERY[i * STRIDE % len(_EVERY)] for i in range(len(_EVERY))]


def most_held() -> int:
    """The most memory that this process has had since `forget`, in bytes."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


def forget() -> int:
    """From now on memory's peak is counted; what is held now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return most_held()


@lru_cache(maxsize=1)
def warm() -> None:
    """All is imported and packed once, before seconds and bytes count."""
    for client in CLIENTS:
        with mock.patch(f"{__name__}.TIMEOUT_SECONDS", 60):
            trial(client, "answers")
    bomb()


def trial(client: str, name: str) -> tuple[float, int]:
    """A client before a server that behaves in a way; the seconds and bytes it took.

    Raises:
        AssertionError: what a client must not do.
    """
    way = WAYS[name]
    with serving(way.behave) as asked, serving(lambda link: None) as elsewhere:
        asked.elsewhere = elsewhere.url
        began = time.monotonic()
        found = outcome_of(client, asked, way)
        took = time.monotonic() - began
    check(client, way, found)
    assert elsewhere.connections == 0, "it went elsewhere"
    assert asked.connections <= way.tries, f"{asked.connections} connections of {way.tries}"
    most = way.tries * TIMEOUT_SECONDS + SLACK_SECONDS
    assert took <= most, f"{took:.1f} s of at most {most:.1f}"
    assert asked.sent <= MOST_TAKEN, f"{asked.sent:,} bytes were taken"
    return took, asked.sent


def outcome_of(client: str, asked: Misbehaving, way: Way) -> Found:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            found = CLIENTS[client](f"{asked.url}/v1", way)
        except UserError as error:
            found = Found(line=str(error))
    return found._replace(kept=found.kept + printed.getvalue().encode())


def check(client: str, way: Way, found: Found) -> None:
    assert KEY not in repr(found.answer) + found.line, "the key is in an answer or a line"
    assert KEY.encode() not in found.kept, "the key is in a file or in what was printed"
    assert found.line.count("\n") == 0, f"several lines: {found.line!r}"
    if way.ends is None:
        assert "Traceback" not in found.line
    elif way.ends:
        assert way.ends in found.line, f"{found} for {way.ends!r}"
    else:
        assert found.answer == RIGHT[client], f"{found}"
    if client == "build":  # what a person sees
        assert found.line == printable(found.line), repr(found.line)


def trials(wanted: Trials) -> Outcome:
    """The cases in a row, from the first again after the last."""
    outcome = Outcome()
    with mock.patch.dict(os.environ, {server.KEY: KEY, "no_proxy": "*", "NO_PROXY": "*"}):
        warm()
        for number in wanted.numbers:
            name, client = CASES[(number + 97 * wanted.seed) % len(CASES)]
            outcome.tried += 1
            before = forget()
            try:
                took, taken = trial(client, name)
                more = most_held() - before
                assert more <= MOST_GROWN, f"{more:,} bytes of memory"
            except Exception as error:  # noqa: BLE001  the next case is tried all the same
                outcome.wrong.append(
                    f"number {number} ({client}: {name}): {type(error).__name__} {error}"[:600]
                )
                continue
            outcome.counts[client] += 1
            outcome.measured("seconds", round(took, 3))
            outcome.measured("MB taken", round(taken / 1e6, 3))
            outcome.measured("MB of memory", round(more / 1e6, 1))
    return outcome


def said(kept: Mapping[str, Any]) -> str:
    most = kept["most"]
    return (
        f"{len(WAYS)} ways, {len(CLIENTS)} clients, {TIMEOUT_SECONDS} s a try: at most "
        f"{most['seconds']:.1f} s, {most['MB taken']:.1f} MB taken"
    )


ROWS = {
    "servers": Row(
        title="a judge's server or a redirect that misbehaves: time, bytes, the key",
        goal="all cases",
        unit="cases",
        amount=len(CASES),
        smoke=12,
        chunk=30,
        run=trials,
        said=said,
    ),
}
