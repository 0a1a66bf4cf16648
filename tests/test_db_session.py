"""The hot way to ask: one wait, and nothing left behind when it fails, is late or is given up."""

import asyncio
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg.pq.abc import PGresult

from app.db.engine import IDLE_SECONDS, Connection, Database
from app.db.session import Session, row_values
from app.errors import DatabaseUnavailableError
from bench.fault_proxy import FaultProxy
from tests.fakes import FakeClock
from tests.test_db_engine import (  # noqa: F401 - fixtures
    DEADLINE,
    GRACE,
    ask,
    connect,
    connections,
    eventually,
    frozen,
    open_files,
    own_server,
)

Connect = Callable[..., Database]

DOUBLE = "SELECT ($1::int4 * 2) AS doubled"


async def double(database: Database, number: int) -> int:
    result = await database.query(DOUBLE, [struct.pack(">i", number)])
    (value,) = row_values(result, 0)
    assert value is not None
    return int(struct.unpack(">i", value)[0])


async def backend(database: Database) -> int:
    value = (await database.query("SELECT pg_backend_pid()", [])).get_value(0, 0)
    assert value is not None
    return int.from_bytes(value)


async def refused_in(database: Database, statement: str = "SELECT 1") -> float:
    start = time.perf_counter()
    with pytest.raises(DatabaseUnavailableError):
        await database.query(statement, [])
    return time.perf_counter() - start


async def test_a_statement_is_prepared_once_and_asked_again(database_url: str, connect: Connect) -> None:  # noqa: F811
    database = connect(database_url, pool_size=1)
    assert [await double(database, number) for number in (1, 2, 3)] == [2, 4, 6]
    result = await database.query("SELECT count(*)::text FROM pg_prepared_statements", [])
    assert row_values(result, 0) == [b"2"]  # that one and this one


async def test_a_statement_is_planned_once_for_all_parameters(database_url: str, connect: Connect) -> None:  # noqa: F811
    database = connect(database_url, pool_size=1)
    for number in range(7):
        await double(database, number)
    plans = "SELECT format('%s, %s', generic_plans, custom_plans) FROM pg_prepared_statements"
    counted = await database.query(f"{plans} WHERE statement = $1", [DOUBLE.encode()])
    assert row_values(counted, 0) == [b"7, 0"]


async def test_many_at_once_share_the_pool_and_keep_apart(database_url: str, connect: Connect) -> None:  # noqa: F811
    database = connect(database_url, pool_size=3, deadline_seconds=5)
    numbers = range(60)
    assert await asyncio.gather(*(double(database, number) for number in numbers)) == [2 * n for n in numbers]
    # What an earlier test has given up may still be sleeping at the server.
    assert await eventually(lambda: 1 <= connections(database_url) <= 3)


async def test_a_large_question_and_a_large_answer_come_through(database_url: str, connect: Connect) -> None:  # noqa: F811
    text = b"x" * 20_000_000
    result = await connect(database_url, deadline_seconds=20).query("SELECT upper($1::text)", [text])
    assert row_values(result, 0) == [text.upper()]


async def test_the_driver_and_the_session_take_turns_on_one_connection(
    database_url: str,
    connect: Connect,  # noqa: F811
) -> None:
    database = connect(database_url, pool_size=1)
    for number in range(5):
        assert await double(database, number) == 2 * number
        assert await database.run(ask) == 1
    assert connections(database_url) == 1


async def test_a_frozen_server_costs_the_deadline_and_is_used_again(
    own_server: tuple[str, Path],  # noqa: F811
    connect: Connect,  # noqa: F811
) -> None:
    url, data = own_server
    database = connect(url)
    await asyncio.gather(*(double(database, 1) for _ in range(4)))
    before = open_files()
    with frozen(data):
        # The first round waits on open connections, the second on new ones.
        rounds = [await asyncio.gather(*(refused_in(database) for _ in range(8))) for _ in range(2)]
    assert max(map(max, rounds)) < DEADLINE + GRACE
    assert await double(database, 2) == 4
    assert await eventually(lambda: open_files() <= before)


async def test_a_caller_that_is_cancelled_leaves_at_once_and_nothing_behind(
    database_url: str,
    connect: Connect,  # noqa: F811
) -> None:
    database = connect(database_url, pool_size=1, deadline_seconds=30)
    await double(database, 1)
    before = open_files()
    call = asyncio.create_task(database.query("SELECT pg_sleep(20)", []))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    start = time.perf_counter()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert time.perf_counter() - start < GRACE
    assert await double(database, 3) == 6
    assert open_files() <= before


async def test_a_connection_the_server_closed_is_not_used(database_url: str, connect: Connect) -> None:  # noqa: F811
    database = connect(database_url)
    await asyncio.gather(*(double(database, 1) for _ in range(4)))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lead-scoring'"
        )
    assert await eventually(lambda: connections(database_url) == 0)
    assert await asyncio.gather(*(double(database, n) for n in range(6))) == [0, 2, 4, 6, 8, 10]


