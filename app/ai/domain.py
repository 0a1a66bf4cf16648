"""The nouns of a prediction: frozen records, and the protocols the outside world implements.

A batch is arrays from the database to the response. Shapes: `n` leads read, `k` features, `m` positions.
This module imports no I/O library and knows no rule; everything in `app.ai` may import it.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
CodeArray = NDArray[np.uint8]
TextArray = NDArray[np.object_]

ColumnKind = Literal["number", "boolean", "timestamp", "text"]
ConfidenceMethod = Literal["max_probability", "margin", "entropy", "interval"]
Extra = Literal["interval", "reasons", "features"]
Stage = Literal["model", "cache", "database", "features", "safety", "scoring", "calibration", "reasons"]
"""What a batch is taken through, one after the other."""
Verdict = Literal["ok", "caution", "abstain"]

VERDICTS: tuple[Verdict, ...] = ("ok", "caution", "abstain")
"""A verdict travels as its index in this tuple (uint8) until it reaches the wire."""

ANSWER = np.dtype(
    [
        ("raw_score", np.float64),
        ("probability", np.float64),
        ("confidence", np.float64),
        ("coverage", np.float64),
        ("prediction", np.bool_),
        ("verdict", np.uint8),
    ],
    align=True,
)
"""Everything an answer says of one lead; a batch is an array of these: answers are moved, never rebuilt.

