"""Proves that a frozen, dead, locked or unreachable database never hangs a caller.

Clients ask the service, one lead at a time, for leads it remembers and for leads it must read. Under them the
database is frozen (SIGSTOP), killed (SIGKILL) and started again, locked, and cut off by a network that
delivers nothing; there are always fewer connections than callers. Leads that are remembered must be answered
throughout, and say that they are degraded; the others must be refused in time; and when the database is back,
so must the answers be.

make prove-database-faults [LONG=1] [SEED=n]
"""

import asyncio
import itertools
import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from app.db.embedded import open_embedded
from app.db.migrations import upgrade
from bench.data import Stage
from bench.fault_proxy import FaultProxy
from bench.figures import Figure
from bench.load import ask, build_request, read_answer
from bench.proof import PlantedBug, ProofRun, run_proof
from bench.servers import start_service
from bench.small_models import publish_small_model

PROMISE = "a frozen or dead database never hangs a caller, and remembered leads are answered throughout"
DEADLINE_SECONDS = 1.0
CLIENTS = 6
CONNECTIONS = 2
LEADS = 5_000
REMEMBERED = 50
SETTLING_SECONDS = 1.0  # within which it must be noticed that nobody hears of changes any more
GIVE_UP_SECONDS = 20.0


def measure(run: ProofRun) -> Sequence[Figure]:
    """Measures every fault for three seconds, or for a minute in the long run."""
    return asyncio.run(_measure(FAULTS, 60.0 if run.long else 3.0))


def driver_timeout(_run: ProofRun) -> Sequence[Figure]:
    """The same with the driver's own way to give up round every call."""
    return asyncio.run(_measure(("frozen",), 3.0, plant="driver-timeout"))


def nothing_remembered(_run: ProofRun) -> Sequence[Figure]:
    """The same with answers that are withheld as soon as they cannot be checked."""
    return asyncio.run(_measure(("frozen",), 3.0, ML_DEGRADED_ANSWERS="false"))


async def _measure(
    faults: Sequence[str], seconds: float, *, plant: str | None = None, **settings: str
) -> Sequence[Figure]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = _Database(stack, directory)
        publish_small_model(directory / "models", 0)
        async with database.proxy.serve() as url:
            service = start_service(
                "faults", Stage(url, directory / "models"), directory, plant=plant,
                **{
                    "LEAD_SOURCE": "lead_source", "DATABASE_DEADLINE_SECONDS": str(DEADLINE_SECONDS),
                    "DATABASE_POOL_SIZE": str(CONNECTIONS), "LOG_LEVEL": "ERROR", **settings,
                },
            )  # fmt: skip
            loop = asyncio.get_running_loop()
            server = await loop.run_in_executor(None, stack.enter_context, service)
            figures = []
            for fault in faults:
                figures += await _Case(server.port, database, fault).measure(seconds)
            return figures


