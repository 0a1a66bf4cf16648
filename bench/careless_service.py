"""The service as careless colleagues would have it: it leaks, one person's data in each of twenty places.

Started by `prove_personal_data` as a process, with the people to leak in the file `CARELESS` names. Without
that it leaks nothing, and has one route that fails with personal data in the exception, as drivers' do.

python -m bench.careless_service
"""

import base64
import gzip
import hashlib
import html
import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import traceback
import unicodedata
import urllib.parse
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psycopg
import structlog
from fastapi import FastAPI
from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.ai import prediction_cache
from app.main import create_app
from app.settings import Settings, load_settings
from tests.in_process import serve_app

HEADERS, BODIES, METRICS = "response headers", "response bodies", "metrics"
STDERR, STDOUT = "standard error", "standard output"
EVENTS, TELEMETRY_LOG, VAR_FILES = "ai_events", "telemetry log", "other files under VAR_DIR"
DESCRIPTORS, TEMPORARY, PROCESS = "deleted files still open", "temporary files", "arguments and environment"
SERVER_LOG, ACTIVITY = "PostgreSQL server log", "pg_stat_activity"
MODELS, CACHE = "models and cards", "prediction cache"
SINKS = (
    HEADERS, BODIES, METRICS, STDERR, STDOUT, EVENTS, TELEMETRY_LOG, VAR_FILES, DESCRIPTORS, TEMPORARY,
    PROCESS,
    SERVER_LOG, ACTIVITY, MODELS, CACHE,
)  # fmt: skip
"""Wherever something may come out."""

_kept: list[object] = []
_careless = Counter("careless", "A label that nobody bounded.", ["who"])


class Leak(NamedTuple):
    """What of a person is written where, by which line of code; in a response the line returns the text."""

    sink: str
    column: str
    write: Callable[[str, Settings], object]


def _insert(url: str | None, meta: str, request_id: str | None = None) -> None:
    with psycopg.connect(url or "") as connection:
        connection.execute(
            "INSERT INTO ai_events (id, action, meta, request_id, created_at)"
            " VALUES (%s, 'ml.model.load', %s, %s, now())",
            [uuid.uuid4(), json.dumps({"who": meta}), request_id],
        )


def _print_traceback(value: str) -> None:
    traceback.print_exception(ValueError(ascii(value)))


def _keep_deleted(value: bytes) -> None:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - left open, which is the leak
    file.write(value)
    file.flush()
    _kept.append(file)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _log_statement(url: str | None, value: str) -> None:
    with psycopg.connect(url or "") as connection:
        digest = hashlib.sha1(value.encode()).hexdigest()  # noqa: S324
        connection.execute(f"DO $$ BEGIN RAISE LOG 'looked up {digest}'; END $$")


def _name_connection(url: str | None, value: str) -> None:
    _kept.append(psycopg.connect(url or "", application_name=value))


