"""Decides which scoring requests a worker takes on, so that nobody waits in vain.

How long a request would wait is how many are under way, times the time between two answers of late while
there was something to do (Little's law). That covers every queue there is: for the processor, for the
scoring thread, for a database connection. A disk or a machine that stood still for a moment has kept all
that were under way from being answered once, not each of them. Only good answers count: a database that does
not answer makes nobody busy, and remembered leads are answered while it is away. Only what may ask for
predictions counts: whoever asks for health or metrics while the service is busy needs an answer most. And
only a request that has arrived counts: one whose body trickles in must not take the place of another. When
it has arrived its deadline begins, from which every later step draws: the predictor what it looks up, the
audit what it records. `shedding` asks first, and refuses most of a rush before any of it is read.
"""

import math
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
        self._last_ended = -math.inf

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return self._in_flight

    def is_full(self, longest_wait: float = LONGEST_WAIT_SECONDS) -> bool:
        """Tells whether one more would have to wait longer than this, in seconds."""
        waits = self._in_flight * self._seconds_each > longest_wait
        return self._in_flight >= self._limit or (waits and self._in_flight >= ALWAYS)

    def enter(self) -> None:
        """Takes a place."""
        self._in_flight += 1

    def leave(self, began: float, ended: float, *, well_answered: bool) -> None:
        """Gives the place back of a request that was under way between these seconds.

        From a good answer it learns how long that kept others waiting: since the one before had ended.
        """
        self._in_flight -= 1
        if well_answered:
            seconds = ended - max(began, self._last_ended)
            self._seconds_each += _NEWEST_SHARE * (seconds - self._seconds_each)
        self._last_ended = ended


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
        began: float | None = None
        well_answered = False

        async def receive_counting() -> Message:
            nonlocal began
            message = await receive()
            if began is None and not message.get("more_body", False):
                if self._admission.is_full(ARRIVED_WAIT_SECONDS):
                    raise OverloadedError
                self._admission.enter()
                began = self._monotonic()
                scope["state"]["record"].answer_by = began + self._answer_seconds
            return message

        try:
            await self._app(scope, receive_counting, send)
            well_answered = _is_well_answered(scope["state"]["record"])
        finally:
            if began is not None:
                self._admission.leave(began, self._monotonic(), well_answered=well_answered)


def _is_well_answered(record: RequestRecord) -> bool:
    return record.predictions is not None and not record.predictions.degraded
