"""Clients that are slow: cut off at their deadline, counted, and nobody else notices."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import httpx2
import pytest
from starlette.types import Receive, Scope, Send

from app.drain import Drain
from app.http_protocol import ProblemProtocol
from tests.in_process import build_settings, serve, serve_app
from tests.service import PREDICT, publish_crm_model, wait_until

DEADLINE_SECONDS = 0.4
DEADLINE_WITH_A_PAUSE_SECONDS = 1.5
PATIENCE_SECONDS = 15.0
HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n".encode()


@pytest.fixture(scope="module")
def base(demo_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("slow")
    publish_crm_model(folder / "models")
    with serve(build_settings(folder, demo_url, ai_client_deadline_seconds=DEADLINE_SECONDS)) as base:
        yield base


def connect(base: str) -> socket.socket:
    host, port = re.findall(r"//([\d.]+):(\d+)", base)[0]
    return socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS)


def read_to_the_end(connection: socket.socket) -> bytes:
    """Returns what comes until the server ends the connection; a time-out is a failure."""
    received = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def count_timeouts(base: str, waited_for: str) -> float:
    text = httpx2.get(f"{base}/metrics").text
    found = re.search(rf'leadscore_client_timeouts_total{{waited_for="{waited_for}"}} ([\d.]+)', text)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="idle"),
        pytest.param(b"\r\n", id="nothing but a line end"),
        pytest.param(b"POST /ai", id="half a request line"),
        pytest.param(HEAD, id="headers without an end"),
        pytest.param(HEAD + b"Content-Length: 50\r\n\r\n", id="no body"),
        pytest.param(HEAD + b'Content-Length: 50\r\n\r\n["lead_1"', id="short body"),
        pytest.param(HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n["loa\r\n', id="chunks without an end"),
    ],
)
def test_a_request_that_does_not_arrive_is_cut_off_and_counted(base: str, sent: bytes) -> None:
    before = count_timeouts(base, "request")
    with closing(connect(base)) as connection:
        connection.sendall(sent)
        assert read_to_the_end(connection) == b""
    assert count_timeouts(base, "request") == before + 1


@pytest.mark.parametrize("at", [5, len(HEAD) + 25])
def test_a_trickle_does_not_extend_the_deadline(base: str, at: int) -> None:
    with closing(connect(base)) as connection:
        request = HEAD + b"Content-Length: 5000\r\n\r\n" + b" " * 5000
        connection.sendall(request[:at])
        ended = threading.Event()

        def trickle() -> None:
            with suppress(OSError):
                for place in range(at, len(request)):
                    if ended.wait(DEADLINE_SECONDS / 20):
                        return
                    connection.sendall(request[place : place + 1])

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert read_to_the_end(connection) == b""
        finally:
            ended.set()
            thread.join()


def test_a_second_request_has_a_deadline_of_its_own(base: str) -> None:
    body = b'["lead_1"]'
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with closing(connect(base)) as connection:
        connection.sendall(whole)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(whole[:-1])
        assert read_to_the_end(connection) == b""


def test_a_connection_that_waits_for_its_next_request_is_left_to_the_keep_alive_timeout(base: str) -> None:
    before = count_timeouts(base, "request")
    with closing(connect(base)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: test\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert read_to_the_end(connection) == b""
    assert count_timeouts(base, "request") == before


def test_a_reader_that_stalls_is_cut_off_and_counted(base: str) -> None:
    before = count_timeouts(base, "reader")
    with closing(connect(base)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with suppress(OSError):
            while True:  # until nobody takes any more, because nobody takes the answers
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: test\r\n\r\n" * 200)
    assert count_timeouts(base, "reader") == before + 1


class Pausing:
    """An application whose event loop stands still where the operating system stops one: waiting for sockets.

    What comes during a pause is then read after the timers that are due have rung.
    """

    def __init__(self) -> None:
        self._seen, self._wake = socket.socketpair()
        self._paused, self._resumed = threading.Event(), threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            asyncio.get_running_loop().add_reader(self._seen, self._stand_still)
            drain = Drain(0.0, time.monotonic)
            scope["state"].update(client_deadline_seconds=DEADLINE_WITH_A_PAUSE_SECONDS, drain=drain)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            asyncio.get_running_loop().remove_reader(self._seen)
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (await receive())["more_body"]:
            pass
        head = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body"})

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._wake.send(b"p")
        assert self._paused.wait(PATIENCE_SECONDS)
        try:
            yield
        finally:
            self._resumed.set()

    def close(self) -> None:
        self._seen.close()
        self._wake.close()

    def _stand_still(self) -> None:
        self._seen.recv(1)
        self._paused.set()
        self._resumed.wait(PATIENCE_SECONDS)


class ShortKeepAlive(ProblemProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive = DEADLINE_WITH_A_PAUSE_SECONDS  # type: ignore[assignment]


def test_what_came_during_a_pause_is_read_before_anybody_is_found_too_slow() -> None:
    request = HEAD + b"Content-Length: 4\r\n\r\nbody"
    with closing(Pausing()) as service, serve_app(service, ShortKeepAlive) as base, ExitStack() as stack:
        new, half, kept, slow = (stack.enter_context(closing(connect(base))) for _ in range(4))
        half.sendall(request[:-1])
        slow.sendall(request[:-1])
        kept.sendall(request)
        assert kept.recv(65536).startswith(b"HTTP/1.1 200")
        with service.paused():
            new.sendall(request)
            half.sendall(request[-1:])
            kept.sendall(request)
            resumes_at = time.monotonic() + 1.2 * DEADLINE_WITH_A_PAUSE_SECONDS
            wait_until(lambda: time.monotonic() > resumes_at)
        for connection in (new, half, kept):
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            assert read_to_the_end(connection) == b""
        assert read_to_the_end(slow) == b""
