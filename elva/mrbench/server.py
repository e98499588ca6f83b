"""A question to a model's server: its answer is bounded in seconds and in bytes, comes from the
server itself, and never holds the key that was sent with the question."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from elva.data.strict import parse
from elva.errors import DataError, UserError

MOST_ANSWER = 1 << 18
"""Ours, bytes: hundreds of times what a query's grains or a picture's sentence takes."""

KEY = "OPENAI_API_KEY"
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses after which asking again may help."""


def check_url(url: str) -> None:
    """UserError for what is no server's base address, or holds a secret, which is not repeated."""
    with suppress(ValueError):
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if named and "@" not in parts.netloc and not parts.query and not parts.fragment:
            return
    raise UserError(
        "mrbench: --judge must be http(s)://HOST[:PORT][/PATH], got another form of address; "
        f"a key belongs into {KEY}"
    )


def post(url: str, body: dict[str, Any], *, seconds: float, tries: int) -> dict[str, Any]:
    """The JSON object that a server answers; what fails for the moment is tried again.

    Args:
        seconds: of a try, from its first byte sent to its last one read.

    Raises:
        UserError: in one line, no answer or none that is believed.
    """
    key = _key()
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    reason = ""
    for attempt in range(tries):
        try:
            answer = parse("", _text(request, seconds))
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"status {error.code}"
            if 300 <= error.code < 400:
                reason += ", which leads elsewhere and is not followed"
            if error.code not in PASSING:
                break  # asking again would not help
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split()).removeprefix(": ")
            reason = reason or type(error).__name__
        else:
            if key and key in json.dumps(answer):
                raise UserError(f"{url}: must not repeat the key that it was sent; see who answers")
            return answer
        if attempt + 1 < tries:
            time.sleep(0.5 * 2**attempt)
    reason = reason.replace(key, "the key") if key else reason
    raise UserError(f"{url}: must answer, got {reason}; what was judged so far is kept")


def _key() -> str:
    """The key for the server; "" for none."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!#-&(-\[\]-~]*", key):  # of which http.client would print the whole
        raise UserError(
            f"mrbench: {KEY} must be letters, digits and signs of ASCII, got others or quotes"
        )
    return key


def _text(request: urllib.request.Request, seconds: float) -> str:
    """What is answered, as it is: no redirect is followed, nothing is unpacked."""
    with _Deadline(seconds) as deadline:
        try:
            with _opener(deadline).open(request, timeout=seconds) as answer:
                content: bytes = answer.read(MOST_ANSWER + 1)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, ValueError):
            if not deadline.passed:
                raise
        if deadline.passed:
            raise TimeoutError(f"no whole answer in {seconds:g} s")
    if len(content) > MOST_ANSWER:
        raise DataError(f"more than {MOST_ANSWER:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise DataError("bytes that are no UTF-8") from None


class _Deadline:
    """Shuts a connection down once its time has passed, in whatever it is waiting for by then: a
    socket's own timeout begins anew with every byte."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def holds(self, connected: socket.socket) -> None:
        with self._lock:
            self._socket = connected
            if self.passed:
                self._shut()

    def _end(self) -> None:
        with self._lock:
            self.passed = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it has ended
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Held:
    """A connection of http.client that a deadline holds."""

    def __init__(self, *args: Any, deadline: _Deadline, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline = deadline

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._deadline.holds(self.sock)  # type: ignore[attr-defined]


class _Plain(_Held, http.client.HTTPConnection):
    pass


class _Secure(_Held, http.client.HTTPSConnection):
    pass


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens both kinds of address by connections that a deadline holds."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_Plain, deadline=self._deadline), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_Secure, deadline=self._deadline), request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    """Of the web's two kinds of address and the proxy of the environment, and of no redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), _Handler(deadline), urllib.request.UnknownHandler(),
        urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener
