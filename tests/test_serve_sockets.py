"""Where the service listens, and why one does not start: one line that says what to change."""

import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from app.errors import SettingsError
from app.serve import bind
from tests.service import PATIENCE_SECONDS, PREDICT, Service, publish_crm_model, refuse_to_start


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_that_another_takes_while_the_service_starts_is_refused(tmp_path: Path, workers: str) -> None:
    with socket.socket() as other, socket.create_server(("127.0.0.1", 0)) as database:
        database.settimeout(PATIENCE_SECONDS)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        url = f"postgresql://127.0.0.1:{database.getsockname()[1]}/crm"
        service = Service(tmp_path, url, tmp_path, PORT=str(port), WORKERS=workers)
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


def test_an_application_that_cannot_be_built_ends_the_start(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from app import cli, main\n"
        "def fail(*_, **__):\n"
        "    raise OverflowError\n"
        "main.Deprecation.__init__ = fail\n"
        "sys.argv = ['leadscore', 'serve']\n"
        "cli.main()"
    )
    service = Service(tmp_path, "postgresql://u@127.0.0.1:1/x", tmp_path / "models", command=("-c", code))
    service.launch()
    try:
        assert service.wait() != 0
    finally:
        service.kill()
    assert "listens on" not in service.printed.decode()
    assert "Application startup failed" in service.stderr.read_text().splitlines()[-1]


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
