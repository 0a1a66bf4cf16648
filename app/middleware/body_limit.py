"""Refuses what should not be read: too large a body, a request that names no host or two, an odd path.

A declared length is refused before a byte is read, an undeclared one when it turns out too long. Raises
errors of our own tree; whoever lies outside answers them. Never looks into a body.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLargeError, MalformedRequestError, NotFoundError

_MOST_DIGITS = 18


class BodyLimit:
    """Plain ASGI middleware: at most `max_bytes` of body, exactly one Host header (HTTP/1.0: or none).

    Raises:
        BodyTooLargeError: from the call itself, or from `receive` while the body comes in.
        MalformedRequestError: no Host header or several, or no sensible Content-Length.
        NotFoundError: a line end is the last of the path.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _check_host(scope)
        if scope["path"].endswith("\n"):
            raise NotFoundError  # the router would take it for the path without, which limits do not
        for value in _values(scope, b"content-length"):
            if _parse_length(value) > self._max_bytes:
                raise self._too_large()
        read = 0

        async def receive_counting() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_counting, send)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"One request may carry {self._max_bytes} bytes of body; split the batch.")


def _check_host(scope: Scope) -> None:
    hosts = len(_values(scope, b"host"))
    if hosts > 1 or (hosts == 0 and scope.get("http_version") != "1.0"):
        raise MalformedRequestError("The request must have exactly one Host header.")


def _parse_length(value: bytes) -> int:
    if not value.isdigit() or len(value) > _MOST_DIGITS:
        raise MalformedRequestError("The request's Content-Length is not a length.")
    return int(value)


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
