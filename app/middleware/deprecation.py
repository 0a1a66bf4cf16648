"""Says on every answer below a path that the path is on its way out, errors included. Called by `main`."""

from datetime import UTC, datetime
from email.utils import format_datetime

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Deprecation:
    """Plain ASGI middleware, outside whatever answers errors.

    Adds `Deprecation` (RFC 9745), `Link` to the `successor`, and `Sunset` (RFC 8594) when there is a date.
    """

    def __init__(
        self, app: ASGIApp, *, prefix: str, since: datetime, sunset: datetime | None, successor: str
    ) -> None:
        self._app = app
        self._prefix = prefix
        self._headers = {
            "Deprecation": f"@{int(since.timestamp())}",
            "Link": f'<{successor}>; rel="successor-version"',
        }
        if sunset is not None:
            self._headers["Sunset"] = format_datetime(sunset.astimezone(UTC), usegmt=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or not scope["path"].startswith(self._prefix):
            await self._app(scope, receive, send)
            return

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, send_marked)
