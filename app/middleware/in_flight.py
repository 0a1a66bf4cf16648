"""Decides which scoring requests a worker takes on, so that nobody waits in vain.

How long a request would wait is how many are under way, times the time each of them has added to an answer of
late. That covers every queue there is: for the processor, for the scoring thread, for a database connection.
Only good answers count: a database that does not answer makes nobody busy, and remembered leads are answered
while it is away. Only what may ask for predictions counts: whoever asks for health or metrics while the
service is busy needs an answer most. And only a request that has arrived counts: one whose body trickles in
must not take the place of another. When it has arrived its deadline begins, from which every later step
draws: the predictor what it looks up, the audit what it records. `shedding` asks first, and refuses most of
a rush before any of it is read.
"""

import time
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.ai.events import RequestRecord
from app.errors import OverloadedError

ALWAYS = 4
"""Enough of the dearest requests at once to keep a worker busy; more of them would only wait."""

LONGEST_WAIT_SECONDS = 0.5
"""Who would wait longer than this is better off asking again later, or somewhere else."""

ARRIVED_WAIT_SECONDS = 2 * LONGEST_WAIT_SECONDS
"""What has been let in and read meanwhile may wait longer: refusing it now would cost most."""

RECORD_SECONDS = 1.0
"""The end of a request's deadline that is kept for its event."""

_NEWEST_SHARE = 0.1


class Admission:
    """How many requests this worker has under way, and whether one more could be answered in time.

    `ALWAYS` are let in, more if they need not wait long, never more than `limit`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0
        self._seconds_each = 0.0

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return self._in_flight

    def is_full(self, longest_wait: float = LONGEST_WAIT_SECONDS) -> bool:
        """Tells whether one more would have to wait longer than this, in seconds."""
        waits = self._in_flight * self._seconds_each > longest_wait
        return self._in_flight >= self._limit or (waits and self._in_flight >= ALWAYS)

    def enter(self) -> int:
        """Takes a place; returns how many are taken."""
        self._in_flight += 1
        return self._in_flight

    def leave(self) -> None:
        """Gives a place back."""
        self._in_flight -= 1

    def note(self, seconds_each: float) -> None:
        """Learns from a good answer what each request under way has added to it."""
        self._seconds_each += _NEWEST_SHARE * (seconds_each - self._seconds_each)


class InFlightLimit:
    """Plain ASGI middleware: no more POST requests to `paths` at once than `admission` lets in.

    A request has `deadline_seconds` from its arrival, the last of them for its event. `monotonic` gives
    seconds.

    Raises:
        OverloadedError: from the call itself, or from `receive` with the end of the body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Collection[str],
        admission: Admission,
        deadline_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._paths = paths
        self._admission = admission
        self._answer_seconds = deadline_seconds - RECORD_SECONDS
        self._monotonic = monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        if self._admission.is_full():
            raise OverloadedError
        place, began = 0, 0.0

        async def receive_counting() -> Message:
            nonlocal place, began
            message = await receive()
            if not place and not message.get("more_body", False):
                if self._admission.is_full(ARRIVED_WAIT_SECONDS):
                    raise OverloadedError
                place, began = self._admission.enter(), self._monotonic()
                scope["state"]["record"].answer_by = began + self._answer_seconds
            return message

        try:
            await self._app(scope, receive_counting, send)
            if place and _is_well_answered(scope["state"]["record"]):
                self._admission.note((self._monotonic() - began) / place)
        finally:
            if place:
                self._admission.leave()


def _is_well_answered(record: RequestRecord) -> bool:
    return record.predictions is not None and not record.predictions.degraded
