"""uvicorn's HTTP protocol, with limits for the client, and refusals in the shape of every other error.

A client has one deadline to send a request, and as long again to take its answer; a connection that waits
for its next request has uvicorn's shorter keep-alive timeout. One timer a connection keeps watch, so that a
request costs two looks at the clock. A request that is sent ahead begins when there is room for its answer:
it must not take a place in flight only to wait for its reader. uvicorn keeps a head until it is complete,
before any middleware could look at it, so its size is limited here. Bytes that cannot be parsed, or are too
many, never become a request, so they reach no middleware: no event is recorded (they are counted instead) and
no origin is known that CORS headers could name. An offer to go on in another protocol is ignored (RFC 9110,
7.8): Java's own client makes one with its first request. Handed to uvicorn by `serve`; its deadline and the
`Drain` come out of the lifespan's state.
"""

import asyncio
import time
from typing import Any, Literal

import httptools
import structlog
from uuid_utils import uuid7
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.ai.events import UNMATCHED_ROUTE, RequestRecord
from app.drain import Drain
from app.error_handlers import Problems
from app.errors import MalformedRequestError
from app.metrics import CLIENT_TIMEOUTS, observe_request

MAX_OVERHEAD_BYTES = 65_536
"""The most of a request that may be anything but its body: head, framing of chunks, trailers, together.

More than the proxies in front of a service pass on (nginx 32 KiB, Envoy 60 KiB), unless they are told to.
"""

MAX_FIELDS = 128
"""The most header fields of a request; Apache and Envoy let 100 through, and add a few of their own."""

_PIECE_BYTES = 16_384
"""The most that is parsed before its size is looked at again; a usual request is smaller."""

_CHUNK_BYTES = 16
"""What each piece of a body pays for besides itself: a chunk's size and line ends."""

LAST_LOOK_SECONDS = 0.1
"""How long after its time a client is looked at for the last time, before its connection is closed.

After a pause (of the machine, or of the process) timers ring before anything is read that came meanwhile.
"""

_NO_REQUEST = (
    "What was sent is not an HTTP request, is transferred in another coding than chunked, or its head is too "
    f"large: at most {MAX_OVERHEAD_BYTES // 1024} KiB and {MAX_FIELDS} fields."
)

_log = structlog.get_logger()


class _RoomForOneAnswer(FlowControl):
    """Answers are in memory whole, so one that waits for its reader half sent would only hold its place."""

    async def drain(self) -> None:
        """Waits for nothing; `ProblemProtocol` begins no request while there is no room."""


