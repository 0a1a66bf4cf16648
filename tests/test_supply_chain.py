"""Where the software comes from, and that nothing more comes in: locks, bill of materials, start, image."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx2
import pytest

from app.probe import is_alive
from app.settings import Settings
from tests.service import PREDICT, ROOT, Service

REQUIREMENT = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ]+)(.*?)(?=^[a-z0-9]|\Z)", re.MULTILINE | re.DOTALL)
PROGRAM_OF_OURS = re.compile(r'initdb |sh -c "\$@" & sh postgres$|python[0-9.]* ')
WAYS_OUT = {
    "urllib": "import urllib.request; urllib.request.urlopen('http://192.0.2.1/model.skops')",
    "a name": "import socket; socket.getaddrinfo('example.org', 443)",
    "asyncio": "import asyncio; asyncio.run(asyncio.open_connection('192.0.2.1', 443))",
    "httpx2": "import asyncio, httpx2; asyncio.run(httpx2.AsyncClient().get('https://192.0.2.1/'))",
    "datagrams": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "caught": "import socket\ntry: socket.create_connection(('192.0.2.1', 9))\nexcept OSError: pass",
}


def pinned(lock: str) -> dict[tuple[str, str], set[str]]:
    """Name and version of each requirement of a lock file, and the SHA-256 it may have."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    return {
        (name, version): set(re.findall(r"--hash=sha256:([0-9a-f]{64})", rest))
        for name, version, rest in REQUIREMENT.findall(text)
    }


def build_bill(path: Path) -> bytes:
    command = ["make", "--silent", "--old-file", ".venv/.dev", "sbom", f"SBOM={path}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return path.read_bytes()


def test_the_bill_of_materials_has_every_pinned_package_with_its_hashes(tmp_path: Path) -> None:
    written = build_bill(tmp_path / "one.json")
    bill = json.loads(written)
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "lead-scoring")
    listed = {
        (component["name"], component["version"]): {
            entry["content"]
            for reference in component["externalReferences"]
            for entry in reference.get("hashes", ())
            if entry["alg"] == "SHA-256"
        }
        for component in bill["components"]
    }
    assert len(listed) > 40
    assert listed == pinned("requirements.lock")
    assert build_bill(tmp_path / "two.json") == written


def test_what_serves_is_pinned_the_same_way_in_every_lock() -> None:
    serving = pinned("requirements.lock").items()
    assert serving <= pinned("requirements-training.lock").items()
    assert serving <= pinned("requirements-dev.lock").items()


def guarded(folder: Path) -> Mapping[str, str]:
    paths = [str(ROOT / "tests" / "network_guard"), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "NETWORK_GUARD_NOTES": str(folder / "guard.txt"),
    }


def notes(folder: Path) -> list[str]:
    return (folder / "guard.txt").read_text(encoding="utf-8").splitlines()


def test_a_service_without_any_setting_starts_and_scores_without_leaving_this_machine(
    make_server_dir: Callable[[], Path], tmp_path: Path
) -> None:
    environment = guarded(tmp_path) | {"DATABASE_URL": "", "AI_RATE_LIMIT": "", "WORKERS": "2"}
    with Service(make_server_dir(), "", ROOT / "models", **environment) as service:
        url = f"http://127.0.0.1:{service.port}"
        assert httpx2.get(f"{url}/readyz").status_code == 200
        answer = httpx2.post(f"{url}{PREDICT}", json=["lead_1", "lead_2"]).json()
        assert answer["successful_predictions"] == 2
        assert service.stop() == 0
    noted = notes(tmp_path)
    assert noted.count("guarded") >= 2, "the service and what its workers fork from"
    assert not [line for line in noted if line.startswith("refused")]
    programs = [line.removeprefix("program ") for line in noted if line.startswith("program")]
    assert programs
    assert not [words for words in programs if not PROGRAM_OF_OURS.match(words)]


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_guard_notices_every_way_out(tmp_path: Path, way: str) -> None:
    environment = {**os.environ, **guarded(tmp_path)}
    command = [sys.executable, "-c", WAYS_OUT[way]]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert [line for line in notes(tmp_path) if line.startswith("refused")]
    assert (ended.returncode == 0) is (way == "caught")


