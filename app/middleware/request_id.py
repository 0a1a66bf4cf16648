"""Names each request, binds the name to all that is logged meanwhile, closes it with one line and its counts.

Of the middleware only `Deprecation` and `Shedding` lie further out, and what `Shedding` refuses never comes
here. It leaves a `RequestRecord` in `scope["state"]["record"]` for the layers below. It never looks at a
body, a query or a path: those are the caller's text.
"""

import asyncio
import re
import time
from collections.abc import Callable

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid7

from app.ai.domain import Predictions, start_of_day
from app.ai.events import RequestRecord
from app.metrics import observe_batch, observe_request

CLIENT_CLOSED_REQUEST = 499
"""The status recorded for a request that ended before it had an answer."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)

_log = structlog.get_logger()


class RequestIdMiddleware:
    """Plain ASGI middleware; `now` gives seconds UTC, `monotonic` seconds, `new_id` a UUIDv7."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.perf_counter,
        new_id: Callable[[], str] = lambda: str(uuid7()),
    ) -> None:
        self._app = app
        self._now = now
        self._monotonic = monotonic
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = build_record(scope, now=self._now, monotonic=self._monotonic, new_id=self._new_id)
        scope.setdefault("state", {})["record"] = record
        status, name = CLIENT_CLOSED_REQUEST, record.request_id.encode()

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        bound = structlog.contextvars.bind_contextvars(**_names(record))
        try:
            await self._app(scope, receive, send_named)
        finally:
            # In the loop's next turn: the answer leaves at the end of this one, and need not wait for it.
            asyncio.get_running_loop().call_soon(close_record, record, status, self._monotonic())
            structlog.contextvars.reset_contextvars(**bound)


def build_record(
    scope: Scope,
    *,
    now: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.perf_counter,
    new_id: Callable[[], str] = lambda: str(uuid7()),
) -> RequestRecord:
    """Returns the record of a request that has just come in, with the caller's own ID if that is valid."""
    given = _match_only_header(scope, b"x-request-id", _REQUEST_ID)
    trace = _match_only_header(scope, b"traceparent", _TRACEPARENT)
    return RequestRecord(
        request_id=given.group().decode() if given else new_id(),
        started=monotonic(),
        as_of=start_of_day(now()),
        trace_id=trace.group(1).decode() if trace else None,
    )


def close_record(record: RequestRecord, status: int, now: float) -> None:
    """Counts a request that has ended, and writes its line; `now` is on the clock of its `started`."""
    observe_request(record.route, status, record.error_code, now - record.started)
    if record.predictions is not None and status < 400:
        _count_batch(record.predictions)
    _log.info(
        "request",
        route=record.route,
        status=status,
        code=record.error_code,
        latency_ms=record.latency_ms(now),
        **_names(record),
    )


def _count_batch(predictions: Predictions) -> None:
    observe_batch(
        answered=len(predictions.lead_ids),
        coverage_sum=float(predictions.coverage.sum()),
        rejections=predictions.count_rejections(),
        stages_ms=predictions.stages_ms.items(),
    )


def _names(record: RequestRecord) -> dict[str, str]:
    traced = {} if record.trace_id is None else {"trace_id": record.trace_id}
    return {"request_id": record.request_id, **traced}


def _match_only_header(scope: Scope, name: bytes, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
    # A header sent twice is somebody's confusion or an attack: neither copy is believed.
    values = [value for key, value in scope["headers"] if key == name]
    return pattern.fullmatch(values[0]) if len(values) == 1 else None
