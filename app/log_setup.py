"""Structured logs: one JSON object a line on standard error, with the request ID and nobody's data in it.

A driver's exception quotes the row it choked on, so of a foreign exception the type, its SQLSTATE and the
places in the code are logged, never its text; the errors of our own tree are written by us and are logged in
full. Of a library's log call only the template is kept, not what was to be filled in. A line that cannot be
written is lost, and nothing else: whoever logs goes on, and waits for nobody. Called by each process
that serves.
"""

import atexit
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TextIO, cast

import msgspec
import structlog
from stamina.instrumentation import LoggingOnRetryHook, PrometheusOnRetryHook, set_on_retry_hooks
from structlog.typing import EventDict, Processor, WrappedLogger

from app.errors import LeadScoringError

_TRUSTED_LOGGERS = ("app", "uvicorn", "alembic")
"""Loggers whose messages hold nothing but configuration; of any other only the template is kept."""

_MOST_FRAMES = 12
_MOST_CAUSES = 5

MOST_WAITING = 4 << 20
"""How many characters of lines may wait to be written; at the highest rate there is, those of seconds."""

_LAST_SECONDS = 1.0


def configure_logging(level: str, on_drop: Callable[[], None] = lambda: None) -> None:
    """Sends every log line of the process, ours and the libraries', to standard error as JSON.

    `on_drop` is called for each line that is dropped, since too many wait already. May be called again: the
    last call counts.
    """
    _lines.begin(sys.stderr, on_drop)
    output = cast("TextIO", _lines)
    structlog.configure(
        processors=[*_shared_processors(), _render_exception, _render_line],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(output),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(_LibraryFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    # It fills in its templates itself, with every header that the token issuer sends.
    logging.getLogger("httpcore2").setLevel(logging.WARNING)
    # As given, retries are logged with the text of what failed.
    set_on_retry_hooks((PrometheusOnRetryHook, LoggingOnRetryHook))
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda arguments: _log_uncaught(
        arguments.exc_type, arguments.exc_value, arguments.exc_traceback
    )


def describe_exception(error: BaseException) -> list[dict[str, Any]]:
    """Returns the error and its causes, outermost first: type, SQLSTATE, our own text, places in the code."""
    described: list[dict[str, Any]] = []
    current: BaseException | None = error
    while current is not None and len(described) < _MOST_CAUSES:
        described.append(_describe_one(current))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return described


def _describe_one(error: BaseException) -> dict[str, Any]:
    kind = type(error)
    described: dict[str, Any] = {"type": f"{kind.__module__}.{kind.__qualname__}"}
    sqlstate = getattr(error, "sqlstate", None)
    if isinstance(sqlstate, str):
        described["sqlstate"] = sqlstate
    if isinstance(error, LeadScoringError):
        described["detail"] = str(error)
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_FRAMES:]
    described["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    return described


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
    ]


def _render_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    given = event.pop("exc_info", None)
    error = given if isinstance(given, BaseException) else sys.exc_info()[1] if given else None
    if error is not None:
        event["exception"] = describe_exception(error)
    return event


def _render_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    return msgspec.json.encode(event, enc_hook=_name_type).decode()


def _name_type(value: object) -> str:
    return type(value).__name__


class _Lines:
    """Takes lines for a stream, and has a thread write them: whoever reads the stream may stall.

    He would hold up the event loop, and with it all that is served, as soon as the pipe to him is full. What
    does not fit beside the lines that wait for him is dropped and counted. What a full disk, a reader who has
    gone or a closed file does not take is lost.
    """

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._on_drop: Callable[[], None] = lambda: None
        self._in_memory = False
        self._queue: SimpleQueue[str] = SimpleQueue()
        self._changed = threading.Condition(threading.RLock())  # a finaliser may log in the midst of a call
        self._waiting = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None
        self._ends_at: float | None = None

    def begin(self, stream: TextIO, on_drop: Callable[[], None]) -> None:
        """Has all lines go to this stream from now on."""
        self._stream, self._on_drop, self._ends_at = stream, on_drop, None
        try:
            self._in_memory = stream.fileno() < 0
        except (OSError, ValueError):
            self._in_memory = True

    def write(self, text: str) -> None:
        """Leaves a line for the thread, which is started with the first one, after workers have forked."""
        if self._in_memory:  # as in tests, where nobody can stall
            with suppress(ValueError):
                self._stream.write(text)
            return
        with self._changed:
            fits = self._waiting + len(text) <= MOST_WAITING
            if fits:
                self._waiting += len(text)
                self._queue.put(text)
                if self._thread is None:
                    self._start()
            else:
                self._dropped += 1
        if not fits:
            self._on_drop()
        if self._ends_at is not None:
            self._wait(self._ends_at)

    def flush(self) -> None:
        """Does nothing: loggers call it after each line, and would wait."""

    def write_out(self) -> None:
        """Waits for the lines there are, and has whoever logs from now on wait for his, a second in all."""
        self._ends_at = time.monotonic() + _LAST_SECONDS
        self._wait(self._ends_at)

    def _wait(self, until: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, max(0.0, until - time.monotonic()))

    def _start(self) -> None:
        thread = threading.Thread(target=self._write_on, name="log", daemon=True)
        with suppress(RuntimeError):  # no thread is to be had; with the next line there may be
            thread.start()
            self._thread = thread

    def _write_on(self) -> None:
        while True:
            text = self._queue.get()
            with suppress(OSError, ValueError, MemoryError):
                data = text.encode()
                while data:
                    # Not by the stream: its lock, held by a thread that stalls, would end the process badly.
                    data = data[os.write(self._stream.fileno(), data) :]
            with self._changed:
                self._waiting -= len(text)
                dropped = 0 if self._waiting else self._dropped
                self._dropped -= dropped
                self._changed.notify_all()
            if dropped:
                structlog.get_logger().warning("log_lines_dropped", lines=dropped)


_lines = _Lines()
write_out = _lines.write_out
atexit.register(write_out)


class _LibraryFormatter(logging.Formatter):
    """Renders a record of the standard library's logging as one JSON line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; of a foreign library's message only the first line of its template."""
        trusted = record.name.split(".")[0] in _TRUSTED_LOGGERS
        message = record.getMessage() if trusted else str(record.msg).partition("\n")[0]
        event: EventDict = {"event": message, "logger": record.name}
        if record.exc_info and record.exc_info[1] is not None:
            event["exception"] = describe_exception(record.exc_info[1])
        for processor in _shared_processors():
            event = processor(None, record.levelname.lower(), event)  # type: ignore[assignment]
        return _render_line(None, record.levelname, event)


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, place: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit) or error is None:
        sys.__excepthook__(kind, error or kind(), place)
        return
    structlog.get_logger().critical("uncaught_exception", exc_info=error)
