"""What ops ask: is it alive, may it get traffic, which model serves, what do the figures say.

Every answer comes from memory or within a quarter of a second, also while the database is frozen or gone. A
database that is away is reported but makes nothing unhealthy: cached leads are still answered, and one outage
must not take every replica out of the load balancer. `main` builds `Operations` and mounts the routes.
"""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from app import __version__
from app.ai.circuit_breaker import CircuitBreaker
from app.ai.dependencies import CurrentRecord
from app.ai.domain import JsonObject
from app.ai.drift_window import DriftWindow
from app.ai.ml_telemetry import Telemetry
from app.ai.model_bundle import ModelBundle
from app.ai.model_catalogue import AvailableModel
from app.ai.model_registry import ModelRegistry
from app.ai.prediction_cache import CacheFreshness
from app.drain import Drain
from app.errors import (
    DatabaseUnavailableError,
    DrainingError,
    ModelNotReadyError,
    TelemetryUnavailableError,
    UnavailableError,
)
from app.metrics import observe_breaker, render_metrics
from app.schemas.ai_ml import HealthResponse, Liveness, ModelsResponse, Readiness
from app.schemas.openapi import describe_answers

_NOT_READY = (DrainingError, ModelNotReadyError, TelemetryUnavailableError)


class DatabaseProbe:
    """Remembers for a second whether the database answers, so that probing cannot become a load.

    `ping` has a deadline of its own and raises `DatabaseUnavailableError`. Callers that come while one look
    is under way share it.
    """

    def __init__(
        self, ping: Callable[[], Awaitable[None]], clock: Callable[[], float], max_age_seconds: float = 1.0
    ) -> None:
        self._ping = ping
        self._clock = clock
        self._max_age = max_age_seconds
        self._lock = asyncio.Lock()
        self._looked_at: float | None = None
        self._latency_ms: float | None = None

    async def look(self) -> JsonObject:
        """Returns `status` and `latency_ms` of the database."""
        async with self._lock:
            if self._looked_at is None or self._clock() - self._looked_at >= self._max_age:
                self._latency_ms = await self._measure()
                self._looked_at = self._clock()
        return {
            "status": "unavailable" if self._latency_ms is None else "ok",
            "latency_ms": self._latency_ms,
        }

    async def _measure(self) -> float | None:
        began = self._clock()
        try:
            await self._ping()
        except DatabaseUnavailableError:
            return None
        return round((self._clock() - began) * 1000, 3)


@dataclasses.dataclass(frozen=True, slots=True)
class Operations:
    """Builds the operations answers of one worker; `breaker` is None without the legacy router."""

    registry: ModelRegistry
    telemetry: Telemetry
    database: DatabaseProbe
    drift: DriftWindow
    cache_freshness: Callable[[], CacheFreshness]
    drain: Drain
    breaker: CircuitBreaker | None
    clock: Callable[[], float]
    started: float

    async def check_ready(self) -> None:
        """Tells whether this worker may receive traffic; with no model, asks the registry to look again.

        Raises:
            DrainingError: the worker is about to end.
            ModelNotReadyError: no verified model that scored its golden inputs.
            TelemetryUnavailableError: the telemetry log cannot be written.
        """
        if self.drain.active:
            raise DrainingError
        await self.registry.active()
        if self.telemetry.state() == "unavailable":
            raise TelemetryUnavailableError

    async def build_health(self, request_id: str) -> tuple[int, JsonObject]:
        """Returns status and body of the health answer, see `HealthResponse`."""
        reason = await self._find_fault()
        model = self.registry.status()
        bundle = model.bundle
        return (503 if reason else 200), {
            "status": "unhealthy" if reason else "healthy",
            "reason": reason,
            "model_version": bundle.ref.version if bundle else None,
            "model_sha256": bundle.ref.sha256 if bundle else None,
            "loaded": bundle is not None,
            "since_seconds": model.loaded_since_seconds,
            "feature_count": len(bundle.feature_set.names) if bundle else None,
            "cache_status": model.cache_status,
            "prediction_cache": {"freshness": self.cache_freshness()},
            "database": await self.database.look(),
            "telemetry": {"status": self.telemetry.state(), "backlog": self.telemetry.backlog()},
            "breaker": {"state": self.breaker.state} if self.breaker else None,
            "drift": self._describe_drift(bundle),
            "uptime_seconds": round(self.clock() - self.started, 3),
            "service_version": __version__,
            "request_id": request_id,
        }

    async def _find_fault(self) -> str | None:
        try:
            await self.check_ready()
        except ModelNotReadyError as exc:
            return self.registry.status().reason or exc.code.lower()  # the latter during the first look
        except UnavailableError as exc:
            return exc.code.lower()
        return None

    def _describe_drift(self, bundle: ModelBundle | None) -> JsonObject:
        if bundle is None:
            return {"status": "unknown", "rows": 0}
        return self.drift.statistics(bundle.statistics, bundle.feature_set.fingerprint)._asdict()

    async def build_models(self, request_id: str) -> JsonObject:
        """Returns the body of the models answer, see `ModelsResponse`."""
        available = await asyncio.to_thread(self.registry.available)
        status = self.registry.status()
        manifest = status.bundle.manifest if status.bundle else None
        loaded_at = status.loaded_at.isoformat().replace("+00:00", "Z") if status.loaded_at else None
        return {
            "status": "loaded" if manifest else "no_model_loaded",
            "reason": status.reason,
            "version": manifest.version if manifest else None,
            "model_type": manifest.model_type if manifest else None,
            "path": manifest.file_name if manifest else None,
            "sha256": manifest.sha256 if manifest else None,
            "loaded_at": loaded_at,
            "loaded_since_seconds": status.loaded_since_seconds,
            "feature_count": len(manifest.feature_set) if manifest else None,
            "performance": manifest.metrics if manifest else None,
            "available": [_describe_available(model) for model in available],
            "request_id": request_id,
        }


