"""The real application, from the routers to the telemetry log, over a CRM and an event table in memory.

What it cannot lose it keeps (`sink` stands for `ai_events`, `leads` for the CRM); everything else is closed
and opened again by `reopen`, as a restart would. It is asked in process, without a socket, or served by
uvicorn. It never starts a database. For `prove_hostile_input`.
"""

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.ai.circuit_breaker import CircuitBreaker
from app.ai.drift_window import DriftWindow
from app.ai.ml_telemetry import MlTelemetry
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_registry import ModelRegistry
from app.ai.prediction_cache import PredictionCache
from app.ai.predictor import Predictor, ScoringPolicy
from app.ai.score_kernels import installed_kernels
from app.ai.telemetry_log import TelemetryLog
from app.drain import Drain
from app.errors import DatabaseUnavailableError
from app.health import DatabaseProbe, Operations
from app.log_setup import configure_logging
from app.main import create_app
from tests.fakes import FakeClock, FakeEventSink, FakeLeadSource
from tests.in_process import build_settings

HeaderList = list[tuple[bytes, bytes]]
Wrap = Callable[[ASGIApp], ASGIApp]

POLICY = ScoringPolicy(0.6, "max_probability")
CACHE_SECONDS = 300.0
CLIENT_SECONDS = 10.0
MODEL_SECONDS = 3600.0


@dataclass(frozen=True)
class HttpRequest:
    """One request, below the level where anything in it is checked."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


@dataclass(frozen=True)
class HttpAnswer:
    """What came back; `failure` is the exception that reached the server."""

    status: int
    headers: HeaderList
    body: bytes
    failure: Exception | None = None

    def header(self, name: bytes) -> str:
        """Returns the header's value, an empty text without it."""
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == name), "")

    def json(self) -> Any:
        """Returns the body, decoded."""
        return json.loads(self.body)


class InMemoryService:
    """The application over fakes; `wrap` puts something between the server and it: so bugs get in."""

    def __init__(self, folder: Path, leads: dict[str, Any], wrap: Wrap = lambda app: app) -> None:
        self.models_dir = folder / "models"
        self.clock = FakeClock()
        self.leads = FakeLeadSource(leads)
        self.sink = FakeEventSink()
        self._log_dir = folder / "telemetry"
        # Nobody listens at this address, and nobody is asked to connect to it.
        self.fastapi = create_app(build_settings(folder, "postgresql://nobody@127.0.0.1:1/none"))
        configure_logging("CRITICAL")  # refusals by the thousand are not worth a line each
        self._app = wrap(self.fastapi)
        self._state: dict[str, Any] = {}

    @property
    def database_is_up(self) -> bool:
        """Whether leads can be read and events be shipped."""
        return self.leads.error is None

    def set_database(self, *, up: bool) -> None:
        """Takes the database away or brings it back; without it the cache is no longer told of changes."""
        self.leads.error = self.sink.error = None if up else DatabaseUnavailableError()
        self.trust_cache()

    def trust_cache(self) -> None:
        """Does what the change listener does every moment."""
        self.cache.trust_until(self.clock.now + 60 if self.database_is_up else self.clock.now)

    async def open(self, cache: type[PredictionCache] = PredictionCache) -> None:
        """Builds what lives as long as a worker, as `app.wiring` does."""
        self.registry = ModelRegistry(
            ModelCatalogue(self.models_dir), ttl_seconds=MODEL_SECONDS, monotonic=self.clock
        )
        kernels = installed_kernels()
        assert kernels is not None, "without the compiled loops nothing is remembered"
        self.cache = cache(kernels, 1000, CACHE_SECONDS, self.clock)
        self.telemetry = MlTelemetry(TelemetryLog(self._log_dir), self.sink, ship_interval_seconds=0.01)
        await self.telemetry.open()
        self._executor = ThreadPoolExecutor(1, "scoring")
        drift, breaker = DriftWindow(100), CircuitBreaker(5, 30.0, self.clock)
        predictor = Predictor(
            self.registry, self.leads, self.cache, drift, executor=self._executor, policy=POLICY
        )
        drain = Drain(0.0, time.monotonic)
        operations = Operations(
            registry=self.registry,
            telemetry=self.telemetry,
            database=DatabaseProbe(self._ping, self.clock),
            drift=drift,
            cache_freshness=lambda: "notified",
            drain=drain,
            breaker=breaker,
            clock=time.monotonic,
            started=time.monotonic(),
        )
        self._state = {
            "client_deadline_seconds": CLIENT_SECONDS,
            "drain": drain,
            "predictor": predictor,
            "breaker": breaker,
            "telemetry": self.telemetry,
            "registry": self.registry,
            "operations": operations,
        }
        self.trust_cache()

    async def close(self) -> None:
        """Closes it all in reverse."""
        self._executor.shutdown()
        await self.telemetry.close()
        self.registry.close()

    async def _ping(self) -> None:
        if self.leads.error is not None:
            raise self.leads.error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves as an ASGI application whose lifespan is this object's own."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        else:
            scope["state"] = dict(self._state)
            await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await self.open()
        scope["state"].update(self._state)  # what the protocol reads
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def ask(self, request: HttpRequest) -> HttpAnswer:
        """Sends one request and returns the answer, status 0 if there was none."""
        waiting: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]
        started: list[Message] = []
        body = bytearray()
        failure: Exception | None = None

        async def receive() -> Message:
            return waiting.pop() if waiting else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
            else:
                body.extend(message.get("body", b""))

        try:
            await self(_build_scope(request), receive, send)
        except Exception as exc:  # noqa: BLE001 - whatever reaches the server is a finding
            failure = exc
        if not started:
            return HttpAnswer(0, [], b"", failure)
        return HttpAnswer(started[0]["status"], list(started[0].get("headers", [])), bytes(body), failure)


def _build_scope(request: HttpRequest) -> Scope:
    given: Iterable[tuple[bytes, bytes]] = request.headers
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "headers": [(b"host", b"test"), (b"content-length", b"%d" % len(request.body)), *given],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "root_path": "",
    }
