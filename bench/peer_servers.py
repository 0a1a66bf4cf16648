"""Installs the peers of `make bench-peers`, each in a virtual environment of its own; starts and stops them.

The environments are kept between runs. All have the scikit-learn, NumPy and joblib of this checkout, so that
they load the very same model. A peer that cannot be installed or started raises `PeerFailedError` with the
reason, which is a result like any other.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from bench.load import ask, build_request
from bench.peer_protocols import Peer, Rows
from bench.servers import ONE_THREAD, Server

_APPS = Path(__file__).parent / "peer_apps"
_SAME_AS_OURS = ("scikit-learn", "numpy", "joblib")
_SECONDS_TO_READY = 120
_QUIET = {"BENTOML_DO_NOT_TRACK": "True", "MLFLOW_DISABLE_TELEMETRY": "true",
          "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # fmt: skip


class PeerFailedError(Exception):
    """A peer does not install, start or answer; the message is one line that says why."""


def install_peer(peer: Peer, directory: Path) -> Path:
    """Returns the Python of the peer's environment in `directory`, made if it is not there.

    Raises:
        PeerFailedError: pip could not install the requirements.
    """
    python, installed = directory / "bin" / "python", directory / "installed.txt"
    wanted = [*peer.requirements, *(f"{name}=={version(name)}" for name in _SAME_AS_OURS)]
    if installed.exists() and installed.read_text().split("\n") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    run = subprocess.run([*pip, *wanted], check=False, capture_output=True, text=True)
    if run.returncode != 0:
        raise PeerFailedError(f"does not install: {_find_reason(run.stderr)}")
    installed.write_text("\n".join(wanted))
    return python


@contextmanager
def start_peer(peer: Peer, python: Path, model: Path, probe: Rows) -> Iterator[Server]:
    """Starts the peer's application with `model`, a joblib file, and waits until it answers `probe`.

    Its home and working directory are temporary. What it started ends with it.

    Raises:
        PeerFailedError: it ended, or did not answer in time.
    """
    began, port = time.perf_counter(), _find_free_port()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
        (Path(home) / "log").open("w+") as log,
    ):
        process = subprocess.Popen(
            [python.absolute(), _APPS / f"{peer.name}_app.py", model.absolute(), str(port)],
            cwd=home,
            env={**os.environ, **ONE_THREAD, **_QUIET, "HOME": home, "RAY_TMPDIR": home,
                 "PATH": f"{python.parent.absolute()}:{os.environ['PATH']}"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            while not _answers(peer, port, probe):
                if process.poll() is not None or time.perf_counter() - began > _SECONDS_TO_READY:
                    log.seek(0)
                    raise PeerFailedError(f"does not start: {_find_reason(log.read())}")
                time.sleep(0.1)
            yield Server(peer.name, port, process.pid, time.perf_counter() - began)
        finally:
            _stop(process)


def read_version(peer: Peer, python: Path) -> str:
    """Returns the installed version of the peer."""
    code = f"from importlib.metadata import version; print(version({peer.name!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _answers(peer: Peer, port: int, probe: Rows) -> bool:
    request = build_request(peer.encode(probe), peer.path)
    try:
        peer.decode(asyncio.run(asyncio.wait_for(ask(port, request), 10)))
    except (OSError, RuntimeError, LookupError, TypeError, ValueError):
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Some leave children behind: the session it was started as is ended with it.
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _find_reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:200]
