"""Connections to PostgreSQL, and one hard deadline round every call.

The driver's own way to give up is to ask the server to cancel, and a frozen server does not answer. So a call that is
late is abandoned instead: its socket is shut down, which ends the driver's wait at once, and its connection is thrown
away. Nothing here knows SQL that reads or writes anything. Built by `app.wiring`, used by `leads` and `ai_events`.
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
        """`deadline_seconds` bounds a whole call: waiting for a connection, connecting and all its statements."""
        self._url = url
        self._deadline = deadline_seconds
        self._slots = asyncio.Semaphore(pool_size)
        self._knock = asyncio.Lock()
        self._reachable = True
        self._idle: list[Connection] = []
        self._loans: dict[asyncio.Task[Any], Connection | None] = {}
        self._closed = False

    async def run(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        """Returns `await call(connection)`, with a connection in autocommit mode that is the call's alone.

        `call` awaits nothing but the connection. A statement whose answer came late may still have been executed.

        Raises:
            DatabaseUnavailableError: no connection or no answer within the deadline, or the server refused.
            psycopg.Error: the statement is at fault.
        """
        loan: asyncio.Task[T] = asyncio.create_task(self._lend(call))
        self._loans[loan] = None
        loan.add_done_callback(self._settle)
        try:
            done, _ = await asyncio.wait({loan}, timeout=self._deadline)
        except asyncio.CancelledError:
            self._abandon(loan)
            raise
        if not done:
            self._abandon(loan)
            raise DatabaseUnavailableError
        if loan.cancelled():
            raise DatabaseUnavailableError
        try:
            return loan.result()
        except (psycopg.OperationalError, psycopg.InterfaceError, OSError) as exc:
            raise DatabaseUnavailableError from exc

    async def close(self) -> None:
        """Ends every connection; calls still under way fail with `DatabaseUnavailableError`."""
        self._closed = True
        for loan in list(self._loans):
            self._abandon(loan)
        for connection in self._idle:
            connection.pgconn.finish()
        self._idle.clear()
        if self._loans:
            await asyncio.wait(self._loans, timeout=self._deadline)

    async def _lend(self, call: Callable[[Connection], Awaitable[T]]) -> T:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: `run` made the task
        async with self._slots:
            connection = self._take_idle() or await self._connect(task)
            self._loans[task] = connection
            try:
                return await call(connection)
            finally:
                self._take_back(connection)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            # A server has nothing to tell an idle client except that it is going away.
            if not _has_input(connection.pgconn.socket):
                return connection
            connection.pgconn.finish()
        return None

    async def _connect(self, loan: "asyncio.Task[Any]") -> Connection:
        if self._closed:
            raise psycopg.OperationalError("closed")
        if self._reachable:
            return await self._open(loan)
        # A frozen server gets one caller at its door, not a queue that it must work off before it can serve again.
        async with self._knock:
            return self._take_idle() or await self._open(loan)

    async def _open(self, loan: "asyncio.Task[Any]") -> Connection:
        try:
            connection = await Connection.connect(self._url, autocommit=True, application_name="lead-scoring")
        except BaseException:
            self._reachable = False
            raise
        self._loans[loan] = connection
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

    def _abandon(self, loan: "asyncio.Task[Any]") -> None:
        connection = self._loans.get(loan)
        if connection is None:
            loan.cancel()
        else:
            _shut_down(connection)

    def _settle(self, loan: "asyncio.Task[Any]") -> None:
        del self._loans[loan]
        if not loan.cancelled():
            loan.exception()  # somebody has to look at it, or asyncio logs it with what the driver says in it


def _has_input(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _shut_down(connection: Connection) -> None:
    with (
        contextlib.suppress(psycopg.Error, OSError),
        socket.socket(fileno=os.dup(connection.pgconn.socket)) as handle,
    ):
        handle.shutdown(socket.SHUT_RDWR)
