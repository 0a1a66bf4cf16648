"""The error tree: every failure the service can name, with its code, status and meaning.

    LeadScoringError
    ├── CallerError                    the request is at fault; repeating it changes nothing
    │   ├── MalformedRequestError      400 MALFORMED_REQUEST
    │   ├── NotAuthenticatedError      401 NOT_AUTHENTICATED; with WWW-Authenticate
    │   ├── NotAllowedError            403 NOT_ALLOWED
    │   ├── NotFoundError              404 NOT_FOUND
    │   ├── MethodNotAllowedError      405 METHOD_NOT_ALLOWED
    │   ├── UnsupportedMediaTypeError  415 UNSUPPORTED_MEDIA_TYPE
    │   ├── BatchSizeExceededError     413 BATCH_SIZE_EXCEEDED
    │   ├── BodyTooLargeError          413 BODY_TOO_LARGE
    │   ├── InvalidPayloadError        422 INVALID_PAYLOAD_FORMAT
    │   ├── EmptyBatchError            422 EMPTY_BATCH
    │   ├── InvalidLeadIdError         422 INVALID_LEAD_ID
    │   ├── InvalidParameterError      422 INVALID_PARAMETER
    │   └── RateLimitedError           429 RATE_LIMITED; with Retry-After
    ├── ServiceError                   we are at fault
    │   ├── InternalError              500 INTERNAL_ERROR
    │   └── PredictionFailedError      500 PREDICTION_FAILED
    ├── UnavailableError               503, passes by itself; always with Retry-After
    │   ├── ModelNotReadyError         MODEL_NOT_READY
    │   ├── DatabaseUnavailableError   DATABASE_UNAVAILABLE
    │   ├── CircuitOpenError           CIRCUIT_OPEN
    │   ├── OverloadedError            OVERLOADED
    │   ├── KeysUnavailableError       KEYS_UNAVAILABLE
    │   ├── DrainingError              DRAINING
    │   └── TelemetryUnavailableError  TELEMETRY_UNAVAILABLE
    └── CommandError                   a command for people cannot go on: one clear line
        ├── SettingsError              an environment variable is wrong
        ├── ArtifactError              a model artifact cannot be trusted or loaded
        ├── SigningKeyError            a signing key cannot be made or used
        ├── ImportFileError            a CSV file cannot be imported as it is
        ├── MissingRightError          the database user may not do what a command does
        └── TrainingError              the data cannot be trained or evaluated on, or must not be

Details are written here or where the error is raised, in our own words: never a value the caller or the
database sent, a path, or SQL.
"""

import random
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class ErrorPosition:
    """One place in the request body that is wrong: a JSON pointer, a code and a sentence."""

    pointer: str
    code: str
    detail: str


class LeadScoringError(Exception):
    """Root of the tree; `str(error)` is safe to show to the caller."""

    code: ClassVar[str] = "INTERNAL_ERROR"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    default_detail: ClassVar[str] = "Something went wrong on our side. Quote the request ID to report it."

    def __init__(
        self,
        detail: str | None = None,
        *,
        positions: tuple[ErrorPosition, ...] = (),
        retry_after: int | None = None,
    ) -> None:
        self.detail = detail or self.default_detail
        self.positions = positions
        self.retry_after = retry_after
        super().__init__(self.detail)


class CallerError(LeadScoringError):
    """The request is at fault; repeating it changes nothing."""


class MalformedRequestError(CallerError):
    """Not a request that HTTP or CORS allows, whatever it asks for."""

    code, status, title = "MALFORMED_REQUEST", 400, "Malformed request"
    default_detail = "The request breaks a rule of HTTP."


class NotAuthenticatedError(CallerError):
    """No credential, or none that can be verified."""

    code, status, title = "NOT_AUTHENTICATED", 401, "Not authenticated"
    default_detail = "Send Authorization: Bearer with a valid API key or token."


class NotAllowedError(CallerError):
    """The credential is valid, but does not have the scope that the path asks for."""

    code, status, title = "NOT_ALLOWED", 403, "Not allowed"
    default_detail = "The credential is valid, but does not have the scope that this path asks for."


class NotFoundError(CallerError):
    """No such path."""

    code, status, title = "NOT_FOUND", 404, "Not found"
    default_detail = "There is nothing at this path."


class MethodNotAllowedError(CallerError):
    """The path exists, the method does not."""

    code, status, title = "METHOD_NOT_ALLOWED", 405, "Method not allowed"
    default_detail = "This path does not answer to this method; see the Allow header."


class UnsupportedMediaTypeError(CallerError):
    """The body is not declared as JSON, or is encoded."""

    code, status, title = "UNSUPPORTED_MEDIA_TYPE", 415, "Unsupported media type"
    default_detail = "Send the body as Content-Type: application/json, in UTF-8, without Content-Encoding."


class BatchSizeExceededError(CallerError):
    """More lead IDs than one request may carry."""

    code, status, title = "BATCH_SIZE_EXCEEDED", 413, "Too many lead IDs"
    default_detail = "The batch has more lead IDs than one request may carry; split it."