# Long enough that the server does not keep a row back until there is more to send.
ROWS = "SELECT n, repeat('x', 20000), {} FROM generate_series(1, 3) AS n"


async def test_a_row_is_handed_over_while_the_server_works_at_the_next(
    database_url: str,
    connect: Connect,  # noqa: F811
) -> None:
    database, numbers = connect(database_url, pool_size=1), []
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(7)")

        def use(row: PGresult) -> None:
            numbers.append(row.get_value(0, 0))
            if len(numbers) == 1:  # without it there is no second row
                connection.execute("SELECT pg_advisory_unlock(7)")

        statement = ROWS.format("CASE WHEN n = 2 THEN pg_advisory_xact_lock_shared(7) END::text")
        rest = await database.query(statement, [], use)
    assert numbers == [struct.pack(">i", number) for number in (1, 2, 3)]
    assert rest.ntuples == 0
    assert await double(database, 3) == 6
    assert connections(database_url) == 1


async def test_rows_whose_backend_is_killed_come_again_from_the_first(
    database_url: str,
    connect: Connect,  # noqa: F811
) -> None:
    database, numbers = connect(database_url, pool_size=1, deadline_seconds=30), []
    await double(database, 1)
    with psycopg.connect(database_url, autocommit=True) as connection:

        def use(row: PGresult) -> None:
            numbers.append(row.get_value(0, 0))
            if len(numbers) == 1:
                connection.execute("SELECT pg_terminate_backend(%s)", [int(row.get_value(0, 2) or 0)])

        statement = ROWS.format("concat(pg_backend_pid(), CASE WHEN n = 2 THEN pg_sleep(1) END)")
        await database.query(statement, [], use)
    assert numbers == [struct.pack(">i", number) for number in (1, 1, 2, 3)]


async def test_whoever_cannot_use_a_row_is_told_and_leaves_nothing_behind(
    database_url: str,
    connect: Connect,  # noqa: F811
) -> None:
    def use(_row: PGresult) -> None:
        raise ValueError("of no use")

    database = connect(database_url, pool_size=1)
    await double(database, 1)
    before = open_files()
    for _ in range(3):
        with pytest.raises(ValueError, match="of no use"):
            await database.query(ROWS.format("n"), [], use)
    assert await double(database, 2) == 4
    assert open_files() <= before


KILL = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sl%'"


async def test_a_read_whose_backend_is_killed_is_asked_once_more(database_url: str, connect: Connect) -> None:  # noqa: F811
    database = connect(database_url, pool_size=1, deadline_seconds=30)
    await double(database, 1)
    call = asyncio.create_task(database.query("SELECT pg_sleep(1)::text", []))
    with psycopg.connect(database_url, autocommit=True) as connection:
        assert await eventually(lambda: connection.execute(KILL).fetchone() == (1,))
    assert row_values(await call, 0) == [b""]
    assert connections(database_url) == 1


class Watched(Session):
    """Notes, when a call is told that its connection is lost, whether its socket is still listened to."""

    listened = False

    def _arrive(self, error: Exception | None) -> None:
        if error is not None:
            self.listened = asyncio.get_running_loop().remove_reader(self.descriptor())
        super()._arrive(error)


async def test_nobody_listens_to_a_socket_that_is_lost(database_url: str) -> None:
    """The driver closes it at once, and the next connection may get its number before the call has ended."""
    session = Watched(await psycopg.AsyncConnection.connect(database_url, autocommit=True))
    call = asyncio.create_task(session.query("SELECT pg_sleep(20)", [], 30))
    with psycopg.connect(database_url, autocommit=True) as connection:
        assert await eventually(lambda: connection.execute(KILL).fetchone() == (1,))
    with pytest.raises(psycopg.OperationalError):
        await call
    assert session.is_lost()
    assert not session.listened
    session.close()


async def test_a_read_whose_backend_is_killed_again_is_an_outage(database_url: str, connect: Connect) -> None:  # noqa: F811
    database = connect(database_url, pool_size=1, deadline_seconds=30)
    await double(database, 1)
    call = asyncio.create_task(refused_in(database, "SELECT pg_sleep(20)"))
    killed: set[int] = set()  # the first one may be on its way out for a while

    def kill_another() -> bool:
        rows = connection.execute(
            "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE 'SELECT pg_sl%%' AND pid <> ALL(%s)",
            [list(killed)],
        ).fetchall()
        killed.update(pid for pid, _ in rows)
        return bool(rows)

    with psycopg.connect(database_url, autocommit=True) as connection:
        for _ in range(2):
            assert await eventually(kill_another)
    assert await call < 20
    assert await double(database, 4) == 8


