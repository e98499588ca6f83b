"""What the page's server lets in: its own page's requests, from its own address, of bounded size,
about files that were uploaded to it. An ASGI application around gradio's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]

_READ = re.compile(
    r"/|/config/?|/(?:gradio_api/)?theme\.css|/favicon\.ico|/manifest\.json|/(?:assets|static)/.+"
    r"|/gradio_api/(?:startup-events|heartbeat/\w+|queue/data|upload_progress|file=.+)"
)
WRITTEN = re.compile(r"/gradio_api/(?:upload|queue/join|cancel|reset/?)")
"""Paths that the page itself asks for; gradio has others, which are nobody's here."""

_MOST_JSON = 1 << 20
"""Ours, bytes: a query has 2,000 characters at most."""

LEAST = 1 << 14
"""Ours, bytes: what the smallest file counts, so that there are never too many."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'none'"
)
"""A browser that keeps to it asks no other host for anything."""


class Guard:
    """Refuses what the page does not need, before gradio sees it.

    Args:
        place: where all lies that visitors sent.
        uploads: in it, where uploaded files lie: no other file is served, or named by a request.
        hosts: names that a request may call the server by, without ports; any for none. They keep
            a page of another site, or one whose name leads here, from asking.
        most_upload, most_kept: bytes of one upload, and of all that are kept at once.
    """

    def __init__(
        self, app: Any, place: Path, uploads: Path, hosts: frozenset[str], most_upload: int,
        most_kept: int,
    ) -> None:  # fmt: skip
        self.app, self.place, self.uploads = app, place.resolve(), uploads.resolve()
        self.hosts, self.most_upload, self.most_kept = hosts, most_upload, most_kept
        self._coming: list[int] = []  # bytes of each upload that has not ended

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in
                   scope.get("headers", ())}  # fmt: skip
        refused = self._refused(scope, headers)
        if refused is None and scope["path"] == "/gradio_api/queue/join":
            body = await _body(receive)
            if body is None or not self._names_uploads(body):
                refused = 403, "a request may name uploaded files alone"
            else:
                receive = _again(body, receive)
        if refused is not None:
            await _refuse(send, *refused)
            return

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        if not scope["path"].endswith("/upload"):
            await self.app(scope, receive, marked)
            return
        self._coming.append(int(headers["content-length"]))
        try:
            await self.app(scope, receive, marked)
        finally:
            self._coming.remove(int(headers["content-length"]))
            if not self._coming:
                _drop_torn(self.uploads)

    def _refused(self, scope: _Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and words for what is not let in."""
        if scope["type"] != "http":
            return 404, "no such page"
        host = re.sub(r":\d*$", "", headers.get("host", "")).casefold()
        if self.hosts and host not in self.hosts:
            return 421, "ask by the server's own address"
        origin = headers.get("origin", "").partition("://")[2]
        if self.hosts and "origin" in headers and origin != headers["host"]:
            return 403, "ask from the server's own page"
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            if not _READ.fullmatch(path):
                return 404, "no such page"
            _, named, file = path.partition("/gradio_api/file=")
            return (403, "no such file") if named and not self._is_upload(unquote(file)) else None
        if method != "POST" or not WRITTEN.fullmatch(path):
            return 404, "no such page"
        length = headers.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,15}", length):
            return 411, "say how long the request is"
        uploads = path.endswith("/upload")
        if int(length) > (self.most_upload if uploads else _MOST_JSON):
            return 413, "the request is too large"
        if uploads and _kept(self.place) + sum(self._coming) + int(length) > self.most_kept:
            return 413, "too much was uploaded; try again later"
        return None

    def _is_upload(self, file: str) -> bool:
        """Whether a path, links followed, is of a file that was uploaded."""
        try:
            path = Path(file).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return False
        return path.is_file() and path.is_relative_to(self.uploads)

    def _names_uploads(self, body: bytes) -> bool:
        """Whether all files of a request are uploads: gradio would fetch an address, or decode what
        stands in one."""
        try:
            named = [*_files(json.loads(body))]
        except (ValueError, RecursionError):
            return False
        return all(
            isinstance(path, str) and self._is_upload(path) and not str(url).startswith("data:")
            for path, url in named
        )


def _files(value: Any) -> Iterator[tuple[Any, Any]]:
    """(path, url) of every file that JSON names."""
    if isinstance(value, dict):
        if "path" in value or "url" in value:
            yield value.get("path"), value.get("url") or ""
        value = [*value.values()]
    if isinstance(value, list):
        for one in value:
            yield from _files(one)


def _kept(folder: Path) -> int:
    """Bytes of all files under a folder, of one with several names once, and of small ones
    `LEAST`."""
    sizes: dict[int, int] = {}
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # gradio moves it, or drops it
                found = Path(at, name).lstat()
                sizes[found.st_ino] = max(LEAST, found.st_size)
    return sum(sizes.values())


def _drop_torn(uploads: Path) -> None:
    """Remove what an upload that broke off has left: gradio does not, and has none in a folder."""
    for path in uploads.iterdir():
        if path.is_file():
            path.unlink(missing_ok=True)


async def _body(receive: _Receive) -> bytes | None:
    """A request's whole body; None where it is longer than `_MOST_JSON` or breaks off."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MOST_JSON:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: _Receive) -> _Receive:
    """What hands a body on that was read already, and then whatever comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return messages.pop() if messages else await receive()

    return again


async def _refuse(send: _Send, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