class BodyTooLargeError(CallerError):
    """More bytes than one request may carry."""

    code, status, title = "BODY_TOO_LARGE", 413, "Body too large"
    default_detail = "The body is larger than this service reads; split the batch."


class InvalidPayloadError(CallerError):
    """Not JSON, or not one of the two shapes."""

    code, status, title = "INVALID_PAYLOAD_FORMAT", 422, "Invalid payload"
    default_detail = 'Send a JSON array of lead IDs, or {"lead_ids": [...]} with no other key.'


class EmptyBatchError(CallerError):
    """No lead ID at all."""

    code, status, title = "EMPTY_BATCH", 422, "Empty batch"
    default_detail = "Send at least one lead ID."


class InvalidLeadIdError(CallerError):
    """At least one lead ID is malformed."""

    code, status, title = "INVALID_LEAD_ID", 422, "Invalid lead ID"
    default_detail = (
        "A lead ID is 1 to 64 characters from A-Z a-z 0-9 . _ : @ - and starts with a letter or a digit."
    )


class InvalidParameterError(CallerError):
    """A query parameter is unknown or has a value it cannot have."""

    code, status, title = "INVALID_PARAMETER", 422, "Invalid parameter"
    default_detail = "A query parameter is unknown or has a value it cannot have."


class RateLimitedError(CallerError):
    """The client asks more often than it may; `retry_after` is in whole seconds and always set."""

    code, status, title = "RATE_LIMITED", 429, "Rate limited"
    default_detail = "This client sends more requests than it may; wait as long as Retry-After says."

    def __init__(self, *, retry_after: int = 1) -> None:
        super().__init__(retry_after=retry_after)


class ServiceError(LeadScoringError):
    """We are at fault."""


class InternalError(ServiceError):
    """Nothing more specific is known; the log has the cause."""


class PredictionFailedError(ServiceError):
    """The model or the data under it failed in a way that is a defect, not an outage."""

    code, status, title = "PREDICTION_FAILED", 500, "Prediction failed"
    default_detail = "The leads could not be scored. Quote the request ID to report it."


class UnavailableError(LeadScoringError):
    """Passes by itself; `retry_after` is in whole seconds and always set."""

    status = 503

    def __init__(self, detail: str | None = None, *, retry_after: int = 1) -> None:
        super().__init__(detail, retry_after=retry_after)


class ModelNotReadyError(UnavailableError):
    """No verified model is loaded."""

    code, title = "MODEL_NOT_READY", "Model not ready"
    default_detail = "No verified model is loaded; the service looks again by itself."


class DatabaseUnavailableError(UnavailableError):
    """The lead source did not answer within the deadline."""

    code, title = "DATABASE_UNAVAILABLE", "Database unavailable"
    default_detail = "The lead database did not answer in time; try again shortly."


class CircuitOpenError(UnavailableError):
    """The legacy router's circuit breaker is open."""

    code, title = "CIRCUIT_OPEN", "Circuit open"
    default_detail = "Scoring failed repeatedly; this route pauses before it tries again."


class OverloadedError(UnavailableError):
    """More requests are in flight than can be answered in time.

    `retry_after` is drawn, so that whoever is refused now does not come back all at one instant.
    """

    code, title = "OVERLOADED", "Overloaded"
    default_detail = "The service has more requests than it can answer in time; try again shortly."

    def __init__(self) -> None:
        super().__init__(retry_after=random.randint(1, 3))  # noqa: S311 - spreads callers out, nothing secret


class KeysUnavailableError(UnavailableError):
    """Whether a credential is valid cannot be said: the keys to verify it with have never been read."""

    code, title = "KEYS_UNAVAILABLE", "Keys unavailable"
    default_detail = "The keys that credentials are verified with are not known yet; try again shortly."


class DrainingError(UnavailableError):
    """The service is ending; it still answers, but wants no new traffic."""

    code, title = "DRAINING", "Draining"
    default_detail = "The service is about to end; send requests elsewhere."


class TelemetryUnavailableError(UnavailableError):
    """The audit record could not be written, so no answer is given."""

    code, title = "TELEMETRY_UNAVAILABLE", "Telemetry unavailable"
    default_detail = "The audit record of this request could not be written, so it is not answered."


class CommandError(LeadScoringError):
    """A command for people cannot go on; `str(error)` is one clear line."""


class SettingsError(CommandError):
    """An environment variable is wrong; the message names it."""


class ArtifactError(CommandError):
    """A model artifact cannot be trusted or loaded; `reason` is a short machine-readable word."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


class SigningKeyError(CommandError):
    """A signing key cannot be made or used; the message names the file."""


class ImportFileError(CommandError):
    """A CSV file cannot be imported as it is; the message names the line."""


class MissingRightError(CommandError):
    """The database user may not do what a command does; `needs` says what to grant."""

    def __init__(self, needs: str) -> None:
        super().__init__(f"the database user may not do this: it needs {needs}")


class TrainingError(CommandError):
    """The data cannot be trained or evaluated on, or must not be."""
