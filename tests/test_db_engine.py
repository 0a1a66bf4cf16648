"""The deadline, proved on a server that is frozen, locked, overloaded, killed and restarted."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest

from app.db.embedded import open_embedded
from app.db.engine import Connection, Database
from app.errors import DatabaseUnavailableError

DEADLINE, GRACE = 1.0, 0.3  # for a machine that is busy with other tests; the proof measures it closely


async def ask(connection: Connection) -> int:
    cursor = await connection.execute("SELECT 1")
    row = await cursor.fetchone()
    return int(row[0])


async def ask_slowly(connection: Connection) -> None:
    await connection.execute("SELECT pg_sleep(30)")


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Database]]:
    databases: list[Database] = []

    def open_database(
        url: str,
        pool_size: int = 4,
        deadline_seconds: float = DEADLINE,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> Database:
        databases.append(
            Database(url, pool_size=pool_size, deadline_seconds=deadline_seconds, monotonic=monotonic)
        )
        return databases[-1]

    yield open_database
    for database in databases:
        await database.close()


Connect = Callable[..., Database]


@pytest.fixture(scope="module")
def own_server(make_server_dir: Callable[[], Path]) -> Iterator[tuple[str, Path]]:
    """A server of this module's own, because its tests freeze it: its URL and its data directory."""
    folder = make_server_dir()
    with open_embedded(folder) as url:
        yield url, folder / "postgres" / "data"


def server_processes(data: Path) -> list[int]:
    """The postmaster first, then its children."""
    postmaster = int((data / "postmaster.pid").read_text().split()[0])
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:
            continue
        if fields and int(fields[1]) == postmaster:
            found.append(int(entry.name))
    return [postmaster, *found]


