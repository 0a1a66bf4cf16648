"""Where the service listens, how it ends, and how its workers are replaced: by signals, as ops send them."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import psycopg
import pytest
import uvicorn

from app.errors import SettingsError
from app.serve import Worker, bind
from bench.servers import READABLE, descend
from tests.service import (
    PREDICT,
    Load,
    Service,
    add_leads,
    count_events,
    publish_crm_model,
    refuse_to_start,
)

PATIENCE_SECONDS = 180.0


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Service:
    return Service(tmp_path, database_url, publish_crm_model(tmp_path / "models"), DRAIN_SECONDS="2")


def wait_until(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("workers", "send"), [("1", os.kill), ("2", os.kill), ("2", os.killpg)], ids=["one", "two", "all at once"]
)
def test_sigterm_fails_readiness_first_and_closes_the_listener_last(
    database_url: str, tmp_path: Path, workers: str, send: Callable[[int, int], None]
) -> None:
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, DRAIN_SECONDS="3", WORKERS=workers) as service:
        url = f"http://127.0.0.1:{service.port}"
        assert "connection" not in httpx2.get(f"{url}/readyz").headers
        send(service.pid, signal.SIGTERM)
        wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 503)
        refused = httpx2.get(f"{url}/readyz")
        assert refused.json()["error_code"] == "DRAINING"
        for _ in range(20):  # by either worker
            answered = httpx2.get(f"{url}/livez")
            assert (answered.status_code, answered.headers["connection"]) == (200, "close")
        service.send(signal.SIGTERM)
        assert service.wait() == 0


@pytest.mark.parametrize(
    ("source", "ids"),
    [("lead_source", b'["lead_1", "lead_2", "nobody"]'), ("lead_training", b'["YOUR_LEAD_ID"]')],
)
def test_the_lines_to_try_ask_for_leads_of_the_demo_only_where_it_is_served(
    database_url: str, tmp_path: Path, source: str, ids: bytes
) -> None:
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, LEAD_SOURCE=source) as service:
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
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, command=("-c", ignoring)) as service:
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


def test_sighup_replaces_the_workers_one_by_one(database_url: str, tmp_path: Path) -> None:
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, WORKERS="2") as service:
        url = f"http://127.0.0.1:{service.port}/livez"
        before = service.worker_pids()
        assert len(before) == 2
        service.send(signal.SIGHUP)

        def answers_and_is_replaced() -> bool:
            assert httpx2.get(url).status_code == 200
            return len(service.worker_pids()) == 2 and not before & service.worker_pids()

        wait_until(answers_and_is_replaced)
        assert service.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stalled_reader_of_the_log_stops_neither_the_service_nor_its_end(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    models = publish_crm_model(tmp_path / "models")
    os.mkfifo(tmp_path / "stderr.log")
    reader = os.open(tmp_path / "stderr.log", os.O_RDONLY | os.O_NONBLOCK)
    filler = os.open(tmp_path / "stderr.log", os.O_WRONLY | os.O_NONBLOCK)
    with Service(tmp_path, database_url, models, WORKERS=workers) as service:
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
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, WORKERS=workers) as service:
        assert service.stop() == 0
    assert service.stderr.read_text().count("Finished server process") == int(workers)


def has_ended(pid: int) -> bool:
    """A process that nobody has collected yet has ended, too."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_workers_whose_supervisor_is_killed_end_in_order_and_leave_the_port(
    database_url: str, tmp_path: Path
) -> None:
    leads = add_leads(database_url, 10)
    models = publish_crm_model(tmp_path / "models")
    load = Load("orphans", leads)
    with Service(tmp_path, database_url, models, WORKERS="2") as service:
        await load.run(service.port, 200)
        workers, port = service.worker_pids(), service.port
        service.send(signal.SIGKILL)
        wait_until(lambda: all(has_ended(worker) for worker in workers))
        assert service.wait() == -signal.SIGKILL
    with Service(tmp_path, database_url, models, PORT=str(port)) as again:
        await load.run(again.port, 100)
        assert again.stop() == 0
    assert load.answered.keys() <= count_events(database_url).keys()
    assert set(count_events(database_url).values()) == {1}


def test_a_frozen_worker_holds_up_neither_the_others_nor_the_end(database_url: str, tmp_path: Path) -> None:
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, WORKERS="2") as service:
        first, second = sorted(service.worker_pids())
        os.kill(first, signal.SIGSTOP)
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: bool(service.worker_pids() - {first, second}))
        assert first in service.worker_pids()
        assert service.stop() == 0
        assert has_ended(first)


