"""The wire format: what goes over HTTP, field by field. Nothing but the edge imports it.

These models are the contract: OpenAPI is generated from them, and tests validate real answers against them.
Answers to scoring requests are not built from them but encoded by msgspec, straight from arrays, because
building pydantic objects for 2,000 predictions costs more than scoring them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel
from pydantic.json_schema import SkipJsonSchema

LeadId = Annotated[
    str,
    Field(
        min_length=1,
        max_length=64,
        pattern="^[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}$",
        description="The lead's UUID in any case, or the CRM's own external reference.",
        examples=["lead_1", "6f1c0c1e-5f0b-4a57-9a1c-0c6a3f0e9b11"],
    ),
]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[Share], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", examples=["0f" * 32])]
Version = Annotated[str, Field(examples=["20260101_120000"])]
RequestId = Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,64}$")]


def _never_null(schema: dict[str, Any]) -> None:
    # The field is there or it is not; None stands for absent in Python only.
    del schema["default"]


class _Message(BaseModel):
    # `model_version` and its like are names of the contract, not pydantic's.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class LeadIdArray(RootModel[list[LeadId]]):
    """The raw array the frontend sends."""

    root: Annotated[list[LeadId], Field(min_length=1, max_length=2000, examples=[["lead_1", "lead_2"]])]


class LeadIdObject(_Message):
    """The same array, wrapped; any other key is an error."""

    lead_ids: Annotated[list[LeadId], Field(min_length=1, max_length=2000, examples=[["lead_1", "lead_2"]])]


class Contribution(_Message):
    """What one column adds to the raw score; features that read the same columns are one line."""

    feature: str
    value: str
    """The class the lead's value falls in, in words; never the lead's own text."""
    contribution: float


class Receipt(_Message):
    """How the probability comes about: everything here added up is `probability`, to 1e-9."""

    base_rate: Share
    """What is said of a lead of which nothing is known: the share of training leads that applied, or of the
    recent ones where it has moved."""
    contributions: list[Contribution]
    """Shapley values of the raw score; all 0 for the verdict `abstain`."""
    calibration: Annotated[float, Field(ge=-2, le=2)]
    """The step from there to what the calibrator says."""
    bounds: Annotated[float, Field(ge=-1, le=1)]
    """The step into the bounds every probability is kept in."""


class LeadPrediction(_Message):
    """One answered position."""

    lead_id: LeadId
    probability: Share
    """The number to act on and to show: calibrated and bounded."""
    confidence: Share
    calibrated_probability: Share
    """Repeats `probability` for older clients."""
    features_present_ratio: Share
    """Share of the model's features that rest on data that is really there, not imputed."""
    prediction: bool
    """Whether the probability reaches the model's decision threshold."""
    verdict: Literal["ok", "caution", "abstain"]
    """`caution`: few features or unusual values; `abstain`: nothing to go on, the number is the base rate."""
    interval: Interval | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """With `include=interval` only: where the probability may lie, lower end first; holds `probability`."""
    receipt: Receipt | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """With `include=reasons` only: how the probability comes about."""
    reasons: list[str] | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """With `include=reasons` only: what moved it most, as sentences, the largest contribution first."""
    features: dict[str, float | None] | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """With `include=features` only: what the model reads of the lead, null where it has nothing usable."""


class LeadError(_Message):
    """One position that is not answered, inside a good answer."""

    lead_id: LeadId
    position: Count
    error_code: Literal["LEAD_NOT_FOUND", "LEAD_AMBIGUOUS", "FEATURES_REJECTED", "DATABASE_UNAVAILABLE"]
    message: str


class CalibrationMetadata(_Message):
    """How the probabilities of this answer came about."""

    calibration_method: Literal["sigmoid", "spread", "isotonic", "venn_abers", "none"]
    raw_probabilities_count: Count
    calibrated_probabilities_count: Count
    avg_feature_coverage: Share
    """Mean `features_present_ratio`; 0 when no position is answered."""
    confidence_method: Literal["max_probability", "margin", "entropy", "interval"]
    bounds: Interval


class PredictBatchResponse(_Message):
    """The hardened answer: `predictions` and `errors` together cover every position asked, each in order."""

    predictions: list[LeadPrediction]
    errors: list[LeadError]
    model_version: Version
    model_id: Annotated[str, Field(examples=["advanced_ml_20260101_120000"])]
    model_sha256: Digest
    total_processed: Count
    successful_predictions: Count
    failed_predictions: Count
    processing_time_ms: Annotated[float, Field(ge=0)]
    cache_hit: bool
    """True when every answer came from the prediction cache."""
    cache_hits: Count
    degraded: Literal[True] | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """Only while the lead database is away: the answers are the last known ones, leads may have changed."""
    degraded_age_seconds: Annotated[float, Field(ge=0)] | SkipJsonSchema[None] = Field(
        None, json_schema_extra=_never_null
    )
    """With `degraded` only: how old the oldest of the answers is."""
    schema_version: Literal["v1"]
    contract_version: Literal[1]
    calibration_metadata: CalibrationMetadata
    request_id: RequestId


