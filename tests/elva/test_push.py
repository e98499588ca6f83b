"""`elva push` against a hub of its own, over loopback, by huggingface_hub's own client."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from elva.cli import app

CARD = "---\nlibrary_name: elva\n---\n# one\n"


class Hub(http.server.BaseHTTPRequestHandler):
    """What a hub answers to an upload; what it was sent lies in its server's `sent`."""

    server: "Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        host, path = f"http://{self.headers['host']}", self.path
        self.server.asked.append((path, self.headers.get("authorization")))
        status, answer = 200 if self.command != "GET" else 404, {}
        if path == "/api/repos/create":
            status = self.server.status
            self.server.sent["create"] = body
            answer = {"url": f"{host}/me/one"}
        elif "/preupload/" in path:
            kinds = {True: "lfs", False: "regular"}
            answer = {"files": [
                {"path": f["path"], "uploadMode": kinds[f["path"].endswith(".safetensors")],
                 "shouldIgnore": False} for f in json.loads(body)["files"]
            ]}  # fmt: skip
        elif path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{host}/lfs/{one['oid']}"}}
            answer = {"transfer": "basic", "objects": objects}
        elif path.startswith("/lfs/"):
            self.server.sent[path] = body
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.sent[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{host}/me/one/commit/1", "commitOid": "1" * 40}
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.asked: list[tuple[str, str | None]] = []
        self.sent: dict[str, bytes] = {}


@pytest.fixture
def hub() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "one"
    directory.mkdir()
    save_file({"weight": torch.arange(6.0)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.fixture
def push(hub: Server, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`elva push`, which knows this hub alone."""
    own = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_of_mine", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip

    def run(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "elva", "push", *map(str, words)], cwd=tmp_path,
            env=os.environ | own | more, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_a_checkpoint_arrives_as_it_is(hub, checkpoint, push) -> None:
    done = push(checkpoint, "me/one")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pushed: http://127.0.0.1:{hub.server_port}/me/one/commit/1\n"
    weights = (checkpoint / "model.safetensors").read_bytes()
    (oid,) = (name for name in hub.sent if name.startswith("/lfs/"))
    assert hub.sent[oid] == weights
    assert hub.sent["README.md"].decode() == CARD and hub.sent["config.json"] == b"{}"
    assert json.loads(hub.sent["create"])["visibility"] == "private"
    assert {token for path, token in hub.asked if path.startswith("/api/models")} == {
        "Bearer hf_of_mine"
    }


def test_everybody_may_read_it_only_where_that_was_said(hub, checkpoint, push) -> None:
    assert push(checkpoint, "me/one", "--public").returncode == 0
    assert json.loads(hub.sent["create"]).get("visibility", "public") == "public"


def test_a_dry_run_asks_no_hub(hub, checkpoint, push) -> None:
    done = push(checkpoint, "me/one", "--dry-run")
    assert done.returncode == 0 and not hub.asked
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "README.md", "config.json", "model.safetensors", "me/one",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("pytorch_model.bin", "alone, got the file pytorch_model.bin"),
        ("code.py", "alone, got the file code.py"),
        (".git/config", "alone, got the file .git/config"),
        ("link.json", "alone, got the link link.json"),
        ("-README.md", "without a model card, README.md"),
        ("-model.safetensors", "without weights"),
    ],
)
def test_what_is_no_checkpoint_stays_here(name, rule, checkpoint) -> None:
    """A name to write, or behind a minus one to leave out."""
    path = checkpoint / name.removeprefix("-")
    if name.startswith("-"):
        path.unlink()
    elif name.startswith("link"):
        path.symlink_to("/etc/passwd")
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    done = CliRunner().invoke(app, ["push", str(checkpoint), "me/one"])
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert rule in done.stderr


@pytest.mark.parametrize("repository", ["one", "me/one/two", "me/o ne", "../one", "", "-"])
def test_a_repository_has_an_owner_and_a_name(repository, checkpoint) -> None:
    done = CliRunner().invoke(app, ["push", str(checkpoint), "--", repository])
    assert done.exit_code == 2
    assert done.stderr == f"elva: push: REPOSITORY must be user/name, got {repository!r}\n"


def test_what_the_hub_refuses_is_one_line(hub, checkpoint, push) -> None:
    for status, line in {
        401: "the hub answers 401 Unauthorized; run `hf auth login`, or set HF_TOKEN",
        503: "the hub answers 503 Service Unavailable; try again later",
    }.items():
        hub.status = status
        done = push(checkpoint, "me/one")
        assert done.returncode == 2 and line in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr
    done = push(checkpoint, "me/one", HF_HUB_OFFLINE="1")
    assert (done.returncode, "HF_HUB_OFFLINE" in done.stderr) == (2, True), done.stderr
    done = push(checkpoint, "me/one", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and "127.0.0.1:9 must answer, got " in done.stderr, done.stderr
