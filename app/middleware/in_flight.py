"""Refuses scoring requests beyond the number that can be answered in time, so that nobody waits in vain.

Only POST counts: whoever asks for health or metrics while the service is busy needs an answer most. And only
a request that has arrived counts: one whose body trickles in must not take the place of another.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import OverloadedError


class InFlightLimit:
    """Plain ASGI middleware: at most `limit` POST requests at once in this worker.

    Raises:
        OverloadedError: that many are being answered already; from the call itself, or from `receive` with
            the end of the body.
    """

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._check()
        arrived = False

        async def receive_counting() -> Message:
            nonlocal arrived
            message = await receive()
            if not arrived and not message.get("more_body", False):
                self._check()
                self._in_flight += 1
                arrived = True
            return message

        try:
            await self._app(scope, receive_counting, send)
        finally:
            self._in_flight -= arrived

    def _check(self) -> None:
        if self._in_flight >= self._limit:
            raise OverloadedError
