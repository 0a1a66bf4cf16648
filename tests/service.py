"""The real service as a process of its own, a CRM of a few leads, and a client that puts it under load.

The client speaks HTTP over a bare socket: it must be fast, and know exactly which requests were answered.
"""

import asyncio
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psycopg
from click.testing import CliRunner

from app.ai.domain import InputColumn
from app.ai.features import FeatureSet, FeatureSpec
from app.cli import cli
from bench.servers import worker_pids
from tests.model_files import publish

ROOT = Path(__file__).parent.parent
PREDICT = "/ai/advanced-ml/predict-batch"
PATIENCE_SECONDS = 60.0  # half of what pytest leaves a test: who waits in vain is to say what for

FEATURES = FeatureSet(
    tuple(
        FeatureSpec(name, "value", (InputColumn(name, "number"),), {}, f"The number {name}.")
        for name in ("gpa", "touchpoint_count", "minutes_on_site")
    )
)


def publish_crm_model(directory: Path) -> Path:
    """Publishes a small model over three columns of the default lead source."""
    publish(directory, feature_set=FEATURES.to_json())
    return directory


def add_leads(url: str, count: int) -> list[str]:
    """Adds leads with nothing personal; returns their external references."""
    with psycopg.connect(url) as connection:
        connection.execute(
            "INSERT INTO people (id, external_ref, gpa, created_at)"
            " SELECT gen_random_uuid(), 'load_' || n, 2.5, now() - interval '30 days'"
            " FROM generate_series(1, %s) n",
            [count],
        )
    return [f"load_{number}" for number in range(1, count + 1)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Asks again until the condition holds; the message of a failure quotes it."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_SECONDS, f"in vain: {inspect.getsource(condition).strip()}"
        time.sleep(0.02)


def count_events(url: str) -> dict[str, int]:
    """Returns how many rows `ai_events` has for each request ID."""
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT request_id, count(*) FROM ai_events WHERE request_id IS NOT NULL GROUP BY 1"
        )
        return dict(rows.fetchall())


def refuse_to_start(database_url: str, folder: Path, **settings: str) -> list[str]:
    """What a service prints that does not start."""
    environment = {"DATABASE_URL": database_url, "VAR_DIR": str(folder / "var"), **settings}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        result = CliRunner().invoke(cli, ["serve"], env=environment)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert result.exit_code == 1
    return result.stderr.replace("Error: ", "").strip().splitlines()


class Service:
    """`python -m app.cli serve` in a process group of its own; leaving the context kills what is left.

    `command` is what Python is to run instead, which announces itself in the same words; `cwd` where.
    """

    def __init__(
        self,
        directory: Path,
        database_url: str,
        model_dir: Path,
        *,
        command: Sequence[str] = ("-m", "app.cli", "serve"),
        cwd: Path = ROOT,
        **environment: str,
    ) -> None:
        self._command, self._cwd = command, cwd
        self.var_dir = directory / "var"
        self.stderr = directory / "stderr.log"
        self.printed = b""
        inherited = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
        ours = {
            "DATABASE_URL": database_url,
            "ML_MODEL_DIR": str(model_dir),
            "VAR_DIR": str(self.var_dir),
            "PORT": "0",
            "DRAIN_SECONDS": "0",
        }
        self._environment = {**inherited, **ours, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def launch(self) -> None:
        """Starts the service and waits for nothing."""
        with self.stderr.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, *self._command],
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=self._cwd,
                env=self._environment,
                start_new_session=True,
            )

    def start(self) -> Self:
        """Starts the service and waits until it says where it listens."""
        self.launch()
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(rb"listens on (?:unix|http://[^ ]*):(\S+)", line):
                self.port = int(found[1]) if found[1].isdigit() else 0
                return self
        raise AssertionError(f"the service did not start: {self.stderr.read_text()[-3000:]}")

    @property
    def pid(self) -> int:
        """The process that was started."""
        assert self._process is not None
        return self._process.pid

    def has_ended(self) -> bool:
        """Tells whether the process that was started is no more."""
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """Kills every process of the service with SIGKILL."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._collect()

    def stop(self) -> int:
        """Asks the service to end; returns its exit status."""
        self.send(signal.SIGTERM)
        return self.wait()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process that was started."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Waits for the end; returns the exit status."""
        return self._collect()

    def worker_pids(self) -> set[int]:
        """Returns the processes that serve, if there are several."""
        assert self._process is not None
        return set(worker_pids(self._process.pid))

    def _collect(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        status = self._process.wait(30)
        self.printed += self._process.stdout.read()
        self._process.stdout.close()
        self._process = None
        return status


class Connection:
    """One kept-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(
        self, method: str, path: str, body: bytes = b"", headers: Iterable[tuple[str, str]] = ()
    ) -> tuple[int, bytes, bytes]:
        """Returns status, head and body; raises when the connection ends before the last byte."""
        lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (("Content-Type", "application/json"), *headers)]
        self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length is not None, head
        return int(head[9:12]), head, await self._reader.readexactly(int(length[1]))

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


class Load:
    """Requests of many kinds over several connections; `answered` holds statuses by request ID."""

    def __init__(self, name: str, lead_ids: Sequence[str]) -> None:
        self.answered: dict[str, int] = {}
        self._name = name
        self._lead_ids = lead_ids
        self._numbers = itertools.count()

    async def run(self, port: int, requests: int, connections: int = 16) -> None:
        """Sends until `requests` more are answered, or the service is gone."""
        goal = len(self.answered) + requests
        await asyncio.gather(*(self._use_connection(port, goal) for _ in range(connections)))

    async def _use_connection(self, port: int, goal: int) -> None:
        try:
            connection = await Connection.open(port)
        except OSError:
            return
        try:
            while len(self.answered) < goal:
                number = next(self._numbers)
                request_id = f"{self._name}-{number}"
                body = self._build_body(number)
                status, _, _ = await connection.ask("POST", PREDICT, body, [("X-Request-ID", request_id)])
                self.answered[request_id] = status
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            await connection.close()

    def _build_body(self, number: int) -> bytes:
        lead_id = self._lead_ids[number % len(self._lead_ids)]
        kinds: tuple[Any, ...] = (
            [lead_id],
            {"lead_ids": [lead_id, "nobody"]},
            [],
            [lead_id, 1],
            {"wrong": 1},
        )
        return json.dumps(kinds[number % len(kinds)]).encode()
