"""Refuses scoring requests that could not be answered in time, so that nobody waits in vain.

A few requests at once are always let in. More are let in only while the worker keeps up: the time a request
has waited for its turn is the time everything waits, this refusal included. It is the processor's queue that
is measured: requests that wait for a database that is away hold up nobody. Only POST counts: whoever asks for
health or metrics while the service is busy needs an answer most. And only a request that has arrived counts:
one whose body trickles in must not take the place of another.
"""

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import OverloadedError

ALWAYS = 8
"""Enough requests at once to keep a worker and its database connections busy."""

LONGEST_WAIT_SECONDS = 0.02
"""A turn that comes later than this means that there is more work than time."""


class InFlightLimit:
    """Plain ASGI middleware: `ALWAYS` POST requests at once in this worker, and up to `limit` if it keeps up.

    The server leaves the moment a request arrived, in seconds of `monotonic`, in `state["arrived_at"]`.

    Raises:
        OverloadedError: from the call itself, or from `receive` with the end of the body.
    """

    def __init__(self, app: ASGIApp, *, limit: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._limit = limit
        self._monotonic = monotonic
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        arrived_at = scope.get("state", {}).get("arrived_at")
        if self._in_flight >= ALWAYS and arrived_at is not None and self._is_late(arrived_at):
            raise OverloadedError
        arrived = False

        async def receive_counting() -> Message:
            nonlocal arrived
            message = await receive()
            if not arrived and not message.get("more_body", False):
                if self._in_flight >= self._limit:
                    raise OverloadedError
                self._in_flight += 1
                arrived = True
            return message

        try:
            await self._app(scope, receive_counting, send)
        finally:
            self._in_flight -= arrived

    def _is_late(self, arrived_at: float) -> bool:
        return self._monotonic() - arrived_at > LONGEST_WAIT_SECONDS
