"""What the service says, and how it ends: by signals, as ops send them."""

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx2
import psycopg
import pytest

from tests.service import (
    PATIENCE_SECONDS,
    PREDICT,
    Load,
    Service,
    add_leads,
    count_events,
    publish_crm_model,
    wait_until,
)


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Service:
    return Service(tmp_path, database_url, tmp_path, DRAIN_SECONDS="2")


@pytest.mark.parametrize(
    ("workers", "send"), [("1", os.kill), ("2", os.kill), ("2", os.killpg)], ids=["one", "two", "all at once"]
)
def test_sigterm_fails_readiness_first_and_closes_the_listener_last(
    database_url: str, tmp_path: Path, workers: str, send: Callable[[int, int], None]
) -> None:
    models = publish_crm_model(tmp_path / "models")
    each_its_own = httpx2.Limits(max_keepalive_connections=0)
    with (
        Service(tmp_path, database_url, models, DRAIN_SECONDS="3", WORKERS=workers) as service,
        # One client: making one takes longer than a request, and all have to be answered in the drain.
        httpx2.Client(base_url=f"http://127.0.0.1:{service.port}", limits=each_its_own) as client,
    ):
        assert "connection" not in client.get("/readyz").headers
        send(service.pid, signal.SIGTERM)
        wait_until(lambda: client.get("/readyz").status_code == 503)
        refused = client.get("/readyz")
        assert refused.json()["error_code"] == "DRAINING"
        for _ in range(20):  # by either worker
            answered = client.get("/livez")
            assert (answered.status_code, answered.headers["connection"]) == (200, "close")
        health = client.get("/ai/advanced-ml/health")
        assert (health.status_code, health.json()["reason"]) == (503, "draining")
        service.send(signal.SIGTERM)
        assert service.wait() == 0


@pytest.mark.parametrize(
    ("source", "ids"),
    [("lead_source", b'["lead_1", "lead_2", "nobody"]'), ("lead_training", b'["YOUR_LEAD_ID"]')],
)
def test_the_lines_to_try_ask_for_leads_of_the_demo_only_where_it_is_served(
    database_url: str, tmp_path: Path, source: str, ids: bytes
) -> None:
    with Service(tmp_path, database_url, tmp_path, LEAD_SOURCE=source) as service:
        assert service.stop() == 0
    assert b"-d '" + ids + b"'\n" in service.printed


def test_who_is_not_answered_before_the_end_is_told_nothing_and_leaves_an_event(
    database_url: str, tmp_path: Path
) -> None:
    models = publish_crm_model(tmp_path / "models")
    patient = {"DRAIN_SECONDS": "0", "AI_CLIENT_DEADLINE_SECONDS": "60"}
    with Service(tmp_path, database_url, models, **patient) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_SECONDS) as client:
            head = f"POST {PREDICT} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            client.sendall(f'{head}X-Request-ID: half\r\nContent-Length: 50\r\n\r\n["lead_1"'.encode())
            assert httpx2.get(f"http://127.0.0.1:{service.port}/livez").status_code == 200
            service.send(signal.SIGTERM)
            assert client.recv(65536) == b""
        assert service.wait() == 0
    with psycopg.connect(database_url) as connection:
        events = connection.execute(
            "SELECT meta->>'error_code', meta->>'status' FROM ai_events WHERE request_id = 'half'"
        ).fetchall()
    assert events == [("CLIENT_CLOSED_REQUEST", "499")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_end_it_in_order_without_a_drain(service: Service, number: signal.Signals) -> None:
    with service:
        service.send(number)
        assert service.wait() == 0


def test_the_end_of_a_terminal_is_nothing_to_a_service_that_ignores_it(
    database_url: str, tmp_path: Path
) -> None:
    ignoring = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom app.cli import cli; cli(['serve'])"
    )
    with Service(tmp_path, database_url, tmp_path, command=("-c", ignoring)) as service:
        service.send(signal.SIGHUP)
        assert httpx2.get(f"http://127.0.0.1:{service.port}/livez").status_code == 200
        assert service.stop() == 0


SERVE_AND_SIGNAL = """
import signal
from app.serve import serve
from app.settings import load_settings
serve(load_settings())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.raise_signal(number)
"""
"""Sends itself further signals when the first one has ended the service."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_during_the_start_ends_it_and_no_other_cuts_the_end_short(
    tmp_path: Path, number: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the start waits for what this database says
        silent.settimeout(PATIENCE_SECONDS)
        url = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/crm"
        service = Service(tmp_path, url, tmp_path, command=("-c", SERVE_AND_SIGNAL))
        service.launch()
        try:
            with silent.accept()[0]:
                service.send(number)
                assert service.wait() == 0
        finally:
            service.kill()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stalled_reader_of_the_log_stops_neither_the_service_nor_its_end(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    os.mkfifo(tmp_path / "stderr.log")
    reader = os.open(tmp_path / "stderr.log", os.O_RDONLY | os.O_NONBLOCK)
    filler = os.open(tmp_path / "stderr.log", os.O_WRONLY | os.O_NONBLOCK)
    with Service(tmp_path, database_url, tmp_path, WORKERS=workers) as service:
        with suppress(BlockingIOError):
            while True:
                os.write(filler, b"x")
        for _ in range(50):
            assert httpx2.get(f"http://127.0.0.1:{service.port}/livez").status_code == 200
        assert service.stop() == 0
    os.close(filler)
    os.close(reader)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_last_lines_of_every_worker_are_written(database_url: str, tmp_path: Path, workers: str) -> None:
    with Service(tmp_path, database_url, tmp_path, WORKERS=workers) as service:
        assert service.stop() == 0
    assert service.stderr.read_text().count("Finished server process") == int(workers)


def read_limits(pid: int) -> str:
    return (Path("/proc") / str(pid) / "limits").read_text()


async def test_what_was_answered_before_sigquit_is_recorded_once(database_url: str, tmp_path: Path) -> None:
    """SIGQUIT is not heard: it ends the service where it stands, as SIGKILL does, and leaves no core."""
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell ignores it for what it starts in the background
    load = Load("quit", add_leads(database_url, 10))
    with Service(tmp_path, database_url, publish_crm_model(tmp_path / "models")) as service:
        await load.run(service.port, 200)
        assert "Max core file size        0                    0" in read_limits(service.pid)
        service.send(signal.SIGQUIT)
        assert service.wait() == -signal.SIGQUIT
        service.start()
        assert service.stop() == 0
    assert load.answered.keys() <= count_events(database_url).keys()
    assert set(count_events(database_url).values()) == {1}
