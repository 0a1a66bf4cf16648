"""Reads a scoring request: media type, query, body, and every lead ID in it, all by our own strict rules.

The framework's own decoding lets NaN and lone surrogates in, keeps the last of two equal keys, and repeats
what it refuses. Nothing here ever repeats a value: an error names a position and a rule. Called by both
routers.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request

from app.ai.domain import LEAD_ID_PATTERN, Extra
from app.errors import (
    BatchSizeExceededError,
    BodyTooLargeError,
    DatabaseUnavailableError,
    EmptyBatchError,
    ErrorPosition,
    InvalidLeadIdError,
    InvalidParameterError,
    InvalidPayloadError,
    LeadScoringError,
    ModelNotReadyError,
    OverloadedError,
    PredictionFailedError,
    RateLimitedError,
    TelemetryUnavailableError,
    UnsupportedMediaTypeError,
)

SCORING_ERRORS: tuple[type[LeadScoringError], ...] = (
    BatchSizeExceededError,
    BodyTooLargeError,
    UnsupportedMediaTypeError,
    InvalidPayloadError,
    EmptyBatchError,
    InvalidLeadIdError,
    InvalidParameterError,
    RateLimitedError,
    PredictionFailedError,
    ModelNotReadyError,
    DatabaseUnavailableError,
    OverloadedError,
    TelemetryUnavailableError,
)
"""Whatever a scoring route may answer with, for OpenAPI."""

MAX_LEAD_ID_LENGTH = 64
MAX_POSITIONS = 20

_NOTHING: Mapping[Extra, int] = MappingProxyType({})

_is_lead_id = re.compile(LEAD_ID_PATTERN).fullmatch
_are_joined_lead_ids = re.compile(f"{LEAD_ID_PATTERN}(?:\n{LEAD_ID_PATTERN})*+").fullmatch


async def read_lead_ids(
    request: Request, max_batch_size: int, offered: Mapping[Extra, int] = _NOTHING
) -> tuple[list[str], frozenset[Extra]]:
    """Returns the lead IDs of a scoring request, in order, duplicates kept, and what it wants included.

    `offered` names what may be included, and with how many lead IDs at most.

    Raises:
        UnsupportedMediaTypeError: the body is not declared as plain UTF-8 JSON.
        InvalidParameterError: see `read_include`.
        BodyTooLargeError: more bytes than the service reads (raised while the body comes in).
        InvalidPayloadError, EmptyBatchError, BatchSizeExceededError, InvalidLeadIdError: see
            `decode_lead_ids`; or more lead IDs than may be asked with what is included.
    """
    check_media_type(request.scope["headers"])
    include = read_include(request.scope["query_string"], offered.keys())
    lead_ids = decode_lead_ids(await read_body(request), max_batch_size)
    for extra in include:
        if len(lead_ids) > offered[extra]:
            raise BatchSizeExceededError(
                f"One request that includes {extra} may carry {offered[extra]} lead IDs; split the batch."
            )
    return lead_ids, include


async def read_body(request: Request) -> bytes:
    """Returns the body; Starlette's own way makes an asynchronous generator for each, which takes longer.

    Raises:
        ClientDisconnect: the client is gone before all of it was there.
    """
    parts, more = [], True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def check_media_type(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Accepts one `application/json`, at most with `charset=utf-8`, and no content encoding.

    Raises:
        UnsupportedMediaTypeError: anything else.
    """
    declared = [value.replace(b" ", b"").lower() for name, value in headers if name == b"content-type"]
    media_type, _, parameter = declared[0].partition(b";") if len(declared) == 1 else (b"", b"", b"")
    encodings = {value.lower() for name, value in headers if name == b"content-encoding"}
    if (
        media_type != b"application/json"
        or parameter not in (b"", b"charset=utf-8", b'charset="utf-8"')
        or not encodings <= {b"identity"}
    ):
        raise UnsupportedMediaTypeError