def test_the_end_does_not_wait_for_a_start(database_url: str, tmp_path: Path) -> None:
    service = Service(tmp_path, database_url, publish_crm_model(tmp_path / "models"), WORKERS="2")
    service.launch()
    try:
        wait_until(lambda: bool(service.worker_pids()))
        first = min(service.worker_pids())
        os.kill(first, signal.SIGSTOP)
        assert service.stop() == 0
        assert has_ended(first)
    finally:
        service.kill()


def test_a_worker_is_alive_until_it_has_been_silent_for_too_long() -> None:
    worker = Worker(uvicorn.Config("app"), [])
    worker.process = multiprocessing.get_context("fork").Process(target=signal.pause)  # type: ignore[assignment]
    assert not worker.is_alive(60)
    worker.start()
    try:
        assert worker.is_alive(0)  # it has only been asked
        assert worker.is_alive(60)
        assert not worker.is_alive(0)
        worker.pong()
        assert worker.is_alive(0)
    finally:
        worker.kill()
        worker.join()
    assert worker.exitcode == -signal.SIGKILL


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


POWERLESS = """
import ctypes, os, sys
for power in range(64):
    ctypes.CDLL(None).prctl(24, power, 0, 0, 0)  # PR_CAPBSET_DROP; an ordinary user has none to drop
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Runs Python without the powers of root, so that the kernel treats it as it treats an ordinary user."""

SERVE_POWERLESS = ("-c", POWERLESS, "-m", "app.cli", "serve")

LOOK = """
import sys
for pid in sys.argv[1:]:
    for name in ("environ", "mem"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                print(name, file.read() if name == "environ" else "", flush=True)
        except PermissionError:
            print(name, "refused", flush=True)
"""


def look_into(pids: Iterable[int]) -> list[str]:
    """Returns what another process of the same user sees of each process: its environment, its memory."""
    command = [sys.executable, "-c", POWERLESS, "-c", LOOK, *map(str, pids)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_other_process_of_its_user_finds_a_secret_of_the_service(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    models = publish_crm_model(tmp_path / "models")
    settings = {"WORKERS": workers, "CANARY": "sings"}
    with Service(tmp_path, database_url, models, command=SERVE_POWERLESS, **settings) as service:
        assert httpx2.get(f"http://127.0.0.1:{service.port}/readyz").status_code == 200
        serving = {service.pid, *service.worker_pids()}
        assert len(serving) == {"1": 1, "2": 3}[workers]
        assert set(look_into(serving)) == {"environ refused", "mem refused"}
        assert "sings" not in "".join(look_into(descend(service.pid)))  # with what helps them
        assert service.stop() == 0


def test_a_service_that_a_bench_starts_is_open_to_whoever_started_it(
    database_url: str, tmp_path: Path
) -> None:
    models = publish_crm_model(tmp_path / "models")
    settings = {"WORKERS": "2", "CANARY": "sings", **READABLE}
    with Service(tmp_path, database_url, models, command=SERVE_POWERLESS, **settings) as service:
        for pid in (service.pid, *service.worker_pids()):
            assert "sings" in "".join(look_into([pid]))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_nothing_out_of_the_current_directory_is_imported(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    models, folder, told = publish_crm_model(tmp_path / "models"), tmp_path / "here", tmp_path / "imported"
    (folder / "app").mkdir(parents=True)
    for name in ("app/__init__.py", "skops.py", "threading.py"):
        (folder / name).write_text(f"open({str(told)!r}, 'a').write(__name__)")
    installed = (str(Path(sys.executable).with_name("leadscore")), "serve")  # -m would look there itself
    with Service(tmp_path, database_url, models, command=installed, cwd=folder, WORKERS=workers) as service:
        assert httpx2.get(f"http://127.0.0.1:{service.port}/readyz").status_code == 200
        assert service.stop() == 0
    assert not told.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_another_takes_while_the_service_starts_is_refused(tmp_path: Path, workers: str) -> None:
    with socket.socket() as other, socket.create_server(("127.0.0.1", 0)) as database:
        database.settimeout(PATIENCE_SECONDS)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        url = f"postgresql://127.0.0.1:{database.getsockname()[1]}/crm"
        models = publish_crm_model(tmp_path / "models")
        service = Service(tmp_path, url, models, PORT=str(port), WORKERS=workers)
        try:
            with ThreadPoolExecutor(1) as threads:
                start = threads.submit(service.start)
                caller, _ = database.accept()  # it has bound its port by now
                other.listen()
                caller.close()
                database.close()
                with pytest.raises(AssertionError, match="the service did not start"):
                    start.result()
            assert service.wait() == 1
        finally:
            service.kill()
    said = service.stderr.read_text()
    reason = "address already in use"
    assert said.endswith(f"Error: PORT: cannot listen on 127.0.0.1:{port} ({reason}); set a free one\n")
    assert "Traceback" not in said


def ask_over(path: Path) -> httpx2.Response:
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
        assert client.get("/readyz").status_code == 200
        return client.post(PREDICT, json=["nobody"])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_unix_socket_serves_and_is_gone_when_the_service_is(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    path = tmp_path / "service.sock"
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, HOST=f"unix:{path}", WORKERS=workers) as service:
        answer = ask_over(path)
        assert (answer.status_code, answer.json()["failed_predictions"]) == (200, 1)
        assert service.stop() == 0
    assert not path.exists()


def test_the_socket_of_a_killed_service_is_taken_over_and_that_of_a_running_one_is_not(
    database_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "service.sock"
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, HOST=f"unix:{path}") as service:
        service.kill()
        assert path.is_socket()
        service.start()
        (refused,) = refuse_to_start(database_url, tmp_path, HOST=f"unix:{path}")
        assert refused == f"HOST: cannot listen on {path} (address already in use)"
        assert ask_over(path).status_code == 200
        assert service.stop() == 0


def test_the_socket_of_a_service_that_starts_or_ends_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "service.sock"
    taken = re.escape(f"HOST: cannot listen on {path} (address already in use)")
    with bind(f"unix:{path}", 0) as listener:
        with pytest.raises(SettingsError, match=taken), bind(f"unix:{path}", 0):
            pass
        listener.listen()
        listener.close()
        with pytest.raises(SettingsError, match=taken), bind(f"unix:{path}", 0):
            pass
        assert path.is_socket()
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "address already in use"),
        ("x" * 200, "af_unix path too long"),
        ("a/b", "no such file or directory"),
    ],
)
def test_a_path_that_cannot_be_a_socket_is_one_line(
    database_url: str, tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "file").write_text("precious")
    path = tmp_path / name
    (line,) = refuse_to_start(database_url, tmp_path, HOST=f"unix:{path}")
    assert line == f"HOST: cannot listen on {path} ({reason})"
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("migrated", [True, False])
def test_a_lead_source_that_is_not_there_is_one_line(
    database_url: str, empty_database_url: str, tmp_path: Path, migrated: bool
) -> None:
    *log, line = refuse_to_start(
        database_url if migrated else empty_database_url, tmp_path, PORT="0", LEAD_SOURCE="crm.nosuch"
    )
    assert line == "LEAD_SOURCE: there is no table or view crm.nosuch with a lead_id of type uuid"
    assert len(log) == (0 if migrated else 1)  # what migrations are missing


