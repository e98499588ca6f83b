"""A model's server on the loopback interface that misbehaves, each connection in one named way."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

from elva.mrbench.judges import DESCRIBE

KEY = "sk-loopback-0123456789-of-nobody"
SENTENCE = "A red dog runs."
GRAINS = [{"grain": "dog", "type": "entity"}, {"grain": "red", "type": "attribute"}]
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PATIENCE_SECONDS = 20.0  # of a server that waits for its client to go; a fault of ours ends by it


class Link(socketserver.BaseRequestHandler):
    """A connection: what was asked by it, and what may be sent over it."""

    server: Misbehaving

    def handle(self) -> None:
        self.server.connections += 1
        self.request.settimeout(PATIENCE_SECONDS)
        with contextlib.suppress(OSError):  # the client has gone: what a trial is about
            self.server.behaviour(self)

    def send(self, content: bytes | str) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.request.sendall(content)
        self.server.sent += len(content)

    def asked(self) -> dict[str, Any]:
        """The question, read whole."""
        with self.request.makefile("rb") as stream:
            length = 0
            while (line := stream.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            return json.loads(stream.read(length) or b"{}")

    def right(self) -> bytes:
        """The answer of a server that behaves, the question being read."""
        content = self.asked()["messages"][0]["content"][0]["text"]
        return completion(SENTENCE if content == DESCRIBE else json.dumps(GRAINS))

    def until_gone(self) -> None:
        while self.request.recv(1 << 16):
            pass


class Misbehaving(socketserver.ThreadingTCPServer):
    """Counts its connections and the bytes that its clients took."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, behaviour: Callable[[Link], None]) -> None:
        super().__init__(("127.0.0.1", 0), Link)
        self.behaviour, self.connections, self.sent, self.elsewhere = behaviour, 0, 0, ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def serving(behaviour: Callable[[Link], None]) -> Iterator[Misbehaving]:
    with Misbehaving(behaviour) as server:
        thread = threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def completion(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def whole(body: bytes, head: str = HEAD) -> bytes:
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# -- ways to behave --------------------------------------------------------------------------------


def answers(link: Link, change: Callable[[bytes], bytes] = whole) -> None:
    link.send(change(link.right()))


def says(link: Link, body: bytes, head: str = HEAD) -> None:
    link.asked()
    link.send(whole(body, head))


def sends(link: Link, content: bytes | str) -> None:
    """As it is, and ends."""
    link.asked()
    link.send(content)


def waits(link: Link, first: str = "") -> None:
    link.asked()
    link.send(first)
    link.until_gone()


def never_reads(link: Link) -> None:
    time.sleep(2)  # longer than its client has


def drips(link: Link, first: str, letter: str) -> None:
    """A byte now and then, far within any one read's timeout."""
    link.asked()
    link.send(first)
    for _ in range(int(PATIENCE_SECONDS / 0.03)):
        link.send(letter)
        time.sleep(0.03)


def pours(link: Link, first: str, more: bytes) -> None:
    """Without end."""
    link.asked()
    link.send(first)
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        link.send(more)


def redirects(link: Link, status: int, place: str = "{elsewhere}/v1/chat/completions") -> None:
    place = place.format(elsewhere=link.server.elsewhere, itself=link.server.url)
    says(link, b"", f"HTTP/1.1 {status} Moved\r\nLocation: {place}\r\n")


def busy_once(link: Link) -> None:
    if link.server.connections == 1:
        says(link, b"", "HTTP/1.1 503 Busy\r\nRetry-After: 86400\r\n")
    else:
        answers(link)


@lru_cache(maxsize=1)
def bomb() -> bytes:
    """256 MB of zeros, packed."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as stream:
        for _ in range(256):
            stream.write(bytes(1 << 20))
    return packed.getvalue()


def explodes(link: Link) -> None:
    says(link, bomb(), f"{HEAD}Content-Encoding: gzip\r\n")


def chunked(link: Link, chunks: Callable[[bytes], bytes]) -> None:
    link.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks(link.right()))


def one_chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


class Way(NamedTuple):
    """How a server behaves, and what a client must make of it.

    behave: does it.
    ends: what the error's line holds; "" where the right answer must be had; None where either.
    tries: which a question has.
    """

    behave: Callable[[Link], None]
    ends: str | None = "must answer, got"
    tries: int = 1


NO_TIME = "no whole answer in"
TOO_LONG = "more than 262,144 bytes"
NO_JSON = "not JSON"
ELSEWHERE = "leads elsewhere and is not followed"
OTHER = "must answer as OpenAI's chat completions do"
REPEATED = "must not repeat the key"
DEEP = b"[" * 100_000 + b"]" * 100_000

WAYS: dict[str, Way] = {
    "answers": Way(answers, ""),
    "answers in one chunk": Way(partial(chunked, chunks=one_chunk), ""),
    "answers without a length": Way(
        partial(answers, change=lambda body: HEAD.encode() + b"\r\n" + body), ""
    ),
    "is busy once": Way(busy_once, "", tries=2),
    # time
    "is silent": Way(waits, NO_TIME),
    "never reads": Way(never_reads, None),
    "drips its status": Way(partial(drips, first="HTTP/1.1 200", letter=" "), NO_TIME),
    "drips a header": Way(partial(drips, first=f"{HEAD}X: ", letter="x"), NO_TIME),
    "drips headers": Way(partial(drips, first=HEAD, letter="x: y\r\n"), None),
    "drips a body": Way(
        partial(drips, first=f"{HEAD}Content-Length: 100000\r\n\r\n", letter=" "), NO_TIME
    ),
    "drips a body without a length": Way(partial(drips, first=f"{HEAD}\r\n", letter=" "), NO_TIME),
    "drips chunks": Way(
        partial(drips, first=f"{HEAD}Transfer-Encoding: chunked\r\n\r\n", letter="1\r\n \r\n"),
        NO_TIME,
    ),
    "continues for ever": Way(
        partial(drips, first="", letter="HTTP/1.1 100 Continue\r\n\r\n"), NO_TIME
    ),
    "says too great a length, and stays": Way(
        partial(waits, first=f"{HEAD}Content-Length: 5000\r\n\r\n{{"), NO_TIME
    ),
    "is busy for ever": Way(partial(says, body=b"", head="HTTP/1.1 429 Busy\r\n"), "status 429"),
    # bytes
    "pours a body": Way(partial(pours, first=f"{HEAD}\r\n", more=b" " * 65536), TOO_LONG),
    "pours chunks": Way(
        partial(pours, first=f"{HEAD}Transfer-Encoding: chunked\r\n\r\n",
                more=b"10000\r\n" + b" " * 65536 + b"\r\n"), TOO_LONG
    ),
    "pours headers": Way(partial(pours, first=HEAD, more=b"x: " + b"y" * 30000 + b"\r\n")),
    "pours a header": Way(partial(pours, first=f"{HEAD}X: ", more=b"y" * 65536)),
    "pours a status": Way(partial(pours, first="HTTP/1.1 200 ", more=b"y" * 65536)),
    "pours the length of a chunk": Way(
        partial(pours, first=f"{HEAD}Transfer-Encoding: chunked\r\n\r\n", more=b"0" * 65536)
    ),
    "says a length of a terabyte": Way(
        partial(pours, first=f"{HEAD}Content-Length: {1 << 40}\r\n\r\n", more=b" " * 65536),
        TOO_LONG,
    ),
    "says a chunk of a terabyte": Way(
        partial(pours, first=f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{1 << 40:x}\r\n",
                more=b" " * 65536), TOO_LONG
    ),
    "packs 256 MB": Way(explodes),
    "says too small a length": Way(
        partial(answers, change=lambda body: f"{HEAD}Content-Length: 9\r\n\r\n".encode() + body),
        NO_JSON,
    ),
    "says too great a length, and goes": Way(
        partial(sends, content=f"{HEAD}Content-Length: 5000\r\n\r\n{{")
    ),
    "says a length below zero": Way(
        partial(answers, change=lambda body: f"{HEAD}Content-Length: -9\r\n\r\n".encode() + body),
        None,
    ),
    "says a length that is none": Way(
        partial(answers, change=lambda body: f"{HEAD}Content-Length: ten\r\n\r\n".encode() + body),
        None,
    ),
    "breaks off in a chunk": Way(
        partial(chunked, chunks=lambda body: b"%x\r\n" % len(body) + body[:9])
    ),
    "says a chunk's length in words": Way(partial(chunked, chunks=lambda body: b"ten\r\n" + body)),
    # places
    **{f"redirects by {status}": Way(partial(redirects, status=status), ELSEWHERE)
       for status in (301, 302, 303, 307, 308)},
    "redirects to itself": Way(
        partial(redirects, status=307, place="{itself}/v1/chat/completions"), ELSEWHERE
    ),
    "redirects to a file": Way(
        partial(redirects, status=302, place="file:///etc/passwd"), ELSEWHERE
    ),
    "redirects to no place": Way(partial(redirects, status=302, place="\x1b[2J"), ELSEWHERE),
    "has its other address in the answer": Way(
        partial(answers, change=lambda body: whole(body, f"{HEAD}Refresh: 0; url=http://[::1]/\r\n")),
        "",
    ),
    # the key
    "refuses the key": Way(partial(says, body=KEY.encode(), head="HTTP/1.1 401 No\r\n"), "401"),
    "has the key in its status": Way(partial(sends, content=f"HTTP/{KEY} \x1b[2J\r\n\r\n")),
    "has the key in its reason": Way(
        partial(says, body=b"", head=f"HTTP/1.1 500 {KEY}\r\n"), "status 500"
    ),
    "has the key in an error": Way(
        partial(says, body=json.dumps({"error": f"wrong key {KEY}"}).encode()), REPEATED
    ),
    "has the key as a name, twice": Way(
        partial(says, body=f'{{"{KEY}": 1, "{KEY}": 2}}'.encode()), "key 'the key' twice"
    ),
    "says the key": Way(partial(says, body=completion(f"[] {KEY}")), REPEATED),
    "says the key in escapes": Way(
        partial(says, body=completion("KEY").replace(
            b"KEY", "".join(f"\\u{ord(letter):04x}" for letter in KEY).encode())), REPEATED
    ),
    # JSON
    "says nothing": Way(partial(says, body=b""), NO_JSON),
    "says a page": Way(partial(says, body=b"<html><script>1</script></html>"), NO_JSON),
    "says half of it": Way(partial(answers, change=lambda body: whole(body[:-9])), NO_JSON),
    "says NaN": Way(partial(says, body=b'{"choices": NaN}'), "NaN is not JSON"),
    "says Infinity": Way(partial(says, body=b'{"choices": [-Infinity]}'), "Infinity is not JSON"),
    "nests deeply": Way(partial(says, body=b'{"choices": ' + DEEP + b"}"), "nested too deeply"),
    "says half a surrogate": Way(
        partial(says, body=completion("\ud800")), "holds a lone surrogate"
    ),
    "says a number of 5,000 digits": Way(
        partial(says, body=b'{"choices": ' + b"9" * 5000 + b"}"), NO_JSON
    ),
    "says a list": Way(partial(says, body=b"[1]"), "not a JSON object"),
    "says no choices": Way(partial(says, body=b'{"choices": []}'), OTHER),
    "says a number": Way(partial(says, body=completion(3)), OTHER),
    "says a list of contents": Way(partial(says, body=completion([{"text": "dog"}])), OTHER),
    "says it in UTF-16": Way(
        partial(answers, change=lambda body: whole(body.decode().encode("utf-16"))), "no UTF-8"
    ),
    "says what is no text": Way(partial(says, body=b"\xff\xfe\x80"), "no UTF-8"),
    # the model's own words: they are no error, and are believed where they copy the query
    "would not say": Way(partial(says, body=completion(None)), None),
    "says brackets": Way(partial(says, body=completion("[" * 200_000)), None),
    "nests deeply in its words": Way(partial(says, body=completion(DEEP[:200_000].decode())), None),
    "says controls": Way(partial(says, body=completion("\x1b]0;owned\x07\x1b[2J\u202e")), None),
    # the protocol
    "goes at once": Way(lambda link: None),
    "goes after the question": Way(partial(sends, content="")),
    "speaks another protocol": Way(partial(sends, content=b"SSH-2.0-OpenSSH_9.9\r\n")),
    "says bytes": Way(partial(sends, content=bytes(range(256)) * 16)),
    "speaks HTTP/0.9": Way(partial(sends, content="hello\r\n\r\n")),
    "says a status of words": Way(partial(sends, content="HTTP/1.1 fine\r\n\r\n")),
    "says the status 999": Way(partial(says, body=b"", head="HTTP/1.1 999 x\r\n"), "status 999"),
    "has no contents": Way(partial(sends, content="HTTP/1.1 204 No Content\r\n\r\n"), NO_JSON),
}  # fmt: skip