class Livez(BaseHTTPRequestHandler):
    """Answers on one path as it is told."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/livez" else 404)
        self.end_headers()


Stage = list[tuple[str, str]]


def stages() -> tuple[Stage, Stage]:
    """The instructions of the image that builds and of the one that serves."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    instructions = [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]
    first, second = [place for place, (word, _) in enumerate(instructions) if word == "FROM"]
    assert first == 0
    return instructions[:second], instructions[second:]


def test_the_image_runs_as_a_user_who_owns_nothing_but_the_data() -> None:
    _, serving = stages()
    users = [place for place, (word, _) in enumerate(serving) if word == "USER"]
    (created,) = [rest for word, rest in serving if word == "RUN"]
    made = re.search(r"useradd --system --uid ([1-9]\d*) --no-create-home leadscore", created)
    assert made is not None
    assert [serving[place] for place in users] == [("USER", made[1])]
    # Every file is there before the user is, so it is root's; the one directory that is given away is /data.
    assert not [word for word, _ in serving[users[0] :] if word in ("COPY", "ADD", "RUN")]
    assert re.findall(r"-o leadscore (\S+)", created) == ["/data"]
    assert [rest for word, rest in serving if word == "VOLUME"] == ["/data"]
    assert "VAR_DIR=/data" in next(rest for word, rest in serving if word == "ENV")
    changes_owner_or_mode = re.compile(r"chown|chmod|setfacl|usermod|sudo")
    assert not [rest for _, rest in serving if changes_owner_or_mode.search(rest)]


def test_nobody_but_root_may_write_to_what_the_image_serves() -> None:
    build, serving = stages()
    assert build[-1] == ("RUN", "chmod -R go-w .")
    assert [rest for word, rest in build if word == "WORKDIR"] == ["/app"]
    copied = [rest for word, rest in serving if word in ("COPY", "ADD")]
    assert all(re.match("--from=build /app/", source) for source in copied)
    assert {source.split()[-1] for source in copied} >= {".venv", "app", "models", "alembic"}
    assert not [rest for word, rest in build if word in ("COPY", "ADD") and "--ch" in rest]


def test_the_image_installs_what_is_pinned_and_nothing_else() -> None:
    installs = [rest for stage in stages() for word, rest in stage if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("--require-hashes" in line or "--no-deps --no-build-isolation" in line for line in installs)


def ask_as_the_image_does(**environment: str) -> int:
    """Runs the health check of the image; returns its exit status."""
    (check,) = [rest for word, rest in stages()[1] if word == "HEALTHCHECK"]
    program = [sys.executable, *json.loads(check.partition("CMD")[2])[1:]]
    inherited = {name: value for name, value in os.environ.items() if name not in {"HOST", "PORT"}}
    return subprocess.run(program, env={**inherited, **environment}, cwd=ROOT, check=False).returncode


def test_the_image_is_asked_whether_it_lives_past_every_proxy() -> None:
    with HTTPServer(("127.0.0.1", 0), Livez) as server:
        port = str(server.server_port)
        answering = Thread(target=server.serve_forever)
        answering.start()
        try:
            for Livez.status, ends_with in ((200, 0), (503, 1)):
                assert ask_as_the_image_does(PORT=port, http_proxy="http://127.0.0.1:1") == ends_with
        finally:
            server.shutdown()
            answering.join()


@pytest.mark.parametrize("host", ["unix:", "::1", "::", "127.0.0.2", "0.0.0.0"])  # noqa: S104 - of a test
def test_the_image_is_asked_where_the_service_listens(tmp_path: Path, host: str) -> None:
    where = f"{host}{tmp_path / 'service.sock'}" if host == "unix:" else host
    with Service(tmp_path, "postgresql://u@127.0.0.1:1/x", ROOT / "models", HOST=where) as service:
        port = str(service.port or "")  # a socket has none
        assert ask_as_the_image_does(HOST=where, PORT=port) == 0
        assert service.stop() == 0
    assert ask_as_the_image_does(HOST=where, PORT=port) == 1


def test_the_image_is_asked_at_the_defaults_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(address: tuple[str, int], *_: object) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", note)
    assert not is_alive("", "")
    fields = Settings.model_fields
    assert asked == [(fields["host"].default, fields["port"].default)]