def test_a_database_that_is_away_stops_no_start_whatever_the_lead_source(tmp_path: Path) -> None:
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, "postgresql://127.0.0.1:1/crm", models, LEAD_SOURCE="crm.nosuch") as service:
        assert httpx2.get(f"http://127.0.0.1:{service.port}/readyz").status_code == 200
        assert service.stop() == 0
    assert "database_unavailable" in service.stderr.read_text()


def test_a_start_without_models_says_where_they_were_looked_for_and_what_to_do(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name, reason, remedy in (
        ("nowhere", "no_directory", "ML_MODEL_DIR"),
        ("empty", "no_artifact", "train"),
    ):
        with Service(tmp_path, database_url, tmp_path / name) as service:
            assert httpx2.get(f"http://127.0.0.1:{service.port}/readyz").status_code == 503
            assert service.stop() == 0
        lines = service.stderr.read_text().splitlines()
        (told,) = [json.loads(line) for line in lines if "model_not_ready" in line and reason in line]
        assert told["directory"] == str(tmp_path / name)
        assert remedy in told["remedy"]


@pytest.mark.parametrize(
    "host", ["nosuch.invalid", "192.0.2.1", "2001:db8::1", "http://localhost", "[::1]", "a..b", "x" * 100]
)
def test_an_address_that_is_not_this_machines_is_the_fault_of_the_host(
    database_url: str, tmp_path: Path, host: str
) -> None:
    (line,) = refuse_to_start(database_url, tmp_path, HOST=host)
    assert line.startswith(f"HOST: cannot listen on {host} (")
    assert line.endswith("); set an address of this machine")


def test_why_a_service_does_not_start_is_said_after_its_log() -> None:
    code = (
        "import os, structlog\n"
        "from app import serve\n"
        "from app.errors import SettingsError\n"
        "from app.settings import Settings\n"
        "def refuse(*_):\n"
        "    for _ in range(1000):\n"
        "        structlog.get_logger().info('x')\n"
        "    raise SettingsError('no')\n"
        "serve.bind = refuse\n"
        "try:\n"
        "    serve.serve(Settings(_env_file=None))\n"
        "except SettingsError:\n"
        "    os.write(2, b'why')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    *log, last = done.stderr.splitlines()
    assert (len(log), last) == (1000, b"why")