def read_include(query: bytes, offered: AbstractSet[Extra]) -> frozenset[Extra]:
    """Returns what the comma-separated `include` names; without the parameter, or with an empty one, nothing.

    Raises:
        InvalidParameterError: another parameter, or a name that is not `offered`.
    """
    if not query:
        return frozenset()
    wanted: set[str] = set()
    for name, value in QueryParams(query).multi_items():
        if name != "include":
            raise InvalidParameterError(_say_what_is_offered(offered))
        wanted.update(value.split(",") if value else ())
    if not wanted <= offered:
        raise InvalidParameterError(_say_what_is_offered(offered))
    return frozenset(extra for extra in offered if extra in wanted)


def _say_what_is_offered(offered: AbstractSet[Extra]) -> str:
    if not offered:
        return "This path takes no query parameter."
    names = ", ".join(offered)
    return f"The one query parameter is include; it may name {names}, separated by commas without spaces."


def decode_lead_ids(body: bytes, max_batch_size: int) -> list[str]:
    """Decodes either shape: a JSON array of lead IDs, or an object whose only key `lead_ids` holds one.

    Raises:
        InvalidPayloadError: not JSON (RFC 8259, UTF-8), a key twice, or neither shape.
        EmptyBatchError: no lead ID.
        BatchSizeExceededError: more than `max_batch_size`.
        InvalidLeadIdError: at least one lead ID does not follow the rule; names the first `MAX_POSITIONS`.
    """
    content = _decode_json(body)
    if isinstance(content, dict):
        _refuse_duplicate_keys(body)
        path, values = "/lead_ids", content.get("lead_ids") if len(content) == 1 else None
    else:
        path, values = "", content
    if not isinstance(values, list):
        raise InvalidPayloadError
    if not values:
        raise EmptyBatchError
    if len(values) > max_batch_size:
        raise BatchSizeExceededError(f"One request may carry {max_batch_size} lead IDs; split the batch.")
    if not _are_lead_ids(values):
        raise InvalidLeadIdError(positions=_find_bad_lead_ids(values, path))
    return values


def _are_lead_ids(values: Sequence[Any]) -> bool:
    # In one go, which takes half the time.
    try:
        joined = "\n".join(values)
    except TypeError:
        return False
    return joined.count("\n") == len(values) - 1 and _are_joined_lead_ids(joined) is not None


def _decode_json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        detail = "The body is not JSON in UTF-8."
        if body.startswith(BOM_UTF8):
            detail = "The body begins with a byte order mark; send JSON in UTF-8 without one."
        # The cause would carry the body into a log.
        raise InvalidPayloadError(detail) from None


def _refuse_duplicate_keys(body: bytes) -> None:
    # msgspec keeps the last of two equal keys; two readers of one body must not see different batches.
    def refuse(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise InvalidPayloadError("The body has the same key twice.")
        return dict(pairs)

    try:
        json.loads(body, object_pairs_hook=refuse)
    except (ValueError, RecursionError):
        raise InvalidPayloadError from None


def _find_bad_lead_ids(values: Sequence[object], path: str) -> tuple[ErrorPosition, ...]:
    positions: list[ErrorPosition] = []
    for index, value in enumerate(values):
        fault = _find_fault(value)
        if fault is not None:
            positions.append(ErrorPosition(f"{path}/{index}", InvalidLeadIdError.code, fault))
        if len(positions) == MAX_POSITIONS:
            break
    return tuple(positions)


def _find_fault(value: object) -> str | None:
    if not isinstance(value, str):
        return "A lead ID is a JSON string."
    if not 1 <= len(value) <= MAX_LEAD_ID_LENGTH:
        return "A lead ID has 1 to 64 characters."
    if not _is_lead_id(value):
        return "A lead ID has A-Z a-z 0-9 . _ : @ - only, and starts with a letter or digit."
    return None
