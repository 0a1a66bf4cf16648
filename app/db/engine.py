"""Connections to PostgreSQL, and one hard deadline round every call.

The driver's own way to give up is to ask the server to cancel, and a frozen server does not answer. So a call
that is late is abandoned instead: its socket is shut down, which ends the driver's wait at once, and its
connection is thrown away. Nothing here knows SQL that reads or writes anything. Built by `app.wiring`, used
by `leads` and `ai_events`.
"""

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from app.errors import DatabaseUnavailableError

Connection = psycopg.AsyncConnection[Any]
T = TypeVar("T")

_PREPARE_SESSION = """
    SELECT set_config('statement_timeout', %(milliseconds)s, false),
           set_config('jit', 'off', false),       -- compiling costs more than any statement of ours takes
           set_config('TimeZone', 'UTC', false)
"""


class Database:
    """Up to `pool_size` connections, opened when needed, so that a server that is back is used at once.

    One object is one room: readers and the telemetry shipper have their own, and cannot starve each other. It
    belongs to the event loop that uses it first.
    """

    def __init__(self, url: str, *, pool_size: int, deadline_seconds: float) -> None:
        """`deadline_seconds` bounds a whole call: waiting for a connection, connecting, its statements."""
        self._url = url
        self._deadline = deadline_seconds
        self._slots = asyncio.Semaphore(pool_size)
        self._knock = asyncio.Lock()
        self._reachable = True
        self._idle: list[Connection] = []
        self._loans: dict[asyncio.Task[Any], _Loan] = {}
        self._closed = False

    async def run(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        """Returns `await call(connection)`, with a connection in autocommit mode that is the call's alone.

        `call` awaits nothing but the connection. A statement whose answer came late may still have been
        executed.

        Raises:
            DatabaseUnavailableError: no connection or no answer within the deadline, or the server refused.
            psycopg.Error: the statement is at fault.
        """
        loan = _Loan()
        task = asyncio.create_task(self._lend(call, loan))
        self._loans[task] = loan
        task.add_done_callback(self._settle)
        try:
            await asyncio.wait({task}, timeout=self._deadline)
            if not task.done() or task.cancelled():
                loan.abandon(task)
                raise DatabaseUnavailableError
            return task.result()
        except asyncio.CancelledError:
            loan.abandon(task)
            raise
        except (psycopg.OperationalError, psycopg.InterfaceError, OSError) as exc:
            raise DatabaseUnavailableError from exc
        finally:
            # The task knows its exception, which knows this frame: a cycle that would keep a socket open
            # until the garbage collector comes by.
            del task

    async def close(self) -> None:
        """Ends every connection; calls still under way fail with `DatabaseUnavailableError`."""
        self._closed = True
        for task, loan in self._loans.items():
            loan.abandon(task)
        for connection in self._idle:
            connection.pgconn.finish()
        self._idle.clear()
        if self._loans:
            await asyncio.wait(self._loans, timeout=self._deadline)

    async def _lend(self, call: Callable[[Connection], Awaitable[T]], loan: "_Loan") -> T:
        async with self._slots:
            loan.connection = self._take_idle() or await self._connect(loan)
            try:
                return await call(loan.connection)
            finally:
                self._take_back(loan.connection)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            # A server has nothing to tell an idle client except that it is going away.
            if not _has_input(connection.pgconn.socket):
                return connection
            connection.pgconn.finish()
        return None

    async def _connect(self, loan: "_Loan") -> Connection:
        if self._closed:
            raise psycopg.OperationalError("closed")
        if self._reachable:
            return await self._open(loan)
        # A frozen server gets one caller at its door, not a queue to work off before it can serve again.
        async with self._knock:
            return self._take_idle() or await self._open(loan)

    async def _open(self, loan: "_Loan") -> Connection:
        try:
            connection = await Connection.connect(self._url, autocommit=True, application_name="lead-scoring")
        except BaseException:
            self._reachable = False
            raise
        loan.connection = connection
        try:
            milliseconds = str(max(1, round(self._deadline * 1000)))
            await connection.execute(_PREPARE_SESSION, {"milliseconds": milliseconds})
        except BaseException:
            self._reachable = False
            connection.pgconn.finish()
            raise
        self._reachable = True
        return connection

    def _take_back(self, connection: Connection) -> None:
        status = connection.pgconn.transaction_status
        if self._closed or status != TransactionStatus.IDLE:
            connection.pgconn.finish()
        else:
            self._idle.append(connection)

    def _settle(self, task: "asyncio.Task[Any]") -> None:
        del self._loans[task]
        if not task.cancelled():
            task.exception()  # somebody has to look at it, or asyncio logs it with what the driver says in it


class _Loan:
    """What one call holds: nothing while it waits or connects, then a connection."""

    def __init__(self) -> None:
        self.connection: Connection | None = None

    def abandon(self, task: "asyncio.Task[Any]") -> None:
        """Makes the call end within a turn of the event loop, without asking the server."""
        if task.done():
            return  # its connection may be somebody else's by now
        if self.connection is None:
            task.cancel()
            return
        with (
            contextlib.suppress(psycopg.Error, OSError),
            socket.socket(fileno=os.dup(self.connection.pgconn.socket)) as handle,
        ):
            handle.shutdown(socket.SHUT_RDWR)


def _has_input(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
