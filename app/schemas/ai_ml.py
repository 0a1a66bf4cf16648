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
RequestId = Annotated[
    str,
    Field(
        pattern="^[A-Za-z0-9._-]{1,64}$",
        description="The request's ID, to quote when you report an error; also in the `X-Request-ID` header.",
    ),
]


def _never_null(schema: dict[str, Any]) -> None:
    # The field is there or it is not; None stands for absent in Python only.
    del schema["default"]


class _Message(BaseModel):
    # `model_version` and its like are names of the contract, not pydantic's. What stands under a field is its
    # description in OpenAPI, for whoever reads an answer.
    model_config = ConfigDict(
        extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class LeadIdArray(RootModel[list[LeadId]]):
    """The raw array the frontend sends."""

    root: Annotated[list[LeadId], Field(min_length=1, max_length=2000, examples=[["lead_1", "lead_2"]])]


class LeadIdObject(_Message):
    """The same array, wrapped; any other key is an error."""

    lead_ids: Annotated[list[LeadId], Field(min_length=1, max_length=2000, examples=[["lead_1", "lead_2"]])]
    """The lead IDs to score; order and duplicates are kept."""


class Contribution(_Message):
    """What one column adds to the raw score; features that read the same columns are one line."""

    feature: str
    """The column of the lead that it is about, or the feature made from it."""
    value: str
    """The class the lead's value falls in, in words; never the lead's own text."""
    contribution: float
    """What it adds or, below 0, takes away: 0.05 is 5 points of a hundred."""


class Receipt(_Message):
    """How the probability comes about: everything here added up is `probability`, to 1e-9."""

    base_rate: Share
    """What is said of a lead of which nothing is known: the share of training leads that applied, or of the
    recent ones where it has moved."""
    contributions: list[Contribution]
    """A line for each column: Shapley values of the raw score; all 0 for the verdict `abstain`."""
    calibration: Annotated[float, Field(ge=-2, le=2)]
    """The step from base rate and contributions to what the calibrator says."""
    bounds: Annotated[float, Field(ge=-1, le=1)]
    """The step into the bounds every probability is kept in."""


class LeadPrediction(_Message):
    """One answered position."""

    lead_id: LeadId
    probability: Share
    """The number to act on and to show: calibrated and bounded."""
    confidence: Share
    """How far the probability is from undecided; `confidence_method` says how that is measured."""
    calibrated_probability: Share
    """Repeats `probability` for older clients."""
    features_present_ratio: Share
    """Share of the model's features that rest on data that is really there, not imputed."""
    prediction: bool
    """Whether the probability reaches the model's decision threshold."""
    verdict: Literal["ok", "caution", "abstain"]
    """`caution`: little is known, values are unusual, or the lead may have changed (see `degraded`);
    `abstain`: nothing to go on, the number is the base rate."""
    interval: Interval | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """With `include=interval` only: how far one more outcome could move it, lower end first; holds it."""
    receipt: Receipt | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """With `include=reasons` only: how the probability comes about."""
    reasons: list[str] | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """With `include=reasons` only: what moved it most, as sentences, the largest contribution first, and last
    what they leave."""
    features: dict[str, float | None] | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """With `include=features` only: what the model reads of the lead, null where it has nothing for it."""


class LeadError(_Message):
    """One position that is not answered, inside a good answer."""

    lead_id: LeadId
    position: Count
    """Where it stood in the request, from 0."""
    error_code: Literal["LEAD_NOT_FOUND", "LEAD_AMBIGUOUS", "FEATURES_REJECTED", "DATABASE_UNAVAILABLE"]
    """`LEAD_NOT_FOUND`: no lead has this ID; `LEAD_AMBIGUOUS`: several leads carry this external reference;
    `FEATURES_REJECTED`: its data cannot be made safe for the model; `DATABASE_UNAVAILABLE`: it could not be
    looked up, ask for it again shortly."""
    message: str
    """The same as a sentence, for people; its words may change."""


class CalibrationMetadata(_Message):
    """How the probabilities of this answer came about."""

    calibration_method: Literal["sigmoid", "spread", "isotonic", "venn_abers", "none"]
    """How the model's raw scores become probabilities; `none`: they are."""
    raw_probabilities_count: Count
    """How many leads were answered."""
    calibrated_probabilities_count: Count
    """The same number: every answer is calibrated."""
    avg_feature_coverage: Share
    """Mean `features_present_ratio`; 0 when no position is answered."""
    confidence_method: Literal["max_probability", "margin", "entropy", "interval"]
    """What `confidence` is: `max_probability`, the larger of p and 1 - p; `margin`, twice the distance from a
    half; `entropy`, 1 minus the entropy in bits; `interval`, 1 minus the width of the lead's interval."""
    bounds: Interval
    """No probability is below the first of the two, or above the second."""


class PredictBatchResponse(_Message):
    """The hardened answer: `predictions` and `errors` together cover every position asked, each in order."""

    predictions: list[LeadPrediction]
    """One for each position that is answered, in the order asked."""
    errors: list[LeadError]
    """One for each position that is not, in the order asked."""
    model_version: Version
    """The version of the model that answered, one for the whole answer."""
    model_id: Annotated[str, Field(examples=["advanced_ml_20260101_120000"])]
    """The name of that model."""
    model_sha256: Digest
    """The SHA-256 of its file."""
    total_processed: Count
    """How many lead IDs were asked, duplicates included."""
    successful_predictions: Count
    """How many are in `predictions`."""
    failed_predictions: Count
    """How many are in `errors`."""
    processing_time_ms: Annotated[float, Field(ge=0)]
    """Wall time inside the service, in milliseconds."""
    cache_hit: bool
    """True when every answer came from the prediction cache."""
    cache_hits: Count
    """How many answers came from it."""
    degraded: Literal[True] | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """Only while the lead database is away: the answers are the last known ones, leads may have changed, and
    those that are not remembered are in `errors`."""
    degraded_age_seconds: Annotated[float, Field(ge=0)] | SkipJsonSchema[None] = Field(
        None, json_schema_extra=_never_null
    )
    """With `degraded` only: how old the oldest answer is whose lead may have changed; 0 if none may."""
    schema_version: Literal["v1"]
    """The shape of this answer."""
    contract_version: Literal[1]
    """The contract this answer keeps."""
    calibration_metadata: CalibrationMetadata
    """How the probabilities came about."""
    request_id: RequestId


class LegacyPrediction(_Message):
    """One answered position, in the old shape."""

    lead_id: LeadId
    prediction: bool
    """Whether the probability reaches the model's decision threshold."""
    probability: Share
    """The number to act on and to show: calibrated and bounded."""
    confidence: Share
    """How far the probability is from undecided."""


class LegacyPredictBatchResponse(_Message):
    """The old answer; positions that could not be answered are missing from `predictions`."""

    predictions: list[LegacyPrediction]
    """One for each position that is answered, in the order asked."""
    model_used: Version
    """The version of the model that answered."""
    total_processed: Count
    """How many lead IDs were asked, duplicates included."""
    successful_predictions: Count
    """How many are in `predictions`."""
    degraded: Literal[True] | SkipJsonSchema[None] = Field(None, json_schema_extra=_never_null)
    """Only while the lead database is away: the answers are the last known ones, leads may have changed, and
    those that are not remembered are missing."""
    degraded_age_seconds: Annotated[float, Field(ge=0)] | SkipJsonSchema[None] = Field(
        None, json_schema_extra=_never_null
    )
    """With `degraded` only: how old the oldest answer is whose lead may have changed; 0 if none may."""
    request_id: RequestId
    via: Literal["legacy-proxy"]
    """Says that this is the old shape."""


class ProblemPosition(_Message):
    """One place in the request body that is wrong."""

    pointer: Annotated[str, Field(examples=["/lead_ids/3"])]
    """Where it is, as a JSON pointer (RFC 6901)."""
    code: str
    """What is wrong there, as a code."""
    detail: str
    """The same as a sentence."""


class Problem(_Message):
    """Every error body (RFC 9457, `application/problem+json`)."""

    type: Annotated[str, Field(examples=["urn:lead-scoring:problem:BATCH_SIZE_EXCEEDED"])]
    """`urn:lead-scoring:problem:` and the `error_code`."""
    title: str
    """The kind of error in a few words, the same for every error of its code."""
    status: Annotated[int, Field(ge=400, le=599)]
    """The HTTP status, once more."""
    detail: str
    """What is wrong and what to do, as a sentence for people; its words may change."""
    instance: Annotated[str, Field(examples=["/ai/advanced-ml/predict-batch"])]
    """The path asked, as its template; `/` when it is not one of ours."""
    error_code: Annotated[str, Field(examples=["BATCH_SIZE_EXCEEDED"])]
    """What to tell errors apart by; each operation lists those it may answer with."""
    request_id: RequestId
    timestamp: Annotated[str, Field(examples=["2026-01-01T12:00:00Z"])]
    """When it was answered (RFC 3339, UTC)."""
    errors: Annotated[list[ProblemPosition], Field(max_length=20)]
    """The places in the body that are wrong, where the body is at fault; at most the first 20."""


class PredictionCacheHealth(_Message):
    """How soon a changed lead is answered anew."""

    freshness: Literal["notified", "expiry_only", "suspended", "off"]
    """How soon a changed lead is answered anew. `notified`: within 250 ms of the change; `expiry_only`: the
    lead source has tables without triggers, so at the latest when the answer expires; `suspended`: the
    database cannot say what changes, so every answer is computed; `off`: the cache is."""


class DatabaseHealth(_Message):
    """Whether the lead database answers, as of a look at most a second ago."""

    status: Literal["ok", "unavailable"]
    """`unavailable`: no answer within the deadline."""
    latency_ms: float | None
    """How long it took to answer, in milliseconds; null when it did not."""


class TelemetryHealth(_Message):
    """Whether events can be recorded (`direct`: in the database only), and how many wait for the database."""

    status: Literal["ok", "shipping_delayed", "direct", "unavailable", "off"]
    """`shipping_delayed`: they wait on this machine, because the database does not take them; `direct`: they
    go to the database at once, because this machine cannot keep them; `unavailable`: neither, so nothing is
    scored; `off`: no events are recorded."""
    backlog: Count
    """How many events wait for the database."""


class BreakerHealth(_Message):
    """The legacy router's circuit breaker."""

    state: Literal["closed", "open", "half_open"]
    """`open`: the legacy route refuses requests; `half_open`: it lets the next one through, to find out if it
    works again."""


class DriftHealth(_Message):
    """How recent leads compare with those the model was trained on."""

    status: Literal["unknown", "stable", "moderate", "drifting"]
    """How far they differ; `unknown` while too few leads were scored to say."""
    rows: Count
    """How many recent leads that is said of."""


class HealthResponse(_Message):
    """What ops ask first. Nulls when no model is loaded."""

    status: Literal["healthy", "unhealthy"]
    """`unhealthy` with status 503: no model, no place for events, or the service is about to end."""
    reason: Annotated[str, Field(examples=["rollback_refused", "draining"])] | None
    """Why it is unhealthy: what is wrong with the model, `telemetry_unavailable` or `draining`."""
    model_version: Version | None
    """The version of the model that answers."""
    model_sha256: Digest | None
    """The SHA-256 of its file."""
    loaded: bool
    """Whether a model is loaded."""
    since_seconds: float | None
    """For how long it has been, in seconds."""
    feature_count: Count | None
    """How many features it reads."""
    cache_status: Literal["hit", "miss", "expired", "error"]
    """Of the loaded model: `hit`, it is current; `expired`, the service is about to look for a newer one;
    `miss`, it has not looked yet; `error`, none could be loaded."""
    prediction_cache: PredictionCacheHealth
    """What keeps remembered predictions fresh."""
    database: DatabaseHealth
    """Whether the lead database answers; an answer of health does not depend on it."""
    telemetry: TelemetryHealth
    """Whether events can be recorded."""
    breaker: BreakerHealth | None
    """The legacy route's circuit breaker; null where that route is turned off."""
    drift: DriftHealth
    """How recent leads compare with the training leads."""
    uptime_seconds: float
    """For how long this process has served, in seconds."""
    service_version: str
    """The version of the service."""
    request_id: RequestId


class AvailableModel(_Message):
    """One artifact found, and whether it can be trusted."""

    file: str
    """Its file, relative to the models directory."""
    version: Version
    """The version in its file name."""
    model_type: str
    """What kind of model it is, by its file name."""
    state: Literal["active", "verified", "refused", "incompatible", "unverified"]
    """`active`: it serves; `verified`: it could; `refused`: it cannot be trusted or loaded; `incompatible`:
    the lead source lacks columns that it reads; `unverified`: there is no manifest to verify it against."""
    reason: str | None
    """Why it does not serve, if there is a reason."""
    signature: Literal["valid", "invalid", "missing", "unchecked"]
    """That of its manifest; `unchecked` while no key is trusted, or where it was refused before."""
    signed_by: str | None
    """ID of the trusted key that signed it."""
    card: Annotated[str, Field(examples=["/ai/advanced-ml/models/20260101_120000/card"])] | None
    """Where its model card is served; null when there is none."""


class ModelsResponse(_Message):
    """The active model at the top level, and every artifact found. Nulls when no model is loaded."""

    status: Literal["loaded", "no_model_loaded"]
    """Whether a model serves."""
    reason: Annotated[str, Field(examples=["rollback_refused"])] | None
    """Why the newest artifact does not serve, or none was found, as of the last look."""
    version: Version | None
    """Its version."""
    model_type: str | None
    """What kind of model it is."""
    path: str | None
    """Its file, relative to the models directory."""
    sha256: Digest | None
    """The SHA-256 of that file."""
    loaded_at: str | None
    """When it was loaded (RFC 3339, UTC)."""
    loaded_since_seconds: float | None
    """For how long it has been loaded, in seconds."""
    feature_count: Count | None
    """How many features it reads."""
    performance: dict[str, float] | None
    """What it reached on held-out leads, by the name of the measure; empty for a day-one model."""
    available: list[AvailableModel]
    """Every model found, whether it serves or not."""
    request_id: RequestId


class Liveness(_Message):
    """The process runs."""

    status: Literal["alive"]
    """Always `alive`."""


class Readiness(_Message):
    """The worker may receive traffic."""

    status: Literal["ready"]
    """Always `ready`; otherwise the answer is an error."""