class LegacyPrediction(_Message):
    """One answered position, in the old shape."""

    lead_id: LeadId
    prediction: bool
    probability: Share
    confidence: Share


class LegacyPredictBatchResponse(_Message):
    """The old answer; positions that could not be answered are missing from `predictions`."""

    predictions: list[LegacyPrediction]
    model_used: Version
    total_processed: Count
    successful_predictions: Count
    degraded: Literal[True] | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """Only while the lead database is away, see `PredictBatchResponse`."""
    degraded_age_seconds: Annotated[float, Field(ge=0)] | SkipJsonSchema[None] = Field(
        None, json_schema_extra=_never_null
    )
    request_id: RequestId
    via: Literal["legacy-proxy"]


class ProblemPosition(_Message):
    """One place in the request body that is wrong."""

    pointer: Annotated[str, Field(examples=["/lead_ids/3"])]
    """JSON pointer (RFC 6901)."""
    code: str
    detail: str


class Problem(_Message):
    """Every error body (RFC 9457, `application/problem+json`)."""

    type: Annotated[str, Field(examples=["urn:lead-scoring:problem:BATCH_SIZE_EXCEEDED"])]
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    instance: Annotated[str, Field(examples=["/ai/advanced-ml/predict-batch"])]
    """The path asked, as its template; `/` when it is not one of ours."""
    error_code: Annotated[str, Field(examples=["BATCH_SIZE_EXCEEDED"])]
    request_id: RequestId
    timestamp: Annotated[str, Field(examples=["2026-01-01T12:00:00Z"])]
    errors: Annotated[list[ProblemPosition], Field(max_length=20)]


class PredictionCacheHealth(_Message):
    """How soon a changed lead is answered anew."""

    freshness: Literal["notified", "expiry_only", "suspended", "off"]
    """`notified`: within 250 ms of the change; `expiry_only`: the lead source has tables without triggers, so
    at the latest when the answer expires; `suspended`: the database cannot say what changes, so every answer
    is computed; `off`: the cache is."""


class DatabaseHealth(_Message):
    """Whether the lead database answers, as of a look at most a second ago."""

    status: Literal["ok", "unavailable"]
    latency_ms: float | None


class TelemetryHealth(_Message):
    """Whether events can be recorded (`direct`: in the database only), and how many wait for the database."""

    status: Literal["ok", "shipping_delayed", "direct", "unavailable", "off"]
    backlog: Count


class BreakerHealth(_Message):
    """The legacy router's circuit breaker."""

    state: Literal["closed", "open", "half_open"]


class DriftHealth(_Message):
    """How recent leads compare with those the model was trained on."""

    status: Literal["unknown", "stable", "moderate", "drifting"]
    """`unknown` while too few leads were scored to say."""
    rows: Count


class HealthResponse(_Message):
    """What ops ask first. Nulls when no model is loaded."""

    status: Literal["healthy", "unhealthy"]
    model_version: Version | None
    model_sha256: Digest | None
    loaded: bool
    since_seconds: float | None
    feature_count: Count | None
    cache_status: Literal["hit", "miss", "expired", "error"]
    prediction_cache: PredictionCacheHealth
    database: DatabaseHealth
    telemetry: TelemetryHealth
    breaker: BreakerHealth | None
    """Null when the legacy router is not mounted."""
    drift: DriftHealth
    uptime_seconds: float
    service_version: str
    request_id: RequestId


class AvailableModel(_Message):
    """One artifact found, and whether it can be trusted."""

    file: str
    """Relative to the models directory."""
    version: Version
    model_type: str
    state: Literal["active", "verified", "refused", "incompatible", "unverified"]
    reason: str | None
    """Why it does not serve, if there is a reason."""
    signature: Literal["valid", "invalid", "missing", "unchecked"]
    """Of the manifest; `unchecked` while no key is trusted, or where it was refused before."""
    signed_by: str | None
    """ID of the trusted key that signed it."""
    card: Annotated[str, Field(examples=["/ai/advanced-ml/models/20260101_120000/card"])] | None
    """Where its model card is served; null when there is none."""


class ModelsResponse(_Message):
    """The active model at the top level, and every artifact found. Nulls when no model is loaded."""

    status: Literal["loaded", "no_model_loaded"]
    version: Version | None
    model_type: str | None
    path: str | None
    sha256: Digest | None
    loaded_at: str | None
    loaded_since_seconds: float | None
    feature_count: Count | None
    performance: dict[str, float] | None
    available: list[AvailableModel]
    request_id: RequestId


class Liveness(_Message):
    """The process runs."""

    status: Literal["alive"]


class Readiness(_Message):
    """The worker may receive traffic."""

    status: Literal["ready"]
