"""Builds the long-lived objects of a worker, one line each, and closes them in reverse.

Those that are about requests and their end alone (`Admission`, `Drain`, `Operations`) are `main`'s. Runs
inside the lifespan, so after any fork: threads, sockets and locks belong to the worker that uses them. Called
by `main`, and by `cli` for whether a model suits a source.
"""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import structlog

from app.ai.artifact_process import dismiss, interrupt
from app.ai.circuit_breaker import CircuitBreaker
from app.ai.domain import ColumnKind
from app.ai.drift_window import DriftWindow
from app.ai.events import ModelLoaded, ModelLoadFailed
from app.ai.features import FeatureSet
from app.ai.loaded_model import read_apart
from app.ai.ml_telemetry import MlTelemetry, NullTelemetry, Telemetry
from app.ai.model_bundle import load_bundle
from app.ai.model_catalogue import ModelCatalogue
from app.ai.model_manifest import ModelManifest
from app.ai.model_registry import REMEDIES, LoadReport, ModelRegistry
from app.ai.prediction_cache import AnswerCache, CacheFreshness, NullCache, PredictionCache
from app.ai.predictor import Predictor, ScoringPolicy
from app.ai.refresh_ahead import RefreshAhead
from app.ai.score_kernels import installed_kernels
from app.ai.served_versions import ServedVersions
from app.ai.telemetry_log import TelemetryLog
from app.db.ai_events import PostgresEventSink
from app.db.api_keys import PostgresApiKeys
from app.db.change_listener import ChangeListener
from app.db.engine import Connection, Database
from app.db.leads import PostgresLeadSource
from app.errors import DatabaseUnavailableError, ModelNotReadyError, PredictionFailedError, SettingsError
from app.metrics import AUTH_ENABLED, observe_model_load
from app.security.access import Authenticator
from app.security.api_keys import ApiKeyTable
from app.security.key_set import KeySet, KeySetEndpoint
from app.security.rate_limit import RateLimiter
from app.security.tokens import JwtVerifier
from app.settings import Settings

_log = structlog.get_logger()

