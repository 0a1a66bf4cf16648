"""Refuses scoring requests beyond the number that can be answered in time, so that nobody waits in vain.

Only POST counts: whoever asks for health or metrics while the service is busy needs an answer most.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import OverloadedError


class InFlightLimit:
    """Plain ASGI middleware: at most `limit` POST requests at once in this worker.

    Raises:
        OverloadedError: that many are being answered already.
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
        if self._in_flight >= self._limit:
            raise OverloadedError
        self._in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1
