"""Structured logs: one JSON object a line on standard error, with the request ID and nobody's data in it.

A driver's exception quotes the row it choked on, so of a foreign exception the type, its SQLSTATE and the
places in the code are logged, never its text; the errors of our own tree are written by us and are logged in
full. Of a library's log call only the template is kept, not what was to be filled in. A line that cannot be
written is lost, and nothing else: whoever logs goes on. Called once by each process that serves.
"""

import logging
import sys
import threading
import traceback
from contextlib import suppress
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


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Sends every log line of the process, ours and the libraries', to `stream` (standard error) as JSON.

    May be called again: the last call counts.
    """
    output = cast("TextIO", _Unfailing(stream or sys.stderr))
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


class _Unfailing:
    """A stream that a full disk, a reader who has gone or a closed file takes lines from, and no more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


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
    structlog.get_logger("app").critical("uncaught_exception", exc_info=error)
