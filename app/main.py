"""Assembles the application: routes, middleware, error answers, lifespan. No logic.

Importing this module does no I/O; `create_app` only builds the object, and whatever opens something happens
in the lifespan, inside the worker that serves. Called by uvicorn (`app.main:create_app`) and by the tests.
"""

import ctypes
import gc
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Security
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import iter_route_contexts

from app import __version__, api_docs, health, model_cards
from app.ai import advanced_ml, advanced_ml_hardened
from app.ai.ml_telemetry import Telemetry
from app.ai.scoring_requests import SCORING_ERRORS
from app.drain import Drain, begin_on_signals, end_with_supervisor, end_without_memory
from app.error_handlers import FRAMEWORK_ERRORS, ErrorBoundary, Problems
from app.errors import CircuitOpenError, InternalError, LeadScoringError
from app.health import DatabaseProbe, Operations
from app.log_setup import configure_logging, write_out
from app.metrics import LOG_LINES_DROPPED, expect_failures
from app.middleware.audit import AuditMiddleware
from app.middleware.body_limit import BodyLimit
from app.middleware.cors import ProblemCors
from app.middleware.deprecation import Deprecation
from app.middleware.in_flight import Admission, InFlightLimit
from app.middleware.request_id import RequestIdMiddleware
from app.middleware.shedding import Shedding
from app.schemas.openapi import complete_document
from app.security.access import GUARD_ERRORS, Guard, Scope
from app.security.rate_limit import limit_rate
from app.settings import Settings, load_settings
from app.wiring import open_services

GC_THRESHOLDS = (10_000, 20, 50)
"""A request leaves no cycles, so they may be looked for less often than after each 700 objects."""

MALLOC_PARAMETERS = ((-3, 32 << 20), (-1, 64 << 20), (-2, 8 << 20))
"""glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, in bytes (mallopt(3))."""

OPENAPI_PATH = "/openapi.json"
SCORING_FAILURES: tuple[type[LeadScoringError], ...] = (
    *(error for error in (*SCORING_ERRORS, *GUARD_ERRORS) if error.status >= 500),
    CircuitOpenError,
    InternalError,
)
"""Whatever a prediction may fail with that is not the caller's fault."""

LEGACY_DEPRECATED_SINCE = datetime(2026, 1, 1, tzinfo=UTC)

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Mapping[str, Any]]]


def create_app(settings: Settings | None = None) -> FastAPI:
    """Returns the application; without settings it reads them from the environment.

    Raises:
        SettingsError: an environment variable is wrong.
    """
    settings = settings or load_settings()
    configure_logging(settings.log_level, on_drop=LOG_LINES_DROPPED.inc)
    app = FastAPI(
        title="Lead Scoring",
        version=__version__,
        description="How likely is this enquirer to apply? Calibrated, audited answers.",
        lifespan=_build_lifespan(settings),
        redirect_slashes=False,
        # Spans of OpenTelemetry are not what this service records, and asking for them costs every request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        openapi_url=None,  # the framework's own routes for it cannot be guarded
    )
    score, read = _guard(settings, "score"), _guard(settings, "read")
    if settings.ai_rate_limit:
        score.append(Depends(limit_rate))
    batch, reasons = settings.ml_max_batch_size, settings.ml_max_reasons_batch
    scoring = [advanced_ml_hardened.build_router(batch, reasons, score)]
    if settings.ai_enable_legacy_advanced_ml:
        scoring.append(advanced_ml.build_router(batch, score))
    for router in scoring:
        # A router that is included is asked twice for its route, with every request.
        app.router.routes.extend(router.routes)
    for router in (health.build_router(), model_cards.build_router(), _build_documents_router(app)):
        app.include_router(router, dependencies=read)
    app.include_router(health.build_public_router())
    _document(app, settings.ml_max_batch_size)
    _wrap(app, settings)
    return app


def _guard(settings: Settings, scope: Scope) -> list[Any]:
    """Returns the dependencies of a router; none at all where nobody is asked who he is."""
    return [] if settings.auth_mode == "none" else [Security(Guard(scope), scopes=[scope])]