@contextmanager
def frozen(data: Path) -> Iterator[None]:
    processes = server_processes(data)
    _send(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        _send(processes, signal.SIGCONT)


def _send(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # a connection that was just ending
            os.kill(process, number)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def refused_in(database: Database, call: Callable[..., object] = ask) -> float:
    start = time.perf_counter()
    with pytest.raises(DatabaseUnavailableError):
        await database.run(call)  # type: ignore[arg-type]
    return time.perf_counter() - start


def took_the_deadline(times: Iterable[float]) -> bool:
    seconds = list(times)
    return min(seconds) > DEADLINE * 0.9 and max(seconds) < DEADLINE + GRACE


def connections(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'lead-scoring' AND datname = current_database()"
        ).fetchone()
        assert row is not None
        return int(row[0])


async def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


async def test_a_frozen_server_costs_every_call_the_deadline_and_no_more(
    own_server: tuple[str, Path], connect: Connect
) -> None:
    url, data = own_server
    database = connect(url)
    await asyncio.gather(*(database.run(ask) for _ in range(4)))
    before = open_files()
    with frozen(data):
        # The first round waits on open connections, the second on new ones, and more callers than
        # connections.
        for callers in (4, 20):
            assert took_the_deadline(await asyncio.gather(*(refused_in(database) for _ in range(callers))))
    start = time.perf_counter()
    assert await database.run(ask) == 1
    assert time.perf_counter() - start < GRACE
    assert await eventually(lambda: open_files() <= before)
    assert await eventually(lambda: connections(url) <= 4)


async def test_a_call_that_is_under_way_when_the_server_freezes_is_abandoned(
    own_server: tuple[str, Path], connect: Connect
) -> None:
    url, data = own_server
    database = connect(url, pool_size=1)
    await database.run(ask)
    before = open_files()
    call = asyncio.create_task(refused_in(database, ask_slowly))
    assert await eventually(lambda: _running(url, "pg_sleep") == 1)
    with frozen(data):
        assert await call < DEADLINE + GRACE
    assert await database.run(ask) == 1
    assert open_files() <= before


async def test_a_caller_that_is_cancelled_while_the_server_is_frozen_leaves_at_once(
    own_server: tuple[str, Path], connect: Connect
) -> None:
    url, data = own_server
    database = connect(url, pool_size=1)
    await database.run(ask)
    before = open_files()
    with frozen(data):
        call = asyncio.create_task(database.run(ask))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        call.cancel()
        start = time.perf_counter()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert time.perf_counter() - start < GRACE
    assert await database.run(ask) == 1
    assert open_files() <= before


async def test_a_caller_cancelled_as_the_answer_comes_leaves_the_connection_to_the_next_one(
    database_url: str, connect: Connect
) -> None:
    async def process_number(connection: Connection) -> int:
        return connection.info.backend_pid

    async def ask_and_be_cancelled(connection: Connection) -> int:
        answer = await ask(connection)
        asyncio.get_running_loop().call_soon(caller.cancel)
        return answer

    database = connect(database_url, pool_size=1)
    before = await database.run(process_number)
    caller = asyncio.create_task(database.run(ask_and_be_cancelled))
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await database.run(process_number) == before
    assert await database.run(ask) == 1


async def test_cancelled_callers_give_their_places_back(database_url: str, connect: Connect) -> None:
    async def sleep(connection: Connection, turn: int) -> None:
        await connection.execute(f"SELECT pg_sleep(30), {turn}")

    database = connect(database_url, pool_size=2, deadline_seconds=5)
    for turn in range(10):
        call = asyncio.create_task(database.run(partial(sleep, turn=turn)))
        assert await eventually(lambda turn=turn: _running(database_url, f"pg_sleep(30), {turn}") == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert await asyncio.gather(*(database.run(ask) for _ in range(10))) == [1] * 10


async def test_callers_that_are_cancelled_while_they_connect_give_their_places_back(
    own_server: tuple[str, Path], connect: Connect
) -> None:
    url, data = own_server
    database = connect(url, pool_size=2, deadline_seconds=5)
    before = open_files()
    with frozen(data):
        for _ in range(10):
            call = asyncio.create_task(database.run(ask))
            assert await eventually(lambda: open_files() > before)  # it waits for the server's first word
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert await eventually(lambda: open_files() <= before)
    assert await asyncio.gather(*(database.run(ask) for _ in range(10))) == [1] * 10


async def test_the_server_gives_up_the_statement_too(database_url: str, connect: Connect) -> None:
    database = connect(database_url)
    assert took_the_deadline([await refused_in(database, ask_slowly)])
    assert await eventually(lambda: _running(database_url, "pg_sleep") == 0, seconds=2)


async def test_a_locked_table_costs_the_deadline_and_at_most_the_pool_waits_for_it(
    database_url: str, connect: Connect
) -> None:
    async def read(connection: Connection) -> None:
        await connection.execute("SELECT count(*) FROM people")

    database = connect(database_url, pool_size=3)
    with psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE people IN ACCESS EXCLUSIVE MODE")
        calls = [asyncio.create_task(refused_in(database, read)) for _ in range(12)]
        assert await eventually(lambda: _running(database_url, "count(*) FROM people") == 3)
        assert took_the_deadline(await asyncio.gather(*calls))
    await database.run(read)


async def test_waiting_for_a_connection_counts(database_url: str, connect: Connect) -> None:
    database = connect(database_url, pool_size=1)
    slow = asyncio.create_task(refused_in(database, ask_slowly))
    await asyncio.sleep(0)
    assert took_the_deadline([await refused_in(database)])
    await slow


async def test_connections_are_used_again_and_never_more_than_the_pool(
    database_url: str, connect: Connect
) -> None:
    database = connect(database_url, pool_size=3, deadline_seconds=5)
    assert sum(await asyncio.gather(*(database.run(ask) for _ in range(50)))) == 50
    # What an earlier test has given up may still be sleeping at the server.
    assert await eventually(lambda: 1 <= connections(database_url) <= 3)


async def test_connections_the_server_closed_are_not_handed_out(database_url: str, connect: Connect) -> None:
    database = connect(database_url)
    await asyncio.gather(*(database.run(ask) for _ in range(4)))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lead-scoring'"
        )
    assert await eventually(lambda: connections(database_url) == 0)
    assert await asyncio.gather(*(database.run(ask) for _ in range(6))) == [1] * 6


@pytest.mark.parametrize("fault", ["NOLOGIN", "LOGIN CONNECTION LIMIT 0"])
async def test_a_server_that_admits_nobody_is_an_outage_and_is_used_again_when_it_does(
    own_server: tuple[str, Path], connect: Connect, fault: str
) -> None:
    """Passwords that were changed, and no connections left."""
    url, _ = own_server
    database = connect(url.replace("postgres@", "reader@"), deadline_seconds=2)
    with psycopg.connect(url, autocommit=True) as administrator:
        administrator.execute("DROP ROLE IF EXISTS reader")
        administrator.execute(f"CREATE ROLE reader {fault}")  # type: ignore[arg-type]
        await asyncio.gather(*(refused_in(database) for _ in range(10)))
        administrator.execute("ALTER ROLE reader LOGIN CONNECTION LIMIT -1")
        assert await asyncio.gather(*(database.run(ask) for _ in range(10))) == [1] * 10


async def test_a_server_that_admits_nobody_has_one_caller_at_its_door(connect: Connect) -> None:
    door = Door()
    server = await asyncio.start_server(door.refuse, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        database = connect(
            f"postgresql://x@127.0.0.1:{port}/x?sslmode=disable", pool_size=10, deadline_seconds=10
        )
        await refused_in(database)  # nobody knew before
        await asyncio.gather(*(refused_in(database) for _ in range(10)))
    assert (door.most_open, door.opened) == (1, 11)


class Door:
    """Lets callers in, makes them wait, and sends them away; counts them."""

    def __init__(self) -> None:
        self.open = self.most_open = self.opened = 0

    async def refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.opened += 1
        self.most_open = max(self.most_open, self.open)
        await reader.read(1)
        await asyncio.sleep(0.02)  # what a server takes to say no: time for others to come too
        self.open -= 1
        writer.close()


async def test_a_failed_statement_is_the_callers_matter_and_keeps_the_connection(
    database_url: str, connect: Connect
) -> None:
    async def fail(connection: Connection) -> None:
        await connection.execute("SELECT nonsense")

    database = connect(database_url, pool_size=1)
    with pytest.raises(psycopg.errors.UndefinedColumn):
        await database.run(fail)
    assert await database.run(ask) == 1
    assert connections(database_url) == 1


async def test_a_read_only_session_is_used_until_it_is_to_write(database_url: str, connect: Connect) -> None:
    database = connect(database_url, pool_size=1)

    async def make_read_only(connection: Connection) -> int:
        await connection.execute("SET default_transaction_read_only = on")
        return int(connection.info.backend_pid)

    async def write(connection: Connection) -> int:
        await connection.execute("DELETE FROM ai_events")
        return int(connection.info.backend_pid)

    before = await database.run(make_read_only)
    assert (await database.query("SELECT pg_backend_pid()", [])).get_value(0, 0) == before.to_bytes(4)
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        await database.run(write)
    after = await database.run(write)
    assert after != before


async def test_a_transaction_left_open_does_not_reach_the_next_caller(
    database_url: str, connect: Connect
) -> None:
    async def leave_open(connection: Connection) -> None:
        await connection.execute("BEGIN")

    async def status(connection: Connection) -> str:
        return connection.info.transaction_status.name

    database = connect(database_url, pool_size=1)
    await database.run(leave_open)
    assert await database.run(status) == "IDLE"


@pytest.mark.parametrize(
    ("configured", "used"),
    [("off", "on"), ("on", "on"), ("local", "local"), ("remote_apply", "remote_apply")],
)
async def test_a_commit_is_durable_however_little_the_database_asks_for(
    database_url: str, connect: Connect, configured: str, used: str
) -> None:
    async def show(connection: Connection) -> str:
        row = await (await connection.execute("SHOW synchronous_commit")).fetchone()
        return str(row[0])

    with psycopg.connect(database_url, autocommit=True) as administrator:
        administrator.execute(
            f"ALTER DATABASE {administrator.info.dbname} SET synchronous_commit = {configured}"  # type: ignore[arg-type]
        )
    assert await connect(database_url, deadline_seconds=5).run(show) == used


async def test_no_server_is_said_at_once(tmp_path: Path, connect: Connect) -> None:
    assert await refused_in(connect(f"postgresql://nobody@/x?host={tmp_path}")) < DEADLINE


async def test_an_address_that_swallows_packets_costs_the_deadline(connect: Connect) -> None:
    # A listener whose queue is full answers nobody, like a host behind a firewall that drops.
    with _full_listener() as port:
        times = await asyncio.gather(
            *(refused_in(connect(f"postgresql://x@127.0.0.1:{port}/x")) for _ in range(3))
        )
    assert took_the_deadline(times)


async def test_a_server_that_is_killed_and_restarted_is_used_again(
    make_server_dir: Callable[[], Path], connect: Connect
) -> None:
    before, folder = open_files(), make_server_dir()
    with open_embedded(folder) as url:
        database = connect(url, deadline_seconds=2)
        assert await database.run(ask) == 1
        _send(server_processes(folder / "postgres" / "data"), signal.SIGKILL)
        assert await refused_in(database) < 2
        with open_embedded(folder) as again:
            assert again == url
            assert await database.run(ask) == 1
    assert await refused_in(database) < 2
    await database.close()
    assert open_files() <= before


async def test_a_closed_database_refuses_and_holds_nothing(database_url: str, connect: Connect) -> None:
    before = open_files()
    database = connect(database_url, deadline_seconds=5)
    await database.run(ask)
    slow = asyncio.create_task(refused_in(database, ask_slowly))
    assert await eventually(lambda: _running(database_url, "pg_sleep") == 1)
    await database.close()
    assert await slow < 5
    await refused_in(database)
    assert open_files() <= before


def _running(url: str, text: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE state = 'active' AND application_name = 'lead-scoring' AND query LIKE %s",
            [f"%{text}%"],
        ).fetchone()
        assert row is not None
        return int(row[0])


@contextmanager
def _full_listener() -> Iterator[int]:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(address)
            yield address[1]
        finally:
            for filler in fillers:
                filler.close()