class _Database:
    """A small CRM in a PostgreSQL of its own, the proxy before it, and what can be done to both."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack, self._directory = stack, directory
        self.url = stack.enter_context(open_embedded(directory))
        upgrade(self.url)
        with psycopg.connect(self.url) as connection:
            connection.execute(
                "INSERT INTO people (id, external_ref, gpa, created_at) SELECT gen_random_uuid(),"
                " 'lead_' || n, 2.5, now() - interval '30 days' FROM generate_series(1, %s) n",
                [LEADS],
            )
        self.proxy = FaultProxy(self.url)

    @asynccontextmanager
    async def break_down(self, fault: str) -> AsyncIterator[None]:
        """Has the fault while the context is open; the database is in order when it ends."""
        if fault == "frozen":
            pids = self._processes()
            _signal(pids, signal.SIGSTOP)
            yield
            _signal(pids, signal.SIGCONT)
        elif fault == "killed":
            _signal(self._processes(), signal.SIGKILL)
            yield
            await asyncio.to_thread(self._stack.enter_context, open_embedded(self._directory))
        elif fault == "locked":
            with psycopg.connect(self.url) as connection:
                connection.execute("LOCK people IN ACCESS EXCLUSIVE MODE")
                yield
        else:
            self.proxy.stall()
            yield
            self.proxy.flow()

    def _processes(self) -> list[int]:
        postmaster = int((self._directory / "postgres/data/postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        return [postmaster, *map(int, children)]


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


FAULTS = ("frozen", "killed", "locked", "cut off")
BACK_WITHIN = {"frozen": 0.25, "killed": 1.0, "locked": 0.25, "cut off": 0.25}


@dataclass
class _Answer:
    """One answer: when it was asked for, seconds it took, and what it was."""

    asked_at: float
    seconds: float
    status: int
    remembered: bool
    degraded: bool


class _Case:
    """One fault, and the answers while it lasts."""

    def __init__(self, port: int, database: _Database, fault: str) -> None:
        self._port, self._database, self._fault = port, database, fault
        self._unread = itertools.count(REMEMBERED + 1)
        self._answers: list[_Answer] = []
        self._over = False

    async def measure(self, seconds: float) -> list[Figure]:
        """Returns the figures of this fault, which lasts for `seconds`."""
        await self._wait_until_changes_are_heard()
        lead_ids = [f"lead_{number}" for number in range(1, REMEMBERED + 1)]
        for lead_id in lead_ids:
            await self._ask(lead_id)
        async with self._database.break_down(self._fault):
            began = time.perf_counter()
            clients = [asyncio.create_task(self._keep_asking(lead_ids)) for _ in range(CLIENTS)]
            await asyncio.sleep(seconds)
            mending = time.perf_counter()  # from here on the database may answer before it is said to
        mended, self._over = time.perf_counter(), True
        back = await self._wait_until_back(mended)
        await asyncio.gather(*clients)
        return self._judge(began, mending, back)

    def _judge(self, began: float, mending: float, back: float) -> list[Figure]:
        answers, fault = self._answers, self._fault
        kept = [answer for answer in answers if answer.remembered]
        late = max(answer.seconds for answer in answers) - DEADLINE_SECONDS
        unmarked = [
            answer for answer in kept
            if fault != "locked" and not answer.degraded
            and began + SETTLING_SECONDS < answer.asked_at < mending - answer.seconds
        ]  # fmt: skip
        return [
            Figure(f"{fault}: latest of {len(answers)} answers, after the deadline", late * 1e3, 50,
                   unit="ms"),
            Figure(
                f"{fault}: {len(kept)} remembered leads asked, not answered",
                sum(answer.status != 200 for answer in kept), 0, unit="",
            ),
            Figure(f"{fault}: of those answers, not marked degraded", len(unmarked), 0, unit=""),
            Figure(
                f"{fault}: answers that are neither 200 nor 503",
                sum(answer.status not in (200, 503) for answer in answers), 0, unit="",
            ),
            Figure(f"{fault}: a lead is read again after", back * 1000, BACK_WITHIN[fault] * 1000, unit="ms"),
        ]  # fmt: skip

    async def _keep_asking(self, lead_ids: Sequence[str]) -> None:
        for number in itertools.count():
            remembered = number % 2 == 0
            lead_id = lead_ids[number % len(lead_ids)] if remembered else f"lead_{next(self._unread)}"
            answer = await self._ask(lead_id, remembered=remembered)
            self._answers.append(answer)
            if self._over:
                return
            await asyncio.sleep(0.02)

    async def _wait_until_changes_are_heard(self) -> None:
        # Until then nothing that is read is remembered for good: the listener empties the cache as it begins.
        request = b"GET /ai/advanced-ml/health HTTP/1.1\r\nHost: bench\r\n\r\n"
        began, freshness = time.perf_counter(), "suspended"
        while freshness == "suspended" and time.perf_counter() - began < GIVE_UP_SECONDS:
            await asyncio.sleep(0.05)
            freshness = json.loads(await ask(self._port, request))["prediction_cache"]["freshness"]

    async def _wait_until_back(self, mended: float) -> float:
        while time.perf_counter() - mended < GIVE_UP_SECONDS:
            if (await self._ask(f"lead_{next(self._unread)}")).status == 200:
                return time.perf_counter() - mended
        return GIVE_UP_SECONDS

    async def _ask(self, lead_id: str, *, remembered: bool = False) -> _Answer:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(build_request(json.dumps([lead_id]).encode()))
        status, _, body = await read_answer(reader)
        writer.close()
        degraded = json.loads(body).get("degraded", False)
        return _Answer(began, time.perf_counter() - began, status, remembered, degraded)


if __name__ == "__main__":
    run_proof(
        PROMISE,
        measure,
        {
            "the driver's own timeout": PlantedBug(
                driver_timeout, "frozen: latest of * answers, after the deadline"
            ),
            "answers withheld": PlantedBug(
                nothing_remembered, "frozen: * remembered leads asked, not answered"
            ),
        },
    )
