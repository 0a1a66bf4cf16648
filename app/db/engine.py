"""Connections to PostgreSQL, and one hard deadline round every call.

The driver's own way to give up is to ask the server to cancel, and a frozen server does not answer. So a call
that is late is abandoned instead: its socket is shut down, which ends the driver's wait at once, and its
connection is thrown away. A query whose connection breaks is asked once more, within the same deadline. No
SQL that reads or writes anything is known here. Built by `app.wiring`, used by `leads`, `ai_events` and
`api_keys`.
"""

import asyncio
import contextlib
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import psycopg
import stamina
from psycopg.abc import Buffer
from psycopg.pq.abc import PGresult

from app.db.conninfo import complete_address
from app.db.session import Connection, Session, UseRow
from app.errors import DatabaseUnavailableError

__all__ = ["Connection", "Database"]

T = TypeVar("T")

_PREPARE_SESSION = """
    SELECT set_config('statement_timeout', %(milliseconds)s, false),
           set_config('jit', 'off', false),       -- compiling costs more than any statement of ours takes
           set_config('TimeZone', 'UTC', false),
           -- A plan for these very IDs takes longer to make than the one for any IDs to carry out.
           set_config('plan_cache_mode', 'force_generic_plan', false),
           -- Roles and databases may say off, for speed; an event leaves the telemetry log at its commit.
           set_config('synchronous_commit',
                      coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false)
"""


IDLE_SECONDS = 60.0
"""A connection that was idle for longer is not used again: networks forget quiet ones, and tell nobody."""

_LONGEST_PAUSE_SECONDS = 0.05
"""Connections that broke together are not opened again all at one instant."""


class _ConnectionLostError(DatabaseUnavailableError):
    """An open connection broke under a call; the server may well be there."""

    default_detail = "The connection to the lead database broke; try again shortly."


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise DatabaseUnavailableError from exc


