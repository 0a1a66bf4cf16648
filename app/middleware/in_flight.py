"""Refuses scoring requests that could not be answered in time, so that nobody waits in vain.

How long a request would wait is how many are under way, times the time each of them has added to an answer of
late. That covers every queue there is: for the processor, for the scoring thread, for a database connection.
Only good answers count: a database that does not answer makes nobody busy, and remembered leads are answered
while it is away. Only POST counts: whoever asks for health or metrics while the service is busy needs an
answer most. And only a request that has arrived counts: one whose body trickles in must not take the place of
another. When it has arrived its deadline begins, from which every later step draws: the predictor what it
looks up, the audit what it records.
"""

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.ai.events import RequestRecord
from app.errors import OverloadedError

ALWAYS = 8
"""Enough requests at once to keep a worker and its database connections busy."""

LONGEST_WAIT_SECONDS = 1.0
"""Who would wait longer than this is better off asking again later, or somewhere else."""

RECORD_SECONDS = 1.0
"""The end of a request's deadline that is kept for its event."""

_NEWEST_SHARE = 0.1


class InFlightLimit:
    """Plain ASGI middleware: `ALWAYS` POST requests at once in this worker, more if they need not wait long.

    There are never more than `limit`. A request has `deadline_seconds` from its arrival, the last of them for
    its event. `monotonic` gives seconds.

    Raises:
        OverloadedError: from the call itself, or from `receive` with the end of the body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        deadline_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._limit = limit
        self._answer_seconds = deadline_seconds - RECORD_SECONDS
        self._monotonic = monotonic
        self._in_flight = 0
        self._seconds_each = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._check()
        place, began = 0, 0.0

        async def receive_counting() -> Message:
            nonlocal place, began
            message = await receive()
            if not place and not message.get("more_body", False):
                self._check()
                self._in_flight += 1
                place, began = self._in_flight, self._monotonic()
                scope["state"]["record"].answer_by = began + self._answer_seconds
            return message

        try:
            await self._app(scope, receive_counting, send)
            if place and _is_well_answered(scope["state"]["record"]):
                each = (self._monotonic() - began) / place
                self._seconds_each += _NEWEST_SHARE * (each - self._seconds_each)
        finally:
            self._in_flight -= place > 0

    def _check(self) -> None:
        waits = self._in_flight * self._seconds_each > LONGEST_WAIT_SECONDS
        if self._in_flight >= self._limit or (waits and self._in_flight >= ALWAYS):
            raise OverloadedError


def _is_well_answered(record: RequestRecord) -> bool:
    return record.predictions is not None and not record.predictions.degraded