PROBE_DEADLINE_SECONDS = 0.25
DRIFT_WINDOW_ROWS = 5000
TELEMETRY_DEADLINE_SECONDS = 5.0
REFRESH_DEADLINE_SECONDS = 30.0
KEYS_DEADLINE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Services:
    """The long-lived objects the edge needs."""

    predictor: Predictor
    registry: ModelRegistry
    telemetry: Telemetry
    breaker: CircuitBreaker
    drift: DriftWindow
    ping_database: Callable[[], Awaitable[None]]
    cache_freshness: Callable[[], CacheFreshness]
    authenticator: Authenticator | None
    rate_limiter: RateLimiter | None


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Yields the services, ready to serve; a model or a database that is missing is looked for again later.

    Raises:
        SettingsError: DATABASE_URL is not set (`leadscore serve` sets it to the embedded database's).
    """
    url = settings.database_url
    if url is None:
        raise SettingsError("DATABASE_URL: not set; start the service with `leadscore serve`")
    async with AsyncExitStack() as stack:
        leads = _open_database(stack, url, settings.database_pool_size, settings.database_deadline_seconds)
        probe = _open_database(stack, url, 1, PROBE_DEADLINE_SECONDS)
        telemetry = await _open_telemetry(stack, url, settings)
        lead_source = PostgresLeadSource(leads, settings.lead_source)
        registry = _open_registry(stack, settings, lead_source, telemetry)
        cache, cache_freshness = await _open_cache(stack, url, settings)
        drift = DriftWindow(DRIFT_WINDOW_ROWS)
        executor = stack.enter_context(ThreadPoolExecutor(1, "scoring"))
        policy = ScoringPolicy(settings.ml_min_feature_coverage, settings.ml_confidence_method)
        predictor = Predictor(
            registry, lead_source, cache, drift, executor=executor, policy=policy,
            degraded_answers=settings.ml_degraded_answers,
        )  # fmt: skip
        breaker = CircuitBreaker(
            settings.ai_breaker_failures, settings.ai_breaker_open_seconds, time.monotonic
        )
        authenticator = await _open_authenticator(stack, url, settings)
        rate_limiter = RateLimiter(settings.ai_rate_limit) if settings.ai_rate_limit else None
        await _warm_up(lead_source, registry, settings.ml_model_dir)
        if isinstance(cache, PredictionCache) and settings.ml_prewarm_leads:
            _start_refreshing_ahead(
                stack, url, settings, registry=registry, cache=cache, executor=executor, policy=policy
            )
        yield Services(
            predictor,
            registry,
            telemetry,
            breaker,
            drift,
            lambda: _ping(probe),
            cache_freshness,
            authenticator,
            rate_limiter,
        )


def find_incompatibility(manifest: ModelManifest, source: Mapping[str, ColumnKind]) -> str | None:
    """Returns why the model cannot read a source with these columns; None if it can, or none are known."""
    if not source:
        return None
    columns = FeatureSet.from_json(manifest.feature_set).input_columns
    if absent := [column.name for column in columns if column.name not in source]:
        return f"The lead source has no column {', '.join(absent)}."
    for column in columns:
        if column.kind != source[column.name]:
            return f"The lead source's column {column.name} is not a {column.kind}."
    return None


async def _ping(database: Database) -> None:
    async def select(connection: Connection) -> None:
        await connection.execute("SELECT 1")

    await database.run(select)


async def _warm_up(lead_source: PostgresLeadSource, registry: ModelRegistry, model_dir: Path) -> None:
    with suppress(DatabaseUnavailableError, PredictionFailedError):
        await lead_source.fetch_schema()
    try:
        await asyncio.to_thread(registry.load)
    except ModelNotReadyError:
        reason = registry.status().reason or "internal_error"
        remedy = REMEDIES.get(reason, "`leadscore models verify` says what is wrong with each")
        _log.warning("model_not_ready", directory=str(model_dir), reason=reason, remedy=remedy)
    await asyncio.to_thread(dismiss)


def _open_database(stack: AsyncExitStack, url: str, pool_size: int, deadline_seconds: float) -> Database:
    database = Database(url, pool_size=pool_size, deadline_seconds=deadline_seconds)
    stack.push_async_callback(database.close)
    return database


async def _open_telemetry(stack: AsyncExitStack, url: str, settings: Settings) -> Telemetry:
    if not settings.ai_telemetry_enabled:
        return NullTelemetry()
    sink = PostgresEventSink(_open_database(stack, url, 1, TELEMETRY_DEADLINE_SECONDS))
    telemetry = MlTelemetry(TelemetryLog(settings.var_dir / "telemetry"), sink)
    await telemetry.open()
    stack.push_async_callback(telemetry.close)
    return telemetry


def _open_registry(
    stack: AsyncExitStack, settings: Settings, lead_source: PostgresLeadSource, telemetry: Telemetry
) -> ModelRegistry:
    catalogue = ModelCatalogue(
        settings.ml_model_dir,
        settings.ml_model_pattern,
        incompatible=lambda manifest: find_incompatibility(manifest, lead_source.source_columns()),
        trusted_keys=settings.ml_trusted_keys,
        load=lambda manifest, data: load_bundle(manifest, data, read_apart),
    )
    registry = ModelRegistry(
        catalogue,
        served=ServedVersions(settings.var_dir),
        source_is_known=lambda: bool(lead_source.source_columns()),
        pinned_version=settings.ml_model_version,
        ttl_seconds=settings.ml_cache_ttl_seconds,
        on_load=lambda report: _report_load(report, telemetry),
        interrupt=interrupt,
    )
    stack.push_async_callback(asyncio.to_thread, registry.close)
    return registry


def _start_refreshing_ahead(
    stack: AsyncExitStack,
    url: str,
    settings: Settings,
    *,
    registry: ModelRegistry,
    cache: PredictionCache,
    executor: ThreadPoolExecutor,
    policy: ScoringPolicy,
) -> None:
    source = PostgresLeadSource(_open_database(stack, url, 1, REFRESH_DEADLINE_SECONDS), settings.lead_source)
    # A drift window of its own: the same leads again and again would hide what requests bring.
    predictor = Predictor(registry, source, cache, DriftWindow(1), executor=executor, policy=policy)
    refresh = RefreshAhead(
        predictor,
        registry,
        cache,
        source,
        leads=settings.ml_prewarm_leads,
        ttl_seconds=settings.ml_prediction_cache_ttl_seconds,
    )
    _run_until_closed(stack, refresh.run(), "refresh-ahead")


def _run_until_closed(stack: AsyncExitStack, work: Coroutine[Any, Any, None], name: str) -> None:
    task = asyncio.create_task(work, name=name)
    stack.push_async_callback(asyncio.wait, {task})
    stack.callback(task.cancel)


def _report_load(report: LoadReport, telemetry: Telemetry) -> None:
    observe_model_load("loaded" if report.bundle else "refused")
    telemetry.submit(functools.partial(_build_load_event, report))


def _build_load_event(report: LoadReport) -> ModelLoaded | ModelLoadFailed:
    if report.bundle is None:
        return ModelLoadFailed(
            reason=report.reason or "unknown", duration_ms=report.duration_ms, model_version=report.version
        )
    return ModelLoaded(
        model_id=report.bundle.ref.model_id,
        model_version=report.bundle.ref.version,
        model_sha256=report.bundle.ref.sha256,
        feature_count=len(report.bundle.feature_set.names),
        duration_ms=report.duration_ms,
    )


async def _open_cache(
    stack: AsyncExitStack, url: str, settings: Settings
) -> tuple[AnswerCache, Callable[[], CacheFreshness]]:
    kernels = installed_kernels()
    if settings.ml_prediction_cache_ttl_seconds == 0 or kernels is None:
        return NullCache(), lambda: "off"
    cache = PredictionCache(
        kernels, settings.ml_prediction_cache_size, settings.ml_prediction_cache_ttl_seconds, time.monotonic
    )
    listener = ChangeListener(
        url, settings.lead_source, cache, deadline_seconds=settings.database_deadline_seconds
    )
    stack.push_async_callback(asyncio.to_thread, listener.close)
    await asyncio.to_thread(listener.start)

    def tell_freshness() -> CacheFreshness:
        if not cache.is_trusted():
            return "suspended"
        return "notified" if listener.hears_everything() else "expiry_only"

    return cache, tell_freshness


async def _open_authenticator(stack: AsyncExitStack, url: str, settings: Settings) -> Authenticator | None:
    AUTH_ENABLED.set(0 if settings.auth_mode == "none" else 1)
    if settings.auth_mode == "none":
        return None
    return Authenticator(
        keys=await _open_api_keys(stack, url, settings) if "api_key" in settings.auth_mode else None,
        tokens=await _open_tokens(stack, settings) if "jwt" in settings.auth_mode else None,
    )


async def _open_api_keys(stack: AsyncExitStack, url: str, settings: Settings) -> ApiKeyTable:
    assert settings.auth_key_pepper is not None  # noqa: S101 - the settings were checked
    source = PostgresApiKeys(_open_database(stack, url, 1, KEYS_DEADLINE_SECONDS))
    table = ApiKeyTable(source, settings.auth_key_pepper.get_secret_value().encode())
    await table.refresh()
    _run_until_closed(stack, table.run(), "api-keys")
    return table


async def _open_tokens(stack: AsyncExitStack, settings: Settings) -> JwtVerifier:
    client = await stack.enter_async_context(httpx2.AsyncClient(follow_redirects=False))
    algorithm = settings.auth_jwt_algorithm
    key_set = KeySet(KeySetEndpoint(str(settings.auth_jwks_url), client).fetch, algorithm)
    _run_until_closed(stack, key_set.run(), "key-set")
    return JwtVerifier(
        key_set,
        issuer=str(settings.auth_jwt_issuer),
        audience=str(settings.auth_jwt_audience),
        algorithm=algorithm,
    )