def _build_documents_router(app: FastAPI) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    async def get_openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    async def get_docs() -> HTMLResponse:
        return HTMLResponse(api_docs.build_page(app.title), headers=api_docs.HEADERS)

    router.add_api_route(OPENAPI_PATH, get_openapi, methods=["GET", "HEAD"])
    router.add_api_route("/docs", get_docs, methods=["GET", "HEAD"])
    return router


def _build_lifespan(settings: Settings) -> Lifespan:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        drain = Drain(settings.drain_seconds, time.monotonic)
        try:
            async with open_services(settings) as services:
                _settle_memory()
                begin_on_signals(drain)
                end_with_supervisor()
                end_without_memory(write_out)
                yield {
                    "client_deadline_seconds": settings.ai_client_deadline_seconds,
                    "drain": drain,
                    "predictor": services.predictor,
                    "breaker": services.breaker,
                    "telemetry": services.telemetry,
                    "registry": services.registry,
                    "authenticator": services.authenticator,
                    "rate_limiter": services.rate_limiter,
                    "operations": Operations(
                        registry=services.registry,
                        telemetry=services.telemetry,
                        database=DatabaseProbe(services.ping_database, time.monotonic),
                        drift=services.drift,
                        cache_freshness=services.cache_freshness,
                        drain=drain,
                        breaker=services.breaker if settings.ai_enable_legacy_advanced_ml else None,
                        clock=time.monotonic,
                        started=time.monotonic(),
                    ),
                }
        finally:
            write_out()  # the signal that ends a worker leaves its threads no time

    return lifespan


def _settle_memory() -> None:
    # What is there by now stays: libraries, routes, the model. Looking through it again and again for garbage
    # held requests up for a tenth of a second at a time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    # What one batch gives back the next one takes: asked of the system anew, every page of it is a fault.
    with suppress(OSError, AttributeError):  # another C library than glibc
        for parameter, size in MALLOC_PARAMETERS:
            ctypes.CDLL(None).mallopt(parameter, size)
        ctypes.CDLL(None).malloc_trim(0)  # what only the start needed goes back


def _document(app: FastAPI, max_batch_size: int) -> None:
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete_document(generate(), max_batch_size, GUARD_ERRORS)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents


def _wrap(app: FastAPI, settings: Settings) -> None:
    methods = _methods_by_path(app)
    problems = Problems(methods)
    admission = Admission(settings.ai_max_requests_in_flight)
    scoring = f"{advanced_ml_hardened.PREFIX}/predict-batch"
    posts = {path for path, known in methods.items() if "POST" in known}
    for path in posts:
        expect_failures(path, [(error.status, error.code) for error in SCORING_FAILURES])
    for kind in FRAMEWORK_ERRORS:
        app.add_exception_handler(kind, problems.answer_framework_error)
    # Each call wraps what is there already: the last one is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.ai_max_body_bytes)
    app.add_middleware(
        InFlightLimit,
        paths=posts,
        admission=admission,
        deadline_seconds=settings.ai_request_deadline_seconds,
    )
    app.add_middleware(ErrorBoundary, problems=problems)
    app.add_middleware(ProblemCors, origins=settings.cors_origins, problem=problems)
    app.add_middleware(
        AuditMiddleware,
        telemetry=_find_telemetry,
        problem=problems,
        admission=admission,
        routes=frozenset(methods),
    )
    app.add_middleware(RequestIdMiddleware)
    if settings.ai_enable_legacy_advanced_ml:
        app.add_middleware(
            Deprecation,
            prefix=advanced_ml.PREFIX,
            since=LEGACY_DEPRECATED_SINCE,
            sunset=settings.ai_legacy_sunset,
            successor=scoring,
        )
    app.add_middleware(
        Shedding, path=scoring, admission=admission, telemetry=_find_telemetry, problem=problems
    )


def _find_telemetry(scope: Mapping[str, Any]) -> Telemetry:
    telemetry: Telemetry = scope["state"]["telemetry"]
    return telemetry


def _methods_by_path(app: FastAPI) -> Mapping[str, frozenset[str]]:
    methods: dict[str, frozenset[str]] = {}
    for route in iter_route_contexts(app.routes):
        path = route.path or ""
        methods[path] = methods.get(path, frozenset()) | frozenset(route.methods or ())
    return methods