By `take` and `put`: NumPy moves an answer in square brackets field by field, which takes many times as long.
"""

AnswerArray = NDArray[np.void]

UNKNOWN_LEAD, AMBIGUOUS_LEAD = -1, -2
"""Row numbers that stand for: no such lead; more than one lead carries this external reference."""


class InputColumn(NamedTuple):
    """A column a feature reads, and how its values are to be understood."""

    name: str
    kind: ColumnKind


class Column(NamedTuple):
    """One column of `n` leads.

    `values` is float64 for numbers, booleans (0 or 1) and timestamps (seconds since 1970-01-01 UTC), and an
    object array of `str` for text. `present` is False where the database holds NULL; the value there is NaN
    or the empty string. A stored NaN or infinity is present.
    """

    kind: ColumnKind
    values: FloatArray | TextArray
    present: BoolArray


class LeadColumns(msgspec.Struct, frozen=True, eq=False):
    """`n` leads as columns, by column name."""

    n: int
    columns: Mapping[str, Column]


class FetchedLeads(msgspec.Struct, frozen=True, eq=False):
    """What the lead source knows of the IDs asked.

    `row_of` (one entry for each ID asked) is the row in `leads`, or `UNKNOWN_LEAD`, or `AMBIGUOUS_LEAD`.
    Two IDs may share a row. `uuid_of` is the canonical UUID of each ID's lead, the ID itself without one.
    """

    row_of: IntArray
    uuid_of: Sequence[str]
    leads: LeadColumns


UsePart = Callable[[int, FetchedLeads], None]
"""Is handed what the lead source knows of some of the IDs asked: of those from this place on."""


class LeadSource(Protocol):
    """Where leads are read from; implemented by `app.db.leads`."""

    async def fetch(self, lead_ids: Sequence[str], columns: Sequence[InputColumn], use_part: UsePart) -> None:
        """Reads the named columns of these leads in one statement.

        `lead_ids` are canonical (see `canonical_lead_id`) and distinct. What is found is handed to `use_part`
        part by part, as it comes; a part that comes again takes the place of the one before.

        Raises:
            DatabaseUnavailableError: no answer within the deadline.
            PredictionFailedError: the relation no longer has a column, or it has another type.
        """
        ...


class LeadObserver(Protocol):
    """Who wants to know which leads changed; told by `app.db.change_listener`, on its thread."""

    def forget(self, uuids: Sequence[str]) -> None:
        """These leads, named by canonical UUID, have changed."""
        ...

    def forget_all(self) -> None:
        """Any lead may have changed."""
        ...

    def trust_until(self, monotonic_seconds: float) -> None:
        """Until then, a lead that is not named has not changed for too long."""
        ...


class EventSink(Protocol):
    """Where events end up for good; implemented by `app.db.ai_events`."""

    async def write_events(self, events: Sequence["StoredEvent"]) -> None:
        """Writes all of them or none; an event already there is left as it is.

        Raises:
            DatabaseUnavailableError: no answer within the deadline.
        """
        ...


class StoredEvent(msgspec.Struct, frozen=True):
    """One event as the telemetry log keeps it: `meta` is the JSON text of a closed event schema."""

    id: str
    action: str
    meta: str
    request_id: str | None
    created_at: str


class ModelRef(msgspec.Struct, frozen=True):
    """Which model: id, version, and the SHA-256 of the artifact's bytes.

    Models of the same artifact may still answer differently, by another calibrator or threshold:
    `manifest_sha256` is of all that decides an answer, the artifact included.
    """

    model_id: str
    version: str
    sha256: str
    manifest_sha256: str


class Rejection(msgspec.Struct, frozen=True):
    """One lead we decline, inside a good answer."""

    lead_id: str
    position: int
    code: str
    message: str


class Contribution(msgspec.Struct, frozen=True):
    """What one column, or features that share their columns, adds to a lead's raw score.

    `value` is the class the lead's value falls in, in words of ours: never a text of the lead.
    """

    feature: str
    value: str
    contribution: float


class Receipt(msgspec.Struct, frozen=True):
    """How a probability comes about: all of it added up is the probability, to 1e-9."""

    base_rate: float
    contributions: tuple[Contribution, ...]
    calibration: float
    bounds: float


class Explanation(msgspec.Struct, frozen=True):
    """The receipt of one answer, its largest contributions as sentences, the largest first, and the features.

    A feature is None where the lead has nothing for it that can be used.
    """

    receipt: Receipt
    reasons: tuple[str, ...]
    features: Mapping[str, float | None]


class RequestContext(msgspec.Struct, frozen=True):
    """What a prediction is asked for.

    The moment its features are true for (s UTC), what it carries beyond the usual, and the moment by which it
    must be known what to answer (s of `time.monotonic`), if there is one.
    """

    as_of: float
    include: frozenset[Extra] = frozenset()
    answer_by: float | None = None


class Predictions(msgspec.Struct, frozen=True, eq=False):
    """The outcome of one batch; the arrays have one entry for each answered position, in request order.

    `lead_ids` are as they were sent. `verdict` holds indices into `VERDICTS`. `stages_ms` is wall time by
    stage, in milliseconds. `intervals` (m, 2), the ends of each interval, `explanations` (m) and `features`
    (m) are there when they were asked for. `degraded_age_seconds` is there when the lead source is away: the
    age of the oldest answer that is the last that was known, 0 if all were known to hold.
    """

    asked: int
    lead_ids: list[str]
    probability: FloatArray
    confidence: FloatArray
    coverage: FloatArray
    prediction: BoolArray
    verdict: CodeArray
    cache_hits: int
    rejections: tuple[Rejection, ...]
    model: ModelRef
    calibration_method: str
    confidence_method: ConfidenceMethod
    bounds: tuple[float, float]
    stages_ms: Mapping[Stage, float]
    intervals: FloatArray | None = None
    explanations: Sequence[Explanation] | None = None
    features: Sequence[Mapping[str, float | None]] | None = None
    degraded_age_seconds: float | None = None

    @property
    def degraded(self) -> bool:
        """Whether the lead source is away: the answers are remembered ones, and more may have been asked."""
        return self.degraded_age_seconds is not None

    def describe_age(self) -> "JsonObject":
        """Returns what an answer says while the lead source is away: nothing while it is not."""
        if self.degraded_age_seconds is None:
            return {}
        return {"degraded": True, "degraded_age_seconds": round(self.degraded_age_seconds, 3)}

    def count_rejections(self) -> dict[str, int]:
        """Returns how many positions were declined, by code."""
        return dict(Counter(rejection.code for rejection in self.rejections)) if self.rejections else {}


JsonObject = dict[str, Any]

Progress = Callable[[str, int, int], None]
"""Told the stage of a long work, how much of it is done, and how much there is (0 while that is unknown)."""

_SECONDS_PER_DAY = 86_400


def start_of_day(seconds: float) -> float:
    """Returns the start of the UTC day, in seconds UTC: the as-of time of whatever is asked that day."""
    return seconds // _SECONDS_PER_DAY * _SECONDS_PER_DAY


LEAD_ID_PATTERN = "[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}"
"""What a lead ID in a scoring request matches as a whole."""

_UUID_PATTERN = "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_UUID, _UUIDS = re.compile(_UUID_PATTERN), re.compile(f"{_UUID_PATTERN}(?:\n{_UUID_PATTERN})*+")


def canonical_lead_id(lead_id: str) -> str:
    """Returns the form a lead is looked up and cached by: a UUID in lower case, anything else unchanged."""
    return lead_id.lower() if is_uuid(lead_id) else lead_id


def canonical_lead_ids(lead_ids: Sequence[str]) -> Sequence[str]:
    """Returns the canonical form of each; without capital letters, which is usual, these are they."""
    text = "".join(lead_ids)
    return lead_ids if text == text.lower() else [canonical_lead_id(lead_id) for lead_id in lead_ids]


def split_uuids(lead_ids: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the IDs that have the form of a UUID, and the others; usually all are of one kind."""
    joined = "\n".join(lead_ids)
    if joined.count("\n") == len(lead_ids) - 1 and _UUIDS.fullmatch(joined):
        return lead_ids, []
    uuids = [lead_id for lead_id in lead_ids if is_uuid(lead_id)]
    if not uuids:
        return [], lead_ids
    return uuids, [lead_id for lead_id in lead_ids if not is_uuid(lead_id)]


def is_uuid(lead_id: str) -> bool:
    """Tells whether the ID has the form of a UUID (8-4-4-4-12 hexadecimal digits, any case)."""
    return _UUID.fullmatch(lead_id) is not None
