"""The service's Prometheus metrics, and how they are rendered for one process or for several.

Labels are route templates, codes and other words of our own, so their number is bounded; never an ID or a
value. Whoever starts more than one worker sets `PROMETHEUS_MULTIPROC_DIR` to an empty directory
(`shared_counts`) before this module is imported: the library decides then whether counts are shared.
"""

import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

REQUESTS = Counter("leadscore_requests", "Requests answered.", ["route", "status", "code"])
REQUEST_SECONDS = Histogram(
    "leadscore_request_seconds", "Wall time of a request.", ["route"], buckets=_LATENCY_BUCKETS
)
STAGE_SECONDS = Histogram(
    "leadscore_stage_seconds", "Wall time of one stage of a batch.", ["stage"], buckets=_LATENCY_BUCKETS
)
LEADS = Counter("leadscore_leads", "Lead IDs asked, by outcome.", ["outcome"])
CACHE_LOOKUPS = Counter("leadscore_prediction_cache_lookups", "Looks into the prediction cache.", ["result"])
CHANGE_LISTENER = Gauge(
    "leadscore_change_listener",
    "1 when every worker hears from the database which leads change.",
    multiprocess_mode="livemin",
)
LEAD_CHANGES = Counter(
    "leadscore_lead_changes", "Changes heard of: of one lead, or of any there is.", ["scope"]
)
LEADS_AHEAD = Counter("leadscore_leads_ahead", "Lead IDs scored ahead of being asked.")
LISTENER_LOSSES = Counter(
    "leadscore_change_listener_losses", "Sessions that listen for changes lost or not opened."
)
FEATURE_COVERAGE = Counter(
    "leadscore_feature_coverage", "Sum of the answered leads' shares of really present features."
)
CLIENT_TIMEOUTS = Counter(
    "leadscore_client_timeouts", "Connections cut off because the client was too slow.", ["waited_for"]
)
LOG_LINES_DROPPED = Counter(
    "leadscore_log_lines_dropped", "Log lines dropped because standard error is not read fast enough."
)
MODEL_LOADS = Counter("leadscore_model_loads", "Attempts to load a model.", ["result"])
MODEL_READY = Gauge(
    "leadscore_model_ready", "1 when every worker has a verified model.", multiprocess_mode="livemin"
)
NEWEST_MODEL_REFUSED = Gauge(
    "leadscore_newest_model_refused",
    "1 when a worker does not serve the newest model there is, or finds none.",
    multiprocess_mode="livemax",
)
BREAKER_STATE = Gauge(
    "leadscore_breaker_state", "0 closed, 1 half-open, 2 open; the worst worker.", multiprocess_mode="livemax"
)
AUTH_ENABLED = Gauge(
    "leadscore_auth_enabled", "1 when every worker asks for credentials.", multiprocess_mode="livemin"
)
AUTH_REFRESH_FAILURES = Counter(
    "leadscore_auth_refresh_failures",
    "Keys that credentials are verified with not read: api_keys, key_set.",
    ["source"],
)
TELEMETRY_BACKLOG = Gauge(
    "leadscore_telemetry_backlog", "Recorded events not yet in the database.", multiprocess_mode="livesum"
)
TELEMETRY_EVENTS = Counter("leadscore_telemetry_events", "Events made durable.", ["action"])
TELEMETRY_FAILURES = Counter("leadscore_telemetry_failures", "Failed steps of telemetry.", ["step"])
TELEMETRY_RECORD_SECONDS = Histogram(
    "leadscore_telemetry_record_seconds", "Time until an event is durable.", buckets=_LATENCY_BUCKETS
)

# At 0 from the start: whoever watches a count sees it rise only if it was there before.
for _counter, _labels in {
    LEADS: ("DATABASE_UNAVAILABLE", "LEAD_NOT_FOUND"),
    MODEL_LOADS: ("loaded", "refused"),
    AUTH_REFRESH_FAILURES: ("api_keys", "key_set"),
    TELEMETRY_FAILURES: ("adopt", "check", "deadline", "direct", "lost", "ship", "write"),
}.items():
    for _label in _labels:
        _counter.labels(_label)

_ANSWERED = LEADS.labels("answered")
_LOOKUPS = {result: CACHE_LOOKUPS.labels(result) for result in ("hit", "miss", "recalled")}
_BREAKER_LEVELS = {"closed": 0, "half_open": 1, "open": 2}


def observe_request(route: str, status: int, code: str | None, seconds: float) -> None:
    """Counts one request; `route` is a template, `code` one of ours or None, `seconds` its wall time."""
    _requests(route, status, code or "").inc()
    _request_seconds(route).observe(seconds)


def expect_failures(route: str, errors: Iterable[tuple[int, str]]) -> None:
    """Has the counts of a route's failures begin at 0; `errors` are pairs of status and code."""
    for status, code in errors:
        _requests(route, status, code)


def observe_batch(
    answered: int,
    coverage_sum: float,
    rejections: Mapping[str, int],
    stages_ms: Iterable[tuple[str, float]],
) -> None:
    """Counts one answered batch; `coverage_sum` is over its answered leads, `rejections` counts by code."""
    _ANSWERED.inc(answered)
    FEATURE_COVERAGE.inc(coverage_sum)
    for code, count in rejections.items():
        LEADS.labels(code).inc(count)
    for stage, milliseconds in stages_ms:
        _stage_seconds(stage).observe(milliseconds / 1000)


def observe_lookups(result: Literal["hit", "miss", "recalled"], leads: int) -> None:
    """Counts the lead IDs of one look into the prediction cache that ended so."""
    _LOOKUPS[result].inc(leads)


# The library finds a label's counter anew each time, which takes as long as to count; there are few labels.
@cache
def _requests(route: str, status: int, code: str) -> Counter:
    return REQUESTS.labels(route, str(status), code)


@cache
def _request_seconds(route: str) -> Histogram:
    return REQUEST_SECONDS.labels(route)


@cache
def _stage_seconds(stage: str) -> Histogram:
    return STAGE_SECONDS.labels(stage)


def observe_event(action: str) -> None:
    """Counts one event that has been made durable."""
    _events(action).inc()


@cache
def _events(action: str) -> Counter:
    return TELEMETRY_EVENTS.labels(action)


def observe_model_load(result: str) -> None:
    """Counts one attempt to load a model."""
    MODEL_LOADS.labels(result).inc()


def observe_model_look(*, ready: bool, refused: bool) -> None:
    """Notes whether a verified model is active, and whether the newest one is refused, after each look."""
    MODEL_READY.set(1 if ready else 0)
    NEWEST_MODEL_REFUSED.set(1 if refused else 0)


def observe_breaker(state: str) -> None:
    """Notes the circuit breaker's state: closed, half_open or open."""
    BREAKER_STATE.set(_BREAKER_LEVELS[state])


def render_metrics() -> tuple[bytes, str]:
    """Returns the metrics of all workers in the Prometheus text format, and its content type."""
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if shared is None:
        return generate_latest(REGISTRY), CONTENT_TYPE_LATEST
    _forget_dead_workers(Path(shared))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _forget_dead_workers(shared: Path) -> None:
    # What a worker counted stays true when it is gone; what it was (ready, open) does not.
    for file in shared.glob("gauge_live*_*.db"):
        try:
            os.kill(int(file.stem.rpartition("_")[2]), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)  # the library's own way fails if another scrape has just done it
