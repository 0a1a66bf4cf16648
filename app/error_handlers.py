"""Turns every error into the one shape errors have over HTTP (RFC 9457), whoever raised it.

Below the edge nobody knows of HTTP: an error carries its code, status and an explanation in our own words,
and this file alone writes them down. Never writes a traceback, a value somebody sent, a file path or SQL.
`main` puts the pieces in place.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import msgspec
import structlog
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import (
    InternalError,
    InvalidPayloadError,
    LeadScoringError,
    MalformedRequestError,
    MethodNotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
)
from app.schemas.openapi import PROBLEM_MEDIA_TYPE

FRAMEWORK_ERRORS = (HTTPException, RequestValidationError, Exception)
"""What the framework answers in its own words unless `Problems.answer_framework_error` does."""

_log = structlog.get_logger()


class Problems:
    """Builds error answers.

    `methods` maps the template of each path that is served to the methods it answers to: the other paths, and
    what stands for a template's parameters, are the caller's text and are never repeated. `now` gives the
    time, UTC.
    """

    def __init__(
        self,
        methods: Mapping[str, frozenset[str]],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._methods = methods
        self._now = now

    def __call__(self, scope: Scope, error: LeadScoringError) -> Response:
        """Returns the answer for an error, and notes its code in the request's record."""
        record = scope.get("state", {}).get("record")
        if record is not None:
            record.error_code = error.code
        template = getattr(scope.get("route"), "path_format", None) or scope["path"]
        path = template if template in self._methods else "/"
        body = {
            "type": f"urn:lead-scoring:problem:{error.code}",
            "title": error.title,
            "status": error.status,
            "detail": error.detail,
            "instance": path,
            "error_code": error.code,
            "request_id": record.request_id if record is not None else "unknown",
            "timestamp": self._now().isoformat(timespec="seconds").replace("+00:00", "Z"),
            "errors": error.positions,
        }
        return Response(
            msgspec.json.encode(body), error.status, self._headers(error, path), PROBLEM_MEDIA_TYPE
        )

    def _headers(self, error: LeadScoringError, path: str) -> dict[str, str]:
        headers = {"Cache-Control": "no-store"}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if isinstance(error, MethodNotAllowedError):
            headers["Allow"] = ", ".join(sorted(self._methods.get(path, ())))
        if isinstance(error, NotAuthenticatedError):
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    async def answer_framework_error(self, request: Request, exc: Exception) -> Response:
        """Answers what the framework raises by itself; its own texts, which repeat values, are dropped."""
        return self(request.scope, _translate(exc))


class ErrorBoundary:
    """Plain ASGI: answers every error of what it wraps, the unexpected ones as 500, and re-raises none.

    A server that sees an exception closes the connection without a word, and a proxy may have queued
    somebody else's request on it. Once an answer has begun nothing better can be done than to let the server
    cut it off.
    """

    def __init__(self, app: ASGIApp, problems: Problems) -> None:
        self._app = app
        self._problems = problems

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception as exc:
            if started:
                raise
            await self._problems(scope, _own(exc))(scope, receive, send)


def _translate(exc: Exception) -> LeadScoringError:
    if isinstance(exc, RequestValidationError):
        return InvalidPayloadError()
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    if status == 404:
        return NotFoundError()
    if status == 405:
        return MethodNotAllowedError()
    return MalformedRequestError() if status < 500 else InternalError()


def _own(exc: Exception) -> LeadScoringError:
    if isinstance(exc, LeadScoringError):
        return exc
    _log.error("unhandled_exception", exc_info=exc)
    return InternalError()