def _describe_available(model: AvailableModel) -> JsonObject:
    facts = dataclasses.asdict(model)
    has_card = facts.pop("has_card")
    return {**facts, "card": f"/ai/advanced-ml/models/{model.version}/card" if has_card else None}


async def _get_operations(request: Request) -> Operations:
    operations: Operations = request.state.operations
    return operations


CurrentOperations = Annotated[Operations, Depends(_get_operations)]


def build_public_router() -> APIRouter:
    """Returns the routes that nobody is ever asked for a credential on; there are no others."""
    router = APIRouter(tags=["Operations"])
    ready = describe_answers("Ready.", Readiness, _NOT_READY)
    _add(router, "/livez", get_livez, "Does the process run", responses=describe_answers("Alive.", Liveness))
    _add(router, "/readyz", get_readyz, "May it receive traffic", responses=ready)
    return router


def build_router() -> APIRouter:
    """Returns the other operations routes."""
    router = APIRouter(tags=["Operations"])
    health = describe_answers("Healthy.", HealthResponse)
    health[503] = {"description": "Unhealthy: the same body, with what is missing.", "model": HealthResponse}
    metrics = describe_answers("Metrics of all workers, in the Prometheus text format.", None)
    metrics[200]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    models = describe_answers("What the registry holds.", ModelsResponse)
    _add(router, "/ai/advanced-ml/health", get_health, "Is the service healthy, and with which model",
         responses=health)  # fmt: skip
    _add(router, "/ai/advanced-ml/models", get_models, "The active model and every artifact found",
         responses=models)  # fmt: skip
    _add(router, "/metrics", get_metrics, "Prometheus metrics", responses=metrics, response_class=Response)
    return router


def _add(
    router: APIRouter, path: str, endpoint: Callable[..., Awaitable[Response]], summary: str, **options: Any
) -> None:
    router.add_api_route(path, endpoint, methods=["GET"], summary=summary, **options)
    router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)


async def get_health(operations: CurrentOperations, record: CurrentRecord) -> Response:
    """Answers 200 `healthy` or 503 `unhealthy`; the database's state is reported but does not decide."""
    status, body = await operations.build_health(record.request_id)
    return _answer(body, status)


async def get_models(operations: CurrentOperations, record: CurrentRecord) -> Response:
    """Answers with the active model at the top level; paths are relative to the models directory."""
    return _answer(await operations.build_models(record.request_id))


async def get_livez() -> Response:
    """Answers as long as the event loop turns; touches nothing else."""
    return _answer({"status": "alive"})


async def get_readyz(operations: CurrentOperations) -> Response:
    """Answers 200 when a verified model scored its golden inputs and the telemetry log can be written."""
    await operations.check_ready()
    return _answer({"status": "ready"})


async def get_metrics(operations: CurrentOperations) -> Response:
    """Answers with the figures of all workers together."""
    if operations.breaker:
        observe_breaker(operations.breaker.state)  # it goes half-open by the clock, without a request
    body, content_type = await asyncio.to_thread(render_metrics)
    return Response(body, headers={"Content-Type": content_type})


def _answer(body: JsonObject, status: int = 200) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(msgspec.json.encode(body), status, headers, "application/json")
