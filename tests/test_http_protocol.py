"""What is kept of a request that is not its body is limited, and its trailers are ignored.

The protocol stands in front of an application that tells what it was given.
"""

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import REGISTRY
from starlette.types import Message, Receive, Scope, Send

from app.ai.events import UNMATCHED_ROUTE
from app.drain import Drain
from app.http_protocol import MAX_FIELDS, MAX_OVERHEAD_BYTES
from app.schemas.ai_ml import Problem
from tests.in_process import serve_app

PATIENCE_SECONDS = 15.0
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZED = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
BYTES = b"1\r\nb\r\n" * 100_000
LAST_CHUNK = b"0\r\n"
BELOW = MAX_OVERHEAD_BYTES - 1000


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the size of the body and the names of the headers; `/early` does so without reading.

    `/cancelled` is cancelled before it answers, as the end of the service does.
    """
    if scope["type"] == "lifespan":
        await receive()
        scope["state"].update(client_deadline_seconds=10.0, drain=Drain(0.0, time.monotonic))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    read, more = 0, scope["path"] not in ("/early", "/half")
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        read, more = read + len(message["body"]), message["more_body"]
    if scope["path"] == "/cancelled":
        raise asyncio.CancelledError
    told = json.dumps({"read": read, "names": [name.decode() for name, _ in scope["headers"]]}).encode()
    head = [(b"content-length", b"%d" % len(told))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    if scope["path"] == "/half":
        await send({"type": "http.response.body", "body": told[:5], "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
    await send({"type": "http.response.body", "body": told})


class _NoMemory(Drain):
    @property
    def active(self) -> bool:
        raise MemoryError


async def tell_without_memory(scope: Scope, receive: Receive, send: Send) -> None:
    """Fails within the parser, which asks for the drain at the end of a head."""

    async def send_after(message: Message) -> None:
        scope["state"]["drain"] = _NoMemory(0.0, time.monotonic)
        await send(message)

    await tell(scope, receive, send_after)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with serve_app(tell) as base:
        yield split_address(base)


def split_address(base: str) -> tuple[str, int]:
    url = urlsplit(base)
    return url.hostname or "", url.port or 0


class Client:
    """One connection; answers are read one by one."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=PATIENCE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        with suppress(ConnectionError):  # refused before all of it was sent: the answer says why
            self._socket.sendall(data)

    def answer(self) -> tuple[int, Any]:
        """Returns status and body of the next answer, status 0 when the connection has ended."""
        while b"\r\n\r\n" not in self._received:
            if not self._receive():
                return 0, None
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        assert found is not None
        length = int(found[1])
        while len(self._received) < length:
            if not self._receive():
                return 0, None
        body, self._received = self._received[:length], self._received[length:]
        return int(head.split()[1]), json.loads(body)

    def _receive(self) -> bool:
        with suppress(ConnectionError):
            piece = self._socket.recv(65536)
            self._received += piece
            return bool(piece)
        return False


@pytest.fixture
def client(address: tuple[str, int]) -> Iterator[Client]:
    with closing(Client(address)) as client:
        yield client


def fill(size: int) -> bytes:
    return b"a: " + b"b" * size + b"\r\n"


def assert_refused(client: Client) -> None:
    status, body = client.answer()
    assert (status, Problem.model_validate(body).error_code) == (400, "MALFORMED_REQUEST")
    assert "64 KiB and 128 fields" in body["detail"]
    assert client.answer() == (0, None)


ENDLESS = [
    pytest.param(b"GET /", b"a", b" HTTP/1.1\r\nHost: x\r\n\r\n", id="target"),
    pytest.param(GET, b"a", b": b\r\n\r\n", id="name"),
    pytest.param(GET + b"a: ", b"b", b"\r\n\r\n", id="value"),
    pytest.param(GET + b"a:", b" ", b"b\r\n\r\n", id="blanks"),
    pytest.param(GET, b"a: bb\r\n", b"\r\n", id="fields"),
    pytest.param(b"", b"\r\n", GET + b"\r\n", id="line ends"),
    pytest.param(CHUNKED + b"1;", b"a", b"\r\n1\r\n0\r\n\r\n", id="extension"),
    pytest.param(CHUNKED, b"1;" + b"a" * 100 + b"\r\nb\r\n", b"0\r\n\r\n", id="extensions"),
    pytest.param(CHUNKED + LAST_CHUNK + b"a: ", b"b", b"\r\n\r\n", id="trailer"),
    pytest.param(CHUNKED + LAST_CHUNK, b"a: bb\r\n", b"\r\n", id="trailers"),
    pytest.param(CHUNKED + BYTES + LAST_CHUNK, b"a: bb\r\n", b"\r\n", id="trailers of a body"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "again", "after"), ENDLESS)
