"""Records the one event of a scoring request before its answer leaves, and answers whatever nobody else did.

An answer whose event could not be made durable is withheld and replaced by 503 TELEMETRY_UNAVAILABLE: this is
the promise that every answered request has a row in `ai_events`. An exception that gets this far becomes the
500 problem here, because a server that sees one closes the connection without a word. Never looks at a body.
"""

import functools
import time
from collections.abc import Callable

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.ai.events import Event, RequestRecord, build_prediction_event
from app.ai.micro_batching import MOST_LEADS
from app.ai.ml_telemetry import Telemetry
from app.errors import InternalError, LeadScoringError, TelemetryUnavailableError
from app.middleware.in_flight import RECORD_SECONDS, Admission
from app.middleware.request_id import CLIENT_CLOSED_REQUEST

AUDITED_PREFIX = "/ai/"
_READING_METHODS = ("GET", "HEAD", "OPTIONS")

_log = structlog.get_logger()


class AuditMiddleware:
    """Plain ASGI middleware, directly inside `RequestIdMiddleware`.

    `telemetry` finds the telemetry of this request's application, `problem` turns an error into the ASGI
    response that carries it and notes its code in the request's record, `admission` knows how many requests
    are under way. `routes` are the templates of all routes: a request that is refused before it is routed is
    told apart by its path, if that is one of them.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        telemetry: Callable[[Scope], Telemetry],
        problem: Callable[[Scope, LeadScoringError], ASGIApp],
        admission: Admission,
        routes: frozenset[str] = frozenset(),
        monotonic: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._telemetry = telemetry
        self.problem = problem
        self._admission = admission
        self._routes = routes
        self._monotonic = monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(self, scope, receive, send)
        try:
            await self._app(scope, answer.receive, answer.send)
            if not answer.is_settled:
                await answer.fail(InternalError())
        except Exception:  # noqa: BLE001 - logged, and answered as an internal error
            _log.exception("unhandled_exception")
            await answer.fail(InternalError())
        finally:
            answer.close()

    async def record(self, scope: Scope, status: int) -> None:
        """Makes the event of a request durable that is about to be answered with `status`.

        A request with many leads does not wait for the events of others: beside its own work a write is
        nothing, and those who set out together again would leave the database idle while they are scored.

        Raises:
            TelemetryUnavailableError: it is not durable, so the answer must not leave.
        """
        record: RequestRecord = scope["state"]["record"]
        try:
            await self._telemetry(scope).record(
                self._describe(record, status),
                record.request_id,
                deadline_seconds=_seconds_left(record),
                under_way=self._admission.in_flight if (record.asked or 0) <= MOST_LEADS else 0,
            )
        except TelemetryUnavailableError:
            raise
        except Exception as exc:
            _log.exception("event_not_built")
            raise TelemetryUnavailableError from exc

    def submit(self, scope: Scope) -> None:
        """Leaves the event of a request that ended before it had an answer."""
        record: RequestRecord = scope["state"]["record"]
        record.error_code = record.error_code or "CLIENT_CLOSED_REQUEST"
        self._telemetry(scope).submit(self._describe(record, CLIENT_CLOSED_REQUEST), record.request_id)

    def name_route(self, scope: Scope) -> None:
        """Notes the route template, which the router leaves in the scope once it has matched."""
        template = getattr(scope.get("route"), "path_format", None)
        if template is None and scope["path"] in self._routes:
            template = scope["path"]
        if template is not None:
            scope["state"]["record"].route = template

    def _describe(self, record: RequestRecord, status: int) -> Callable[[], Event]:
        return functools.partial(build_prediction_event, record, status, record.latency_ms(self._monotonic()))


class _Answer:
    """One request's answer on its way out: its first message waits for the event."""

    def __init__(self, audit: AuditMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        self._client_gone = False
        self._audit, self._scope, self._receive, self._send = audit, scope, receive, send
        self._started = False
        self._withheld = False
        self._handed_over = False

    @property
    def is_settled(self) -> bool:
        """Whether an answer is under way, or nobody is there to take one."""
        return self._started or self._client_gone

    async def receive(self) -> Message:
        """Hands the application what the client sends, and notices when the client is gone."""
        message = await self._receive()
        self._client_gone = self._client_gone or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Forwards what the application sends, once the event is durable."""
        if self._withheld:
            return
        if message["type"] == "http.response.start":
            try:
                await self._make_durable(message["status"])
            except TelemetryUnavailableError as exc:
                self._withheld = True
                await self._replace(exc, message)
                return
            self._started = True
        await self._send(message)

    async def fail(self, error: LeadScoringError) -> None:
        """Answers with the error, unless an answer is under way: if it breaks off, the server cuts it."""
        if not self._started and not self._withheld:
            await self._audit.problem(self._scope, error)(self._scope, self._receive, self.send)

    def close(self) -> None:
        """Sees to it that a request without an answer leaves its event too."""
        self._audit.name_route(self._scope)
        if not self._started and not self._handed_over and _is_audited(self._scope, CLIENT_CLOSED_REQUEST):
            self._audit.submit(self._scope)

    async def _make_durable(self, status: int) -> None:
        self._audit.name_route(self._scope)
        if self._handed_over or not _is_audited(self._scope, status):
            return
        # Noted before waiting: a cancelled wait has handed its event over all the same.
        self._handed_over = True
        await self._audit.record(self._scope, status)

    async def _replace(self, error: LeadScoringError, withheld: Message) -> None:
        # The withheld answer has been through the CORS layer, which lies further in: its headers are kept.
        kept = [
            pair for pair in withheld.get("headers", ()) if pair[0].startswith((b"access-control-", b"vary"))
        ]

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._started = True
                message["headers"] = [*message["headers"], *kept]
            await self._send(message)

        await self._audit.problem(self._scope, error)(self._scope, self._receive, send_with_cors)


def _seconds_left(record: RequestRecord) -> float | None:
    """What the request has left for its event: at least what is kept for that, however late it is."""
    if record.answer_by is None:
        return None
    return RECORD_SECONDS + max(0.0, record.answer_by - time.monotonic())


def _is_audited(scope: Scope, status: int) -> bool:
    record: RequestRecord = scope["state"]["record"]
    if not scope["path"].startswith(AUDITED_PREFIX):
        return False
    if scope["method"] in _READING_METHODS:
        return record.error_code is not None
    return status >= 400 or record.predictions is not None