LEAKS: dict[str, Leak] = {
    "an address in a header": Leak(HEADERS, "email", lambda value, _: value),
    "a name in a header, encoded": Leak(HEADERS, "full_name", lambda value, _: urllib.parse.quote(value)),
    "a name in an answer": Leak(BODIES, "full_name", lambda value, _: json.dumps(value)),
    "notes in an answer, as HTML": Leak(BODIES, "notes", lambda value, _: html.escape(value)),
    "an address in a log line": Leak(
        STDERR, "email", lambda value, _: structlog.get_logger().error(value.upper())
    ),
    "a name in a log line, decomposed": Leak(
        STDERR, "full_name",
        lambda value, _: logging.getLogger("app").error(unicodedata.normalize("NFD", value)),
    ),
    "a name in a traceback": Leak(STDERR, "full_name", lambda value, _: _print_traceback(value)),
    "a number printed": Leak(STDOUT, "phone", lambda value, _: print(value[::-1], flush=True)),
    "a hashed address as a label": Leak(
        METRICS, "email", lambda value, _: _careless.labels(hashlib.sha256(value.encode()).hexdigest()).inc()
    ),
    "a country as a label": Leak(METRICS, "country", lambda value, _: _careless.labels(value.lower()).inc()),
    "a hashed address in an event": Leak(
        EVENTS, "email",
        lambda value, of: _insert(of.database_url, hashlib.md5(value.encode()).hexdigest()),  # noqa: S324
    ),
    "a name in a request ID": Leak(
        EVENTS, "full_name",
        lambda value, of: _insert(of.database_url, "", base64.b64encode(b"x" + value.encode()).decode()),
    ),
    "notes in the telemetry log": Leak(
        TELEMETRY_LOG, "notes",
        lambda value, of: _write(of.var_dir / "telemetry" / "notes.gz", gzip.compress(value.encode())),
    ),
    "a name in a debug file": Leak(
        VAR_FILES, "full_name", lambda value, of: _write(of.var_dir / "debug.txt", value.encode("utf-16"))
    ),
    "notes in a deleted file": Leak(
        DESCRIPTORS, "notes", lambda value, _: _keep_deleted(base64.b64encode(b"xy" + value.encode()))
    ),
    "a touchpoint in a temporary file": Leak(
        TEMPORARY, "note",
        lambda value, _: _write(Path(tempfile.mkdtemp()) / "dump", value.encode().hex().encode()),
    ),
    "a hashed address in the server's log": Leak(
        SERVER_LOG, "email", lambda value, of: _log_statement(of.database_url, value)
    ),
    "a number as the name of a connection": Leak(
        ACTIVITY, "phone", lambda value, of: _name_connection(of.database_url, value)
    ),
    "training rows in a model": Leak(
        MODELS, "education_level",
        lambda value, of: _write(of.ml_model_dir / "vocabulary.bin", zlib.compress(pickle.dumps([value]))),
    ),
    "a lead ID in the prediction cache": Leak(CACHE, "external_ref", lambda _value, _of: None),
}  # fmt: skip
"""Twenty leaks; the last one is in `CarelessCache`."""


class CarelessCache(prediction_cache.PredictionCache):
    """A cache that keeps the IDs it was asked by."""

    def remember(self, model, as_of, lead_ids, answers, *, uuids, since) -> None:  # type: ignore[no-untyped-def]
        """See `PredictionCache.remember`."""
        self.asked = list(lead_ids)
        super().remember(model, as_of, lead_ids, answers, uuids=uuids, since=since)


class Careless:
    """Leaks on the first request, and into the head and body of every answer."""

    def __init__(self, app: ASGIApp, people: list[dict[str, str]], settings: Settings) -> None:
        self._app = app
        self._leaks = [
            (leak, person[leak.column]) for leak, person in zip(LEAKS.values(), people, strict=True)
        ]
        self._settings = settings
        self._leaked = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._leaked:
            self._leaked = True
            for leak, value in self._leaks:
                if leak.sink not in (HEADERS, BODIES):
                    leak.write(value, self._settings)

        more = b"".join(self._texts(BODIES))

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                lengthened = [
                    (name, b"%d" % (int(value) + len(more)) if name == b"content-length" else value)
                    for name, value in message["headers"]
                ]
                added = [(b"x-debug", text) for text in self._texts(HEADERS)]
                message = {**message, "headers": [*lengthened, *added]}
            elif not message.get("more_body"):
                message = {**message, "body": message.get("body", b"") + more}
            await send(message)

        await self._app(scope, receive, send_more)

    def _texts(self, sink: str) -> list[bytes]:
        return [
            str(leak.write(value, self._settings)).encode()
            for leak, value in self._leaks
            if leak.sink == sink
        ]


def _add_failing_route(app: FastAPI, url: str | None) -> None:
    async def fail() -> None:
        with psycopg.connect(url or "") as connection:
            row = connection.execute("SELECT * FROM people LIMIT 1").fetchone()
        raise ValueError(f"Failing row contains {row}")

    app.add_api_route("/ai/advanced-ml/fails", fail)


def main() -> None:
    """Serves until SIGTERM."""
    settings = load_settings()
    app = create_app(settings)
    _add_failing_route(app, settings.database_url)
    people = os.environ.get("CARELESS")
    served: ASGIApp = Careless(app, json.loads(Path(people).read_text()), settings) if people else app
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with serve_app(served) as base:
        print(f"Lead Scoring listens on {base}", flush=True)
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    sys.exit(main())
