"""One connection and the statements prepared on it: a hot read costs its round trip and little else.

The driver's cursor takes as long as the server does to read one lead: it builds a dozen objects and joins and
leaves the event loop at every call. Here the connection stays on the event loop, and a call is: send the
parameters, wait once, take the values. It knows no SQL.
"""

import asyncio
import select
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg.abc import Buffer
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

Connection = psycopg.AsyncConnection[Any]
UseRow = Callable[[PGresult], None]
"""Is handed a result of one row."""

_BINARY = 1


class Session:
    """A connection that is lent to one call at a time; `idle_since` is for the lender to note."""

    def __init__(self, connection: Connection) -> None:
        self.idle_since = 0.0
        self._connection = connection
        self._pgconn = connection.pgconn
        self._descriptor = connection.pgconn.socket
        self._names: dict[str, bytes] = {}
        self._loop = asyncio.get_running_loop()
        self._listening = False
        self._arrival: asyncio.Future[None] | None = None
        self._input = select.poll()
        self._input.register(self._descriptor, select.POLLIN)

    async def query(
        self,
        statement: str,
        parameters: Sequence[Buffer],
        deadline_seconds: float,
        use_row: UseRow | None = None,
    ) -> PGresult:
        """Returns the rows of a statement with parameters `$1`, `$2`, ..., all values binary.

        With `use_row` each row is handed over as it comes, while the server works at the next, and none is
        returned. Prepared the first time. Whoever is late, or cancelled meanwhile, or whose `use_row` fails,
        leaves a session that is not idle.

        Raises:
            TimeoutError: there is no answer within the deadline.
            psycopg.Error: the connection is lost, or the statement is at fault.
        """
        ends = self._loop.time() + deadline_seconds
        name = self._names.get(statement)
        if name is None:
            name = b"q%d" % len(self._names)
            self._pgconn.send_prepare(name, statement.encode())
            await self._result(ends)
            self._names[statement] = name
        self._pgconn.send_query_prepared(
            name, parameters, param_formats=[_BINARY] * len(parameters), result_format=_BINARY
        )
        if use_row is not None:
            self._pgconn.set_single_row_mode()
        return await self._result(ends, use_row)

    def driver(self) -> Connection:
        """Returns the connection for the driver's own use, which joins the event loop by itself."""
        self._stop_listening()
        return self._connection

    def is_idle(self) -> bool:
        """Tells whether the last call has ended, and left no transaction open."""
        return self._pgconn.transaction_status == TransactionStatus.IDLE

    def is_lost(self) -> bool:
        """Tells whether the connection broke, whatever was asked over it."""
        return self._pgconn.status == ConnStatus.BAD

    def is_forsaken(self) -> bool:
        """Tells whether the server has gone away while nothing was asked of it."""
        # A server has nothing to tell an idle client except that.
        return bool(self._input.poll(0))

    def close(self) -> None:
        """Ends the connection at once; a call under way fails."""
        self._stop_listening()
        self._pgconn.finish()
        self._arrive(psycopg.OperationalError("the connection was closed"))

    def descriptor(self) -> int:
        """Returns the number of the socket."""
        return self._descriptor

    async def _result(self, ends: float, use_row: UseRow | None = None) -> PGresult:
        if self._pgconn.flush():
            self._loop.add_writer(self._descriptor, self._flush)
        last: PGresult | None = None
        while True:
            while self._pgconn.is_busy():
                self._listen()
                self._arrival = self._loop.create_future()
                # All there is to wait for is one future, so one timer does what `asyncio.timeout` does.
                timer = self._loop.call_at(ends, self._arrive, TimeoutError())
                try:
                    await self._arrival
                finally:
                    timer.cancel()
            result = self._pgconn.get_result()
            if result is None:
                break
            if use_row is not None and result.status == ExecStatus.SINGLE_TUPLE:
                use_row(result)
            else:
                last = result
        if last is None or last.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
            raise psycopg.OperationalError("no answer") if last is None else error_from_result(last)
        return last

    def _listen(self) -> None:
        if not self._listening:
            self._loop.add_reader(self._descriptor, self._read)
            self._listening = True

    def _stop_listening(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._descriptor)
            self._loop.remove_writer(self._descriptor)
            self._listening = False

    def _read(self) -> None:
        if self._arrival is None:
            self._stop_listening()  # nobody waits; `is_forsaken` sees it too
            return
        try:
            self._pgconn.consume_input()
        except psycopg.Error as exc:
            self._stop_listening()  # the socket is closed, and its number may be another's in a moment
            self._arrive(exc)
            return
        if not self._pgconn.is_busy():
            self._arrive(None)

    def _flush(self) -> None:
        try:
            if self._pgconn.flush():
                return
        except psycopg.Error as exc:
            self._arrive(exc)
        self._loop.remove_writer(self._descriptor)

    def _arrive(self, error: Exception | None) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is None or arrival.done():
            return
        if error is None:
            arrival.set_result(None)
        else:
            arrival.set_exception(error)


def row_values(result: PGresult, row: int) -> list[bytes | None]:
    """Returns the values of a row."""
    return [result.get_value(row, field) for field in range(result.nfields)]
