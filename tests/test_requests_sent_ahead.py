"""Requests that are sent before the answers to those ahead of them are read.

The protocol stands in front of an application whose answers fill the connection, behind one place in flight.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from threading import Thread
from urllib.parse import urlsplit

import pytest
from prometheus_client import REGISTRY
from starlette.types import Receive, Scope, Send

from app.drain import Drain
from app.error_handlers import ErrorBoundary, Problems
from app.http_protocol import ProblemProtocol
from app.middleware.in_flight import Admission, InFlightLimit
from tests.in_process import serve_app
from tests.service import wait_until
from tests.test_http_protocol import Client
from tests.test_telemetry_events import make_record

DEADLINE_SECONDS = 2.0
NO_DEADLINE_SECONDS = 20.0
MORE_THAN_THE_KERNEL_KEEPS = 8_000_000
HEAD, BODY, SMALL = "/head", "/body", "/small"


class Application:
    """Answers with the path and how much it was sent; `begun` has the paths in the order they began in."""

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self.begun: list[str] = []
        self._drain = Drain(0.0, time.monotonic)
        limited = InFlightLimit(
            self._answer, paths={HEAD, BODY, SMALL}, admission=Admission(1), deadline_seconds=5
        )
        self._limited = ErrorBoundary(limited, Problems({}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"].update(client_deadline_seconds=self._deadline_seconds, drain=self._drain)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        scope["state"]["record"] = make_record()
        await self._limited(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.begun.append(path)
        read, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            read, more = read + len(message["body"]), message["more_body"]
        filling = "b" * MORE_THAN_THE_KERNEL_KEEPS
        answer = json.dumps([path, read, filling if path == BODY else ""]).encode()
        head = [(b"content-length", b"%d" % len(answer))]
        if path == HEAD:
            head.append((b"filling", filling.encode()))
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})


class Service:
    """The application, its connections in the order they were made in, and clients of it."""

    def __init__(self, clients: ExitStack, deadline_seconds: float) -> None:
        self.application = Application(deadline_seconds)
        self.connections: list[ProblemProtocol] = []
        self._clients = clients
        self._address = ("", 0)

    @contextmanager
    def served(self) -> Iterator["Service"]:
        connections = self.connections

        class Listed(ProblemProtocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                connections.append(self)

        with serve_app(self.application, Listed) as base:
            url = urlsplit(base)
            self._address = (url.hostname or "", url.port or 0)
            yield self

    def connect(self) -> Client:
        return self._clients.enter_context(closing(Client(self._address)))

    def stall(self, *requests: bytes) -> Client:
        """Returns a client that sent these and does not read, once the answer to the first one waits."""
        client = self.connect()
        client.send(b"".join(requests))
        wait_until(lambda: bool(self.connections) and self.connections[0].flow.write_paused)
        return client


@pytest.fixture
def service() -> Iterator[Service]:
    with ExitStack() as clients, Service(clients, NO_DEADLINE_SECONDS).served() as service:
        yield service


@pytest.fixture
def strict() -> Iterator[Service]:
    with ExitStack() as clients, Service(clients, DEADLINE_SECONDS).served() as service:
        yield service


def post(path: str, body: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body)


def read(client: Client) -> tuple[int, str, int]:
    """Returns the status of the next answer, its path, and how much was sent."""
    status, answer = client.answer()
    return (status, answer[0], answer[1]) if status == 200 else (status, "", 0)


def wait(seconds: float) -> None:
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until)


def count_timeouts(waited_for: str) -> float:
    return REGISTRY.get_sample_value("leadscore_client_timeouts_total", {"waited_for": waited_for}) or 0.0


@pytest.mark.parametrize("large", [HEAD, BODY])
@pytest.mark.parametrize("later", [True, False])
def test_a_reader_that_stalls_takes_nobodys_place_and_is_answered_in_order(
    service: Service, large: str, *, later: bool
) -> None:
    rest = [post(SMALL, b"1"), post(large, b"22"), post(SMALL, b"333"), post(SMALL, b"4444")]
    stalled = service.stall(post(large), *([] if later else rest))
    if later:
        for request in rest:
            stalled.send(request)
    other = service.connect()
    for _ in range(20):
        other.send(post(SMALL))
        assert read(other) == (200, SMALL, 0)
    answers = [read(stalled) for _ in range(5)]
    assert answers == [(200, large, 0), (200, SMALL, 1), (200, large, 2), (200, SMALL, 3), (200, SMALL, 4)]
    stalled.send(post(SMALL, b"55555"))
    assert read(stalled) == (200, SMALL, 5)


def test_a_request_begins_when_its_reader_has_caught_up(service: Service) -> None:
    stalled = service.stall(post(BODY), post(SMALL))
    assert service.application.begun == [BODY]
    assert [read(stalled), read(stalled)] == [(200, BODY, 0), (200, SMALL, 0)]
    assert service.application.begun == [BODY, SMALL]


@pytest.mark.parametrize("leaves", [True, False])
def test_who_does_not_read_is_cut_off_and_what_was_sent_ahead_never_begins(
    strict: Service, *, leaves: bool
) -> None:
    before = count_timeouts("reader")
    stalled = strict.stall(post(BODY), post(SMALL), post(SMALL))
    if leaves:
        stalled.close()
    wait_until(lambda: strict.connections[0].parser is None)
    assert count_timeouts("reader") == before + (not leaves)
    assert strict.application.begun == [BODY]


@pytest.mark.parametrize("comes", [True, False])
def test_a_body_that_waited_for_its_reader_has_its_deadline_from_then_on(
    strict: Service, *, comes: bool
) -> None:
    before = count_timeouts("request")
    request = post(SMALL, b"b" * 200_000)  # more than is read before the request begins
    stalled = strict.stall(post(BODY), request[:100_000])
    wait(0.7 * DEADLINE_SECONDS)
    assert read(stalled) == (200, BODY, 0)
    wait(0.7 * DEADLINE_SECONDS)
    if comes:
        stalled.send(request[100_000:])
    assert read(stalled) == ((200, SMALL, 200_000) if comes else (0, "", 0))
    assert count_timeouts("request") == before + (not comes)


@pytest.mark.parametrize("reads", [True, False])
def test_the_end_waits_for_what_was_sent_ahead_and_no_longer_for_a_reader_than_ever(*, reads: bool) -> None:
    answers: list[tuple[int, str, int]] = []
    with ExitStack() as clients:
        with Service(clients, DEADLINE_SECONDS).served() as service:
            stalled = service.stall(post(BODY), post(SMALL))
            cycle = service.connections[0].cycle

            def read_during_the_end() -> None:
                wait_until(lambda: not cycle.keep_alive)
                while reads and (answer := read(stalled))[0]:
                    answers.append(answer)

            thread = Thread(target=read_during_the_end)
            thread.start()
        thread.join()
    assert answers == ([(200, BODY, 0), (200, SMALL, 0)] if reads else [])
