"""CORS as Starlette does it, with refused preflights in the shape of every other error. Called by `main`."""

import functools
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import LeadScoringError, MalformedRequestError

ALLOWED_HEADERS = ("Authorization", "Content-Type", "X-Request-ID", "traceparent", "tracestate")
EXPOSED_HEADERS = (
    "X-Request-ID",
    "Retry-After",
    "Allow",
    "WWW-Authenticate",
    "Deprecation",
    "Sunset",
    "Link",
)


class ProblemCors(CORSMiddleware):
    """Plain ASGI middleware; lies outside whatever answers errors, so that errors carry CORS headers too.

    `problem` turns an error into the ASGI response that carries it.
    """

    def __init__(
        self, app: ASGIApp, *, origins: Sequence[str], problem: Callable[[Scope, LeadScoringError], ASGIApp]
    ) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=ALLOWED_HEADERS,
            allow_credentials=True,
            expose_headers=EXPOSED_HEADERS,
        )
        self._problem = problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "http" and self._is_refused_preflight(scope):
            detail = "This origin, method or header is not allowed in a request from another origin."
            with_cors = functools.partial(self.send, send=send, request_headers=Headers(scope=scope))
            await self._problem(scope, MalformedRequestError(detail))(scope, receive, with_cors)
            return
        await super().__call__(scope, receive, send)

    def _is_refused_preflight(self, scope: Scope) -> bool:
        if scope["method"] != "OPTIONS":
            return False
        headers = Headers(scope=scope)
        if "origin" not in headers or "access-control-request-method" not in headers:
            return False
        return self.preflight_response(headers).status_code >= 400