class ProblemProtocol(HttpToolsProtocol):
    """One connection. Cuts off whoever is too slow; answers 400 to what is no request, or has no end."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._deadline: float = app_state["client_deadline_seconds"]
        self._drain: Drain = app_state["drain"]
        self._since = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None
        self._overhead = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop; the first request is due from now on."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.flow = _RoomForOneAnswer(self.transport)
        self._since = self.loop.time()
        self._watch = self.loop.call_later(self._deadline, self._look_at_client)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        if self._watch is not None:
            self._watch.cancel()
        self._give_up()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the loop, which may have read far more than a head is allowed to be."""
        # The parser does not tell where in the data a request begins, so one that begins in the middle of a
        # piece may have the rest of that piece for nothing.
        start = 0
        while start < len(data):
            room = min(_PIECE_BYTES, MAX_OVERHEAD_BYTES - self._overhead)
            if room == 0:
                self.send_400_response("")
                return
            piece = data[start : start + room]
            start += room
            self._overhead += len(piece)
            self._parse(piece)
            if self.transport.is_closing():
                return

    def _parse(self, piece: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            while piece:
                try:
                    self.parser.feed_data(piece)
                    piece = b""
                except httptools.HttpParserUpgrade as offer:
                    piece = piece[offer.args[0] :]
                    self._read_head_without_offer()
        except httptools.HttpParserCallbackError as exc:
            if isinstance(exc.__context__, MalformedRequestError):
                self.send_400_response("")
                return
            # Ours, for want of memory as a rule: who hears that a request is wrong does not send it again.
            _log.error("request_not_read", error=type(exc.__context__).__name__)
            self._give_up()
            self.transport.abort()
        except httptools.HttpParserError:
            self.send_400_response("")

    def _read_head_without_offer(self) -> None:
        # At the end of a head with an offer the parser stops, and takes what follows for another protocol.
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        fields = [b"%s: %s\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        since = self._since
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.parser.feed_data(b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(fields)))
        self._since = since

    def on_message_begin(self) -> None:
        """Called by the parser with the first byte of a request: the rest is due."""
        self._since = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called by the parser; while draining, every answer ends its connection.

        Raises:
            MalformedRequestError: too many fields, CONNECT, as to a proxy, or a transfer coding that nobody
                here undoes; the parser gives up.
        """
        if len(self.headers) > MAX_FIELDS or self.parser.get_method() == b"CONNECT":
            raise MalformedRequestError
        if any(
            name == b"transfer-encoding" and coding.lower() != b"chunked" for name, coding in self.headers
        ):
            raise MalformedRequestError
        if self.parser.should_upgrade():
            return  # read once more, see `_parse`
        super().on_headers_complete()
        # The scope keeps its list, which is complete. What comes now are trailers, which must not be taken
        # for headers (RFC 9110, 6.5.1): one could be a credential that no proxy has seen. Nobody reads any.
        self.headers = []
        if self._drain.active and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Called by the parser with a piece of the body, which is limited elsewhere."""
        # Never below nothing: a body must not be what a flood of trailers is paid with.
        self._overhead = max(self._overhead - len(body) - _CHUNK_BYTES, 0)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser with the last byte of a request; whatever follows belongs to the next."""
        if self.parser.should_upgrade():
            return
        self._overhead = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Called when the whole answer is handed over: the client is to take what is left of it."""
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Called by the transport when the client does not keep up."""
        self._since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Called by the transport when the client has caught up: a request that was kept begins."""
        super().resume_writing()
        answering = self._answering
        is_free = answering is None or answering.response_complete
        if self.pipeline and is_free and not self.transport.is_closing():
            # While it was kept, its body may not have been read: the rest of it is due from now on.
            self._since = self.loop.time()
            self._start_asgi_task(*self.pipeline.pop())

    def shutdown(self) -> None:
        """Called by the server that ends; an idle connection has until the end of the drain to be used."""
        self.loop.call_later(self._drain.remaining_seconds(), super().shutdown)

    def timeout_keep_alive_handler(self) -> None:
        """Called when no request has come for some time; one that is there by now is read first."""
        handler = super().timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(LAST_LOOK_SECONDS, handler)

    def _look_at_client(self, was_overdue: float | None = None) -> None:
        # Whatever begins to be waited for after this look is due a whole deadline from now at the earliest.
        waiting_for, delay, overdue = self._waits_for(), self._deadline, None
        if waiting_for is not None:
            delay = self._since + self._deadline - self.loop.time()
            if delay <= 0 and was_overdue == self._since:
                CLIENT_TIMEOUTS.labels(waiting_for).inc()
                self._give_up()
                self.transport.abort()
                return
            if delay <= 0:
                delay, overdue = LAST_LOOK_SECONDS, self._since
        self._watch = self.loop.call_later(delay, self._look_at_client, overdue)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if self.flow.write_paused:
            self.pipeline.append((cycle, app))  # the end that is taken from: it is still the next one
            return
        self._answering = cycle

        async def answer_or_leave(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:
                # The service ends without an answer. uvicorn would make one up, which nobody has recorded.
                cycle.disconnected = True
                self.transport.close()
                raise

        super()._start_asgi_task(cycle, answer_or_leave)

    def _give_up(self) -> None:
        # uvicorn tells the last request of a pipeline that the client is gone, not the one being answered.
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _has_begun_to_answer(self) -> bool:
        cycle = self._answering
        if cycle is None or not cycle.response_started:
            return False
        # A scope is made with the first byte of a request: while it is the same one, no other has begun.
        return not cycle.response_complete or cycle.scope is self.scope

    def _waits_for(self) -> Literal["request", "reader"] | None:
        if self.transport.get_write_buffer_size():
            return "reader"
        if self.pipeline:
            return None
        cycle = self.cycle
        if cycle is None or (cycle.response_complete and self.timeout_keep_alive_task is None):
            return "request"
        return "request" if cycle.more_body and not cycle.response_complete else None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words, which are plain text
        """Called when the parser gives up, or a request is too large to be parsed further."""
        self._give_up()
        if self._has_begun_to_answer():
            self.transport.abort()  # a second answer would be taken for a part of the first, or for the next
            return
        record = RequestRecord(request_id=str(uuid7()), started=0.0, as_of=time.time())
        error = MalformedRequestError(_NO_REQUEST)
        answer = Problems({})({"path": "/", "state": {"record": record}}, error)
        headers = [
            *answer.raw_headers,
            (b"x-request-id", record.request_id.encode()),
            (b"connection", b"close"),
        ]
        observe_request(UNMATCHED_ROUTE, answer.status_code, error.code, 0.0)
        head = b"".join(b"%s: %s\r\n" % pair for pair in headers)
        self.transport.write(STATUS_LINE[answer.status_code] + head + b"\r\n" + bytes(answer.body))
        self.transport.close()