@pytest.mark.parametrize("times", [pytest.param(1, id="in one go"), pytest.param(100, id="in pieces")])
def test_whatever_of_a_request_is_endless_but_its_body_is_malformed(
    client: Client, before: bytes, again: bytes, after: bytes, times: int
) -> None:
    sent = before + again * (1_000_000 // len(again)) + after
    size = len(sent) // times + 1
    for start in range(0, len(sent), size):
        client.send(sent[start : start + size])
    assert_refused(client)


@pytest.mark.parametrize("times", [1, 7])
def test_the_limit_is_where_it_is_said_to_be(client: Client, times: int) -> None:
    for size, status in ((BELOW, 200), (MAX_OVERHEAD_BYTES, 400)):
        sent = GET + fill(size) + b"\r\n"
        for at in range(times):
            client.send(sent[len(sent) * at // times : len(sent) * (at + 1) // times])
        assert client.answer()[0] == status


def test_each_request_has_the_limit_to_itself(client: Client) -> None:
    large = GET + fill(BELOW) + b"\r\n"
    for _ in range(3):
        client.send(large)
        assert client.answer()[0] == 200
    client.send(large * 3)
    assert [client.answer()[0] for _ in range(3)] == [200] * 3
    client.send((GET + b"\r\n") * 10_000)
    assert [client.answer()[0] for _ in range(10_000)] == [200] * 10_000


def test_a_request_that_comes_with_another_one_is_limited_too(client: Client) -> None:
    client.send(GET + b"\r\n" + GET + fill(100_000) + b"\r\n")
    statuses = []
    while status := client.answer()[0]:
        statuses.append(status)
    assert statuses[-1] == 400


@pytest.mark.parametrize("head", [b"", fill(BELOW)], ids=["small head", "large head"])
@pytest.mark.parametrize("chunk", [0, 1, 7, 5000], ids=lambda chunk: f"chunks of {chunk}")
def test_a_body_does_not_count_however_it_is_cut(client: Client, head: bytes, chunk: int) -> None:
    size = 300_000
    for _ in range(2):
        if chunk:
            pieces = (b"%x\r\n" % chunk + b"b" * chunk + b"\r\n" for _ in range(size // chunk))
            sent = CHUNKED[:-2] + head + b"\r\n" + b"".join(pieces) + LAST_CHUNK + b"\r\n"
        else:
            sent = SIZED % size + head + b"\r\n" + b"b" * size
        client.send(sent)
        status, told = client.answer()
        assert (status, told["read"]) == (200, size - size % (chunk or 1))


def test_fields_are_counted(client: Client) -> None:
    for fields, status in ((MAX_FIELDS, 200), (MAX_FIELDS + 1, 400)):
        client.send(GET + b"a: b\r\n" * (fields - 1) + b"\r\n")
        assert client.answer()[0] == status
    assert client.answer() == (0, None)


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize(
    ("head", "body", "read"),
    [
        pytest.param(SIZED % 5 + OFFER + b"\r\n", b"abcde", 5, id="sized"),
        pytest.param(
            CHUNKED[:-2] + OFFER + b"\r\n", b"3\r\nabc\r\n0\r\nupgrade: h2c\r\n\r\n", 3, id="chunked"
        ),
        pytest.param(GET + OFFER + b"\r\n", b"", 0, id="no body"),
        pytest.param(GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"", 0, id="websocket"),
    ],
)
@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_an_offer_of_another_protocol_is_ignored(
    client: Client, head: bytes, body: bytes, read: int, size: int
) -> None:
    sent = (head + body) * 3 + SIZED % 2 + b"\r\n" + b"ab"
    for start in range(0, len(sent), size):
        client.send(sent[start : start + size])
    for _ in range(3):
        status, told = client.answer()
        assert (status, told["read"]) == (200, read)
        assert "upgrade" not in told["names"]
        assert "host" in told["names"]
    assert client.answer()[1]["read"] == 2


def test_what_follows_an_offer_is_the_body_even_if_it_looks_like_a_request(client: Client) -> None:
    smuggled = GET + b"\r\n"
    client.send(SIZED % len(smuggled) + OFFER + b"\r\n")
    client.send(smuggled)
    assert client.answer()[1]["read"] == len(smuggled)
    client.send(SIZED % 2 + b"\r\nab")
    assert client.answer()[1]["read"] == 2


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked", b"chunked;a=b", b"identity"]
)
def test_a_transfer_coding_that_nobody_undoes_is_refused(client: Client, coding: bytes) -> None:
    client.send(
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + coding + b"\r\n\r\n1\r\nb\r\n0\r\n\r\n"
    )
    assert_refused(client)


@pytest.mark.parametrize("target", [b"example.org:443", b"/"])
def test_this_is_no_proxy(client: Client, target: bytes) -> None:
    client.send(b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert_refused(client)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_trailer_is_no_header(client: Client, *, at_once: bool) -> None:
    trailers = b"Authorization: Bearer a\r\nX-Request-ID: a\r\nContent-Type: a/b\r\nExpect: 100-continue\r\n"
    head, rest = CHUNKED[:-2] + b"Accept: a/b\r\n\r\n", b"1\r\nb\r\n" + LAST_CHUNK + trailers + b"\r\n"
    names = ["host", "transfer-encoding", "accept"]
    for _ in range(2):
        for sent in [head + rest] if at_once else [head, rest]:
            client.send(sent)
        assert client.answer() == (200, {"read": 1, "names": names})


@pytest.mark.parametrize("more", [b"nonsense\r\n", LAST_CHUNK + b"a: b\r\n" * 100_000])
def test_who_has_an_answer_already_gets_no_other_one(client: Client, more: bytes) -> None:
    client.send(CHUNKED.replace(b"/", b"/early", 1))
    assert client.answer()[0] == 200
    client.send(more)
    assert client.answer() == (0, None)


def test_an_answer_that_has_begun_is_cut_off(client: Client) -> None:
    client.send(GET.replace(b"/", b"/half", 1) + b"\r\n")
    while not client._received.endswith(b"\r\n\r\n" + b'{"rea'):
        assert client._receive()
    client.send(b"\x16\x03\x01")
    assert client.answer() == (0, None)
    assert client._received == b'{"rea'


def count_refused() -> float:
    labels = {"route": UNMATCHED_ROUTE, "status": "400", "code": "MALFORMED_REQUEST"}
    return REGISTRY.get_sample_value("leadscore_requests_total", labels) or 0.0


@pytest.mark.parametrize("sent", [b"\x16" * 100_000, GET + fill(100_000)], ids=["no HTTP", "too large"])
def test_a_connection_is_refused_once_however_much_is_sent(client: Client, sent: bytes) -> None:
    before = count_refused()
    client.send(sent)
    assert_refused(client)
    assert count_refused() == before + 1


def test_what_is_no_request_is_told_so_after_an_answer(client: Client) -> None:
    client.send(GET + b"\r\n")
    assert client.answer()[0] == 200
    client.send(b"\x16\x03\x01")
    assert_refused(client)


def test_what_is_cancelled_says_nothing_but_what_was_answered_before_it_stays(client: Client) -> None:
    client.send(GET + b"\r\n" + GET.replace(b"/", b"/cancelled", 1) + b"\r\n" + GET + b"\r\n")
    assert client.answer()[0] == 200
    assert client.answer() == (0, None)
    assert client._received == b""


def test_who_meets_a_failure_of_the_service_is_not_told_that_the_request_is_wrong() -> None:
    before = count_refused()
    with serve_app(tell_without_memory) as base, closing(Client(split_address(base))) as client:
        client.send(GET + b"\r\n")
        assert client.answer() == (0, None)
    assert count_refused() == before