class Database:
    """Up to `pool_size` connections, opened when needed, so that a server that is back is used at once.

    One object is one room: readers and the telemetry shipper have their own, and cannot starve each other. It
    belongs to the event loop that uses it first.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int,
        deadline_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deadline_seconds` bounds a whole call: waiting for a connection, connecting, its statements.

        `monotonic` gives seconds.
        """
        self._url = url
        self._deadline = deadline_seconds
        self._monotonic = monotonic
        self._slots = asyncio.Semaphore(pool_size)
        self._knock = asyncio.Lock()
        self._reachable = True
        self._idle: list[Session] = []  # the last one used is the last
        self._asked: set[Session] = set()
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
        return await self._run(lambda session: call(session.driver()))

    async def query(
        self, statement: str, parameters: Sequence[Buffer], use_row: UseRow | None = None
    ) -> PGresult:
        """Returns the rows of a prepared statement with parameters `$1`, `$2`, ..., all values binary.

        The statement may be repeated: when its connection breaks it is asked once more, over a new one. With
        `use_row` each row is handed over as it comes, from the first one again if it is asked once more.

        Raises:
            DatabaseUnavailableError: no connection or no answer within the deadline, or the server refused.
            psycopg.Error: the statement is at fault.
        """
        ends = self._monotonic() + self._deadline
        try:
            return await self._query(statement, parameters, use_row)
        except _ConnectionLostError:
            self._close_idle()  # they have probably gone the same way
        async with _within(ends - self._monotonic()):
            # What happened is the first attempt: if this were wrapped round it, every good read would pay.
            async for attempt in stamina.retry_context(
                _ConnectionLostError, attempts=2, wait_initial=0.0, wait_jitter=_LONGEST_PAUSE_SECONDS
            ):
                with attempt:
                    if attempt.num == 1:
                        raise _ConnectionLostError
                    return await self._query(statement, parameters, use_row)
        raise DatabaseUnavailableError

    def one_deadline(self) -> AbstractAsyncContextManager[None]:
        """Has all calls that are made inside share the deadline that one call has.

        Raises:
            DatabaseUnavailableError: it is over; from leaving the context.
        """
        return _within(self._deadline)

    async def _query(self, statement: str, parameters: Sequence[Buffer], use_row: UseRow | None) -> PGresult:
        session = None if self._slots.locked() else self._take_idle()
        if session is None:
            return await self._run(
                lambda opened: opened.query(statement, parameters, self._deadline, use_row)
            )
        # Nothing to wait for but the answer, which can be given up where we stand: no task is needed.
        self._asked.add(session)
        try:
            async with self._slots:
                return await session.query(statement, parameters, self._deadline, use_row)
        except TimeoutError as exc:
            # Those that have not been heard of since this one have probably gone the same way.
            self._close_idle(session.idle_since)
            raise DatabaseUnavailableError from exc
        except (psycopg.OperationalError, psycopg.InterfaceError) as exc:
            raise (_ConnectionLostError if session.is_lost() else DatabaseUnavailableError) from exc
        except psycopg.errors.ReadOnlySqlTransaction:
            session.close()  # it may be read-only for good where the next one is not, after a failover
            raise
        finally:
            self._asked.remove(session)
            self._take_back(session)

    async def _run(self, call: Callable[[Session], Awaitable[T]]) -> T:
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
        self._close_idle()
        for session in self._asked:
            session.close()
        if self._loans:
            await asyncio.wait(self._loans, timeout=self._deadline)

    async def _lend(self, call: Callable[[Session], Awaitable[T]], loan: "_Loan") -> T:
        async with self._slots:
            session = self._take_idle() or await self._connect(loan)
            loan.descriptor = session.descriptor()
            try:
                return await call(session)
            except (psycopg.OperationalError, psycopg.InterfaceError) as exc:
                if session.is_lost():
                    raise _ConnectionLostError from exc
                raise
            except psycopg.errors.ReadOnlySqlTransaction:
                session.close()  # see `_query`
                raise
            finally:
                self._take_back(session)

    def _close_idle(self, since: float = math.inf) -> None:
        while self._idle and self._idle[0].idle_since <= since:
            self._idle.pop(0).close()

    def _take_idle(self) -> Session | None:
        while self._idle:
            session = self._idle.pop()
            if self._monotonic() - session.idle_since < IDLE_SECONDS and not session.is_forsaken():
                return session
            session.close()
        return None

    async def _connect(self, loan: "_Loan") -> Session:
        if self._closed:
            raise psycopg.OperationalError("closed")
        if self._reachable:
            return await self._open(loan)
        # A frozen server gets one caller at its door, not a queue to work off before it can serve again.
        async with self._knock:
            return self._take_idle() or await self._open(loan)

    async def _open(self, loan: "_Loan") -> Session:
        try:
            connection = await Connection.connect(
                complete_address(self._url), autocommit=True, application_name="lead-scoring"
            )
        except BaseException:
            self._reachable = False
            raise
        loan.descriptor = connection.pgconn.socket
        try:
            milliseconds = str(max(1, round(self._deadline * 1000)))
            await connection.execute(_PREPARE_SESSION, {"milliseconds": milliseconds})
        except BaseException:
            self._reachable = False
            connection.pgconn.finish()
            raise
        self._reachable = True
        return Session(connection)

    def _take_back(self, session: Session) -> None:
        if self._closed or not session.is_idle():
            session.close()
        else:
            session.idle_since = self._monotonic()
            self._idle.append(session)

    def _settle(self, task: "asyncio.Task[Any]") -> None:
        del self._loans[task]
        if not task.cancelled():
            task.exception()  # somebody has to look at it, or asyncio logs it with what the driver says in it


class _Loan:
    """What one call holds: nothing while it waits or connects, then a connection."""

    def __init__(self) -> None:
        self.descriptor: int | None = None

    def abandon(self, task: "asyncio.Task[Any]") -> None:
        """Makes the call end within a turn of the event loop, without asking the server."""
        if task.done():
            return  # its connection may be somebody else's by now
        if self.descriptor is None:
            task.cancel()
            return
        with (
            contextlib.suppress(psycopg.Error, OSError),
            socket.socket(fileno=os.dup(self.descriptor)) as handle,
        ):
            handle.shutdown(socket.SHUT_RDWR)
