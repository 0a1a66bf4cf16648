"""What is recorded of a request or of a model load: closed schemas, and how they are built and encoded.

An event holds enumerations, numbers, digests and the request's own ID; never a lead ID (an external reference
may be an e-mail address), never a value the caller or the database sent. The middleware and `wiring` say what
is to be recorded, `ml_telemetry` has it built and encoded when it is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np

from app.ai.domain import VERDICTS, ConfidenceMethod, FloatArray, Predictions, Stage, StoredEvent

Text = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
Route = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9/_.{}:-]{1,120}\Z")]
Code = Annotated[str, msgspec.Meta(pattern=r"^[A-Z][A-Z0-9_]{0,39}\Z")]
Word = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,39}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
TraceId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0)]

_DECIMALS = 6

UNMATCHED_ROUTE = "unmatched"
"""The route of a request no route template matches: a path is the caller's text and is never recorded."""


@dataclass(slots=True)
class RequestRecord:
    """What is known of the request under way; every layer adds what it learns.

    `middleware.request_id` makes it. `middleware.audit` sets `route`, `middleware.shedding` that of what it
    refuses; the routers set `asked` and `predictions`; the error handlers set `error_code`, the audit that of
    a client who is gone. `started` is seconds of `time.perf_counter`, `as_of` is seconds UTC. `answer_by`, in
    seconds of `time.monotonic`, is set by `middleware.in_flight` when the request has arrived.
    """

    request_id: str
    started: float
    as_of: float
    trace_id: str | None = None
    route: str = UNMATCHED_ROUTE
    asked: int | None = None
    predictions: Predictions | None = None
    error_code: str | None = None
    answer_by: float | None = None

    def latency_ms(self, now: float) -> float:
        """Returns the milliseconds since it came in, rounded; `now` is on the clock of `started`."""
        return round((now - self.started) * 1000, 3)


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the values of one batch lie; all None for a batch without finite values."""

    min: float | None
    p10: float | None
    p50: float | None
    p90: float | None
    max: float | None
    mean: float | None


class VerdictCounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many answers carry each verdict."""

    ok: Count
    caution: Count
    abstain: Count


class PredictionSuccess(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A batch that was answered; `rejections` counts the positions that were not, by code."""

    route: Route
    status: Count
    trace_id: TraceId | None
    latency_ms: Milliseconds
    stages_ms: Mapping[Stage, Milliseconds]
    asked: Count
    answered: Count
    rejections: dict[Code, Count]
    cache_hits: Count
    positives: Count
    verdicts: VerdictCounts
    coverage: Summary
    probability: Summary
    confidence: Summary
    calibration_method: Word
    confidence_method: ConfidenceMethod
    model_id: Text
    model_version: Text
    model_sha256: Digest


class PredictionError(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request that was refused, failed, or was given up before it was answered (status 499)."""

    route: Route
    status: Count
    trace_id: TraceId | None
    latency_ms: Milliseconds
    error_code: Code
    asked: Count | None


class ModelLoaded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A verified model became the active one."""

    model_id: Text
    model_version: Text
    model_sha256: Digest
    feature_count: Count
    duration_ms: Milliseconds


class ModelLoadFailed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An artifact was refused; `reason` is the machine-readable word of `ArtifactError`."""

    reason: Word
    duration_ms: Milliseconds
    model_version: Text | None = None


Action = Literal["ml.prediction.success", "ml.prediction.error", "ml.model.load", "ml.model.load_failed"]
Event = PredictionSuccess | PredictionError | ModelLoaded | ModelLoadFailed

SCHEMAS: dict[Action, type[Event]] = {
    "ml.prediction.success": PredictionSuccess,
    "ml.prediction.error": PredictionError,
    "ml.model.load": ModelLoaded,
    "ml.model.load_failed": ModelLoadFailed,
}
_ACTIONS: dict[type[Event], Action] = {schema: action for action, schema in SCHEMAS.items()}


def build_prediction_event(
    record: RequestRecord, status: int, latency_ms: float
) -> PredictionSuccess | PredictionError:
    """Returns the one event of a request that is about to be answered with `status`."""
    if record.predictions is None or status >= 400:
        return PredictionError(
            route=record.route,
            status=status,
            trace_id=record.trace_id,
            latency_ms=latency_ms,
            error_code=record.error_code or "INTERNAL_ERROR",
            asked=record.asked,
        )
    return _build_success(record, record.predictions, status, latency_ms)


def _build_success(
    record: RequestRecord, predictions: Predictions, status: int, latency_ms: float
) -> PredictionSuccess:
    verdicts = np.bincount(predictions.verdict, minlength=len(VERDICTS))
    coverage, probability, confidence = build_summaries(
        np.array([predictions.coverage, predictions.probability, predictions.confidence])
    )
    return PredictionSuccess(
        route=record.route,
        status=status,
        trace_id=record.trace_id,
        latency_ms=latency_ms,
        stages_ms={stage: round(spent, 3) for stage, spent in predictions.stages_ms.items()},
        asked=predictions.asked,
        answered=len(predictions.lead_ids),
        rejections=predictions.count_rejections(),
        cache_hits=predictions.cache_hits,
        positives=int(np.count_nonzero(predictions.prediction)),
        verdicts=VerdictCounts(*verdicts.tolist()),
        coverage=coverage,
        probability=probability,
        confidence=confidence,
        calibration_method=predictions.calibration_method,
        confidence_method=predictions.confidence_method,
        model_id=predictions.model.model_id,
        model_version=predictions.model.version,
        model_sha256=predictions.model.sha256,
    )


def build_summaries(values: FloatArray) -> list[Summary]:
    """Summarises each row of finite values (r, n): extremes, deciles by nearest rank, and the mean.

    Rounded to six decimals: PostgreSQL takes half the time of an event for the digits of its numbers.
    """
    n = values.shape[1]
    if n == 0:
        return [Summary(None, None, None, None, None, None)] * len(values)
    if n == 1:  # as most requests ask, and sorting one value takes as long as all the rest
        return [Summary(*[round(value, _DECIMALS)] * 6) for (value,) in values.tolist()]
    means = values.sum(axis=1) / n
    values.sort(axis=1)
    places = [0, *(round(share * (n - 1)) for share in (0.1, 0.5, 0.9)), n - 1]
    return [Summary(*row) for row in np.column_stack((values[:, places], means)).round(_DECIMALS).tolist()]


def encode_event(event: Event, event_id: str, created_at: str, request_id: str | None = None) -> StoredEvent:
    """Returns the event as it is kept, after its `meta` was read back through its closed schema.

    `event_id` is a UUIDv7, `created_at` is RFC 3339 UTC.

    Raises:
        msgspec.ValidationError: a value lies outside the schema, which is a defect of the caller.
    """
    meta = msgspec.json.encode(event)
    msgspec.json.decode(meta, type=type(event))
    return StoredEvent(event_id, _ACTIONS[type(event)], meta.decode(), request_id, created_at)
