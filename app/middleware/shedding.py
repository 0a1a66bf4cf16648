"""Refuses a scoring request, before anything of it is read, for as little as a refusal may cost.

Ten times more requests than a worker can answer must not take its time from those it can. A refusal says and
leaves what every other error does: the problem document, its request ID, its one event, durable before it
leaves, a count and a log line. It only comes by a shorter way, and those of a few milliseconds share one
write to the telemetry log. What a browser sends (`Origin`), and every other path, is refused further in,
where its headers are known. The rest of a refused body is dropped by the server, so the connection stays in
use.
"""

import asyncio
import functools
import time
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.ai.events import RequestRecord, build_prediction_event
from app.ai.ml_telemetry import Telemetry
from app.errors import LeadScoringError, OverloadedError, TelemetryUnavailableError
from app.middleware.in_flight import Admission
from app.middleware.request_id import build_record, close_record

GROUP_SECONDS = 0.02
"""So long a refusal waits for others."""


class Shedding:
    """Plain ASGI middleware, outermost: refuses POSTs to `path` while `admission` is full.

    `telemetry` finds the telemetry of this request's application, `problem` turns an error into its answer.
    `monotonic` gives seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        path: str,
        admission: Admission,
        telemetry: Callable[[Scope], Telemetry],
        problem: Callable[[Scope, LeadScoringError], Response],
        monotonic: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._path = path
        self._admission = admission
        self._telemetry = telemetry
        self._problem = problem
        self._monotonic = monotonic
        self._group: asyncio.Event | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "http" and self._admission.is_full() and self._is_refused_here(scope):
            await self._refuse(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_refused_here(self, scope: Scope) -> bool:
        return (
            scope["path"] == self._path
            and scope["method"] == "POST"
            and not any(name == b"origin" for name, _ in scope["headers"])
        )

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = build_record(scope, monotonic=self._monotonic)
        record.route = self._path
        scope["state"]["record"] = record
        await self._wait_for_others()
        answer = self._problem(scope, OverloadedError())
        try:
            await self._record(scope, record, answer.status_code)
        except TelemetryUnavailableError as exc:
            answer = self._problem(scope, exc)
        answer.raw_headers.append((b"x-request-id", record.request_id.encode()))
        close_record(record, answer.status_code, self._monotonic())
        await answer(scope, receive, send)

    async def _record(self, scope: Scope, record: RequestRecord, status: int) -> None:
        latency_ms = record.latency_ms(self._monotonic())
        build = functools.partial(build_prediction_event, record, status, latency_ms)
        await self._telemetry(scope).record(build, record.request_id)

    async def _wait_for_others(self) -> None:
        if self._group is None:
            self._group = asyncio.Event()
            asyncio.get_running_loop().call_later(GROUP_SECONDS, self._end_group)
        await self._group.wait()

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.set()
            self._group = None
