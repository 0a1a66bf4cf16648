"""Clients that are slow: cut off at their deadline, counted, and nobody else notices."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress

import httpx2
import pytest

from tests.in_process import build_settings, serve
from tests.service import PREDICT, publish_crm_model

DEADLINE_SECONDS = 0.4
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
