"""Why a database lets nobody in, as one word for the log: never what the server or the driver say of it.

While a connection is being opened the driver tells no SQLSTATE, and a text that may name a user is no word.
So whoever was refused knocks once more, and looks for the SQLSTATE in libpq's trace of it, which nobody else
sees. Called by `app.serve` and `change_listener`, neither of them during a request.
"""

import errno
import os
import re
import select
import time

import psycopg
from psycopg.pq import PGconn, PollingStatus

from app.db.conninfo import complete_address

KNOCK_SECONDS = 2.0

_find_sqlstates = re.compile(rb'\tErrorResponse\t.*? C "([0-9A-Z]{5})"').findall


def name_failure(failure: BaseException, url: str) -> str:
    """Returns the SQLSTATE, or a word.

    `refused`: nobody listens; `timeout`: no answer; `unreachable`: anything else on the way, such as a name
    that leads nowhere or a certificate; `session_lost`: it lets in now, so only the session has ended.
    """
    cause = failure if isinstance(failure, psycopg.Error) else failure.__cause__
    sqlstate: str | None = getattr(cause, "sqlstate", None)
    if sqlstate or isinstance(cause, psycopg.errors.ConnectionTimeout):
        return sqlstate or "timeout"
    try:
        return _knock(complete_address(url).encode())
    except Exception:  # noqa: BLE001 - whoever asks for a word must not fail for want of it
        return "unreachable"


def _knock(address: bytes) -> str:
    ends = time.monotonic() + KNOCK_SECONDS
    connection = PGconn.connect_start(address)
    trace = os.memfd_create("trace") if hasattr(os, "memfd_create") else None
    try:
        if trace is not None:
            connection.trace(trace)
        status = connection.connect_poll()
        while status in (PollingStatus.READING, PollingStatus.WRITING):
            ready = select.poll()
            ready.register(
                connection.socket, select.POLLIN if status == PollingStatus.READING else select.POLLOUT
            )
            if not ready.poll(max(0.0, ends - time.monotonic()) * 1000):
                return "timeout"
            status = connection.connect_poll()
        if status == PollingStatus.OK:
            return "session_lost"
        if trace is not None:
            connection.untrace()
            sqlstates: list[bytes] = _find_sqlstates(os.pread(trace, 1 << 16, 0))
            if sqlstates:
                return sqlstates[-1].decode()
        refused = os.strerror(errno.ECONNREFUSED) in connection.get_error_message()
        return "refused" if refused else "unreachable"
    finally:
        connection.finish()
        if trace is not None:
            os.close(trace)