async def test_asking_once_more_takes_no_longer_than_the_deadline(
    own_server: tuple[str, Path],  # noqa: F811
    connect: Connect,  # noqa: F811
) -> None:
    url, data = own_server
    database = connect(url, pool_size=1)
    await double(database, 1)
    call = asyncio.create_task(refused_in(database, "SELECT pg_sleep(20)"))
    with psycopg.connect(url, autocommit=True) as connection:
        assert await eventually(lambda: connection.execute(KILL).fetchone() == (1,))
    with frozen(data):
        assert await call < DEADLINE + GRACE
    assert await double(database, 4) == 8


async def test_a_host_that_came_up_again_is_noticed_by_nobody(
    own_server: tuple[str, Path],  # noqa: F811
    connect: Connect,  # noqa: F811
) -> None:
    """Nothing tells an idle connection that its other end is gone; the first thing sent is reset."""
    proxy = FaultProxy(own_server[0])
    async with proxy.serve() as url:
        database = connect(url, deadline_seconds=5)
        await asyncio.gather(*(double(database, number) for number in range(4)))
        proxy.come_up_again()
        assert [await double(database, number) for number in range(8)] == [2 * n for n in range(8)]
        await database.close()


async def test_calls_that_share_a_deadline_take_no_longer_together(
    database_url: str,
    connect: Connect,  # noqa: F811
) -> None:
    database = connect(database_url)

    async def ask_for_long() -> None:
        async with database.one_deadline():
            for _ in range(10):
                await database.query("SELECT pg_sleep(0.3)", [])

    start = time.perf_counter()
    with pytest.raises(DatabaseUnavailableError):
        await ask_for_long()
    assert time.perf_counter() - start < DEADLINE + GRACE
    assert await double(database, 4) == 8


async def test_a_statement_at_fault_is_told_by_its_own_error(database_url: str, connect: Connect) -> None:  # noqa: F811
    database = connect(database_url, pool_size=1)
    with pytest.raises(psycopg.errors.UndefinedColumn):
        await database.query("SELECT nonsense", [])
    with pytest.raises(psycopg.errors.DivisionByZero):
        await database.query("SELECT 1 / $1::int4", [struct.pack(">i", 0)])
    assert await double(database, 5) == 10


async def test_a_closed_database_ends_what_is_under_way(database_url: str, connect: Connect) -> None:  # noqa: F811
    database = connect(database_url, deadline_seconds=30)
    await double(database, 1)
    call = asyncio.create_task(refused_in(database, "SELECT pg_sleep(20)"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await database.close()
    assert await call < 20
    await refused_in(database)


async def test_a_connection_that_was_idle_for_long_is_not_used_again(
    database_url: str,
    connect: Connect,  # noqa: F811
) -> None:
    """A network may have forgotten it, without a word to either end."""
    clock = FakeClock()
    database = connect(database_url, pool_size=1, monotonic=clock)
    first = await backend(database)
    clock.now += IDLE_SECONDS - 1
    assert await backend(database) == first
    clock.now += IDLE_SECONDS - 1
    assert await backend(database) == first  # counted from its last use
    clock.now += IDLE_SECONDS
    second = await backend(database)
    assert second != first
    clock.now += IDLE_SECONDS
    assert await database.run(_backend_of) not in {first, second}
    assert await eventually(lambda: connections(database_url) == 1)


async def _backend_of(connection: Connection) -> int:
    return connection.info.backend_pid


async def test_an_answer_that_does_not_come_costs_the_connections_nobody_has_heard_of_since(
    own_server: tuple[str, Path],  # noqa: F811
    connect: Connect,  # noqa: F811
) -> None:
    url, _ = own_server
    database = connect(url, pool_size=3)
    opened = set(await asyncio.gather(*(backend(database) for _ in range(3))))
    next_one = await backend(database)
    os.kill(next_one, signal.SIGSTOP)
    try:
        late = asyncio.create_task(refused_in(database))
        await asyncio.sleep(0)
        heard = await backend(database)
        await late
        assert await backend(database) == heard
    finally:
        os.kill(next_one, signal.SIGCONT)
    assert len(opened) == 3
    with psycopg.connect(url, autocommit=True) as watching:
        find = "SELECT array_agg(pid) FROM pg_stat_activity WHERE pid = ANY (%s)"
        assert await eventually(lambda: watching.execute(find, [list(opened)]).fetchone() == ([heard],))


@pytest.mark.parametrize(("given", "idle"), [("", 30), ("?keepalives_idle=7", 7)])
async def test_a_quiet_connection_is_kept_alive(
    own_server: tuple[str, Path],  # noqa: F811
    connect: Connect,  # noqa: F811
    given: str,
    idle: int,
) -> None:
    async def look(connection: Connection) -> tuple[int, ...]:
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        with socket.socket(fileno=os.dup(connection.fileno())) as handle:
            return tuple(handle.getsockopt(socket.IPPROTO_TCP, option) for option in options)

    async with FaultProxy(own_server[0]).serve() as url:
        database = connect(url + given, deadline_seconds=5)
        assert await database.run(look) == (idle, 10, 3)
        await database.close()
