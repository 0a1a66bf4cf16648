"""What becomes of reads whose connections break, asked once and asked once more, and what that costs others.

Two faults, over a real PostgreSQL and eight connections: backends terminated under load, and a host that came
up again while its clients were idle, so that nothing tells them. Then the price of two ways to be safe: a
loop of stamina round a call that succeeds, which `Database.query` avoids, and a timer round a call, which
every look-up of the predictor has.

python -m bench.lost_connections
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psycopg
import stamina
import uvloop
from psycopg.abc import Buffer
from psycopg.pq.abc import PGresult

from app.db.embedded import open_embedded
from app.db.engine import Database
from app.errors import DatabaseUnavailableError
from bench.fault_proxy import FaultProxy

CONNECTIONS = 8
ROUNDS = 10
CALLS = 20_000
TERMINATE = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'lead-scoring'"
)


class AskedOnce(Database):
    """The same without a second attempt."""

    async def query(self, statement: str, parameters: Sequence[Buffer]) -> PGresult:
        """Asks."""
        return await self._query(statement, parameters)


class Reads:
    """Reads one after the other, and counts those that are refused."""

    def __init__(self, database: Database) -> None:
        self.refused = self.asked = 0
        self._database = database

    async def ask(self, statement: str) -> None:
        """Reads once."""
        self.asked += 1
        try:
            await self._database.query(statement, [])
        except DatabaseUnavailableError:
            self.refused += 1


async def terminated(url: str, kind: type[Database]) -> str:
    """Terminates every backend, again and again, while eight callers read."""
    database = kind(url, pool_size=CONNECTIONS, deadline_seconds=1.0)
    reads, over, gone = Reads(database), asyncio.Event(), 0

    async def read_on() -> None:
        while not over.is_set():
            await reads.ask("SELECT pg_sleep(0.002)::text")

    def terminate() -> int:
        with psycopg.connect(url, autocommit=True) as connection:
            row = connection.execute(TERMINATE).fetchone()
            return int(row[0]) if row else 0

    callers = [asyncio.create_task(read_on()) for _ in range(CONNECTIONS)]
    for _ in range(ROUNDS):
        await asyncio.sleep(0.2)
        gone += await asyncio.to_thread(terminate)
    over.set()
    await asyncio.gather(*callers)
    await database.close()
    return f"{gone} backends terminated: {reads.refused} of {reads.asked} reads refused"


async def came_up_again(url: str, kind: type[Database]) -> str:
    """Lets the host forget eight idle connections, then reads twenty times."""
    proxy = FaultProxy(url)
    async with proxy.serve() as through:
        database = kind(through, pool_size=CONNECTIONS, deadline_seconds=1.0)
        warm = Reads(database)
        await asyncio.gather(*(warm.ask("SELECT pg_sleep(0.05)::text") for _ in range(CONNECTIONS)))
        proxy.come_up_again()
        reads = Reads(database)
        for _ in range(20):
            await reads.ask("SELECT 1")
        await database.close()
    return f"host came up again: {reads.refused} of {reads.asked} reads refused"


async def _return() -> None:
    await asyncio.sleep(0)  # the event loop turns once, as for any call that waits


async def _return_in_time() -> None:
    async with asyncio.timeout(5):
        await _return()


async def time_call(call: Callable[[], Awaitable[object]]) -> float:
    """Returns microseconds a call, the best of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(CALLS // 5):
            await call()
        times.append((time.perf_counter() - began) / (CALLS // 5))
    return min(times) * 1e6


async def main() -> None:
    """Prints a line for each."""
    with tempfile.TemporaryDirectory(prefix="lost-") as folder, open_embedded(Path(folder)) as url:
        for name, kind in (("asked once", AskedOnce), ("asked once more", Database)):
            for fault in (terminated, came_up_again):
                print(f"{name:>15}: {await fault(url, kind)}")
    again = stamina.AsyncRetryingCaller(attempts=2).on(OSError)
    bare = await time_call(_return)
    print(f"stamina round a call: {await time_call(lambda: again(_return)) - bare:.0f} us")
    print(f"a timer round a call: {await time_call(_return_in_time) - bare:.0f} us")


if __name__ == "__main__":
    stamina.instrumentation.set_on_retry_hooks(())
    uvloop.run(main())
