"""The process stopped, starved of processor time, and out of file descriptors, under requests."""

import asyncio
import itertools
import json
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import httpx2
import psycopg

from app.serve import WORKER_SECONDS
from tests.model_files import V1, V2, publish
from tests.service import (
    FEATURES,
    PREDICT,
    Connection,
    Service,
    add_leads,
    count_events,
    publish_crm_model,
    wait_until,
)

LEGACY = "/ai/advanced-ml-legacy/predict-batch"
PAUSE_SECONDS = 2.5
LONGER_THAN_UVICORN_WAITS_SECONDS = 7.0  # 5 by default, asked twice a second
PATIENCE_SECONDS = 30.0
MEGABYTES_LEFT = (4, 8, 12, 16, 24, 48, 128)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    connection = await Connection.open(port)
    try:
        yield connection
    finally:
        await connection.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await asyncio.to_thread(condition):
            pass


async def ask(connection: Connection, lead_id: str, path: str = PREDICT, name: str = "") -> tuple[int, dict]:
    headers = [("X-Request-ID", name)] if name else []
    async with asyncio.timeout(PATIENCE_SECONDS):
        status, _, body = await connection.ask("POST", path, json.dumps([lead_id]).encode(), headers)
    return status, json.loads(body)


def is_stopped(pid: int) -> bool:
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "T"


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: is_stopped(pid))
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def waiting_for_a_lock(url: str) -> bool:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE application_name = 'lead-scoring' AND wait_event_type = 'Lock'"
        ).fetchone()
        return row is not None and row[0] > 0


async def test_after_a_pause_what_is_overdue_is_refused_and_everything_else_answered(
    database_url: str, tmp_path: Path
) -> None:
    first, second, *others = add_leads(database_url, 20)
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, AI_BREAKER_FAILURES="2") as service:
        async with connected(service.port) as early, connected(service.port) as late:
            with psycopg.connect(database_url) as holder:
                holder.execute("LOCK TABLE people IN ACCESS EXCLUSIVE MODE")
                overdue = asyncio.create_task(ask(early, first, name="overdue"))
                await until(lambda: waiting_for_a_lock(database_url))
                with stopped(service.pid):
                    waits = asyncio.create_task(ask(late, second, name="waits"))
                    await asyncio.sleep(
                        PAUSE_SECONDS
                    )  # the pause itself, longer than the database's deadline
                    holder.rollback()
            status, answer = await overdue
            assert (status, answer["error_code"]) == (503, "DATABASE_UNAVAILABLE")
            assert (await waits)[0] == 200
            for number, lead_id in enumerate(others):
                assert (await ask(early, lead_id, LEGACY, f"after-{number}"))[0] == 200
        assert httpx2.get(f"http://127.0.0.1:{service.port}/readyz").status_code == 200
        assert service.stop() == 0
    events = count_events(database_url)
    assert {events[name] for name in ("overdue", "waits", *(f"after-{n}" for n in range(len(others))))} == {1}


async def test_a_worker_that_pauses_is_neither_missed_nor_replaced(database_url: str, tmp_path: Path) -> None:
    leads = add_leads(database_url, 30)
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, WORKERS="2") as service:
        before = service.worker_pids()
        with stopped(min(before)):
            paused, lead_ids = time.monotonic(), itertools.cycle(leads)
            while time.monotonic() < paused + LONGER_THAN_UVICORN_WAITS_SECONDS:
                assert await ask_anew(service.port, next(lead_ids)) == 200
        for _ in range(10):
            assert await ask_anew(service.port, leads[0]) == 200
        assert service.worker_pids() == before
        assert service.stop() == 0
    assert WORKER_SECONDS == 60  # a minute is too long for a test


@contextmanager
def starved(pid: int, share: float, period_seconds: float = 0.05) -> Iterator[None]:
    """Gives the process its share of each period and no more, as a quota of the kernel would."""
    over = threading.Event()

    def alternate() -> None:
        while not over.wait(share * period_seconds):
            os.kill(pid, signal.SIGSTOP)
            over.wait((1 - share) * period_seconds)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        os.kill(pid, signal.SIGCONT)


async def test_too_little_processor_is_not_mistaken_for_a_broken_dependency(
    database_url: str, tmp_path: Path
) -> None:
    leads = add_leads(database_url, 320)
    models = publish_crm_model(tmp_path / "models")
    answers: Counter[tuple[int, str | None]] = Counter()

    async def use(port: int, lead_ids: list[str]) -> None:
        async with connected(port) as connection:
            for lead_id in lead_ids:
                status, answer = await ask(connection, lead_id, LEGACY)
                answers[status, answer.get("error_code")] += 1

    with Service(tmp_path, database_url, models, AI_BREAKER_FAILURES="1") as service:
        with starved(service.pid, share=0.2):
            await asyncio.gather(*(use(service.port, leads[number::16]) for number in range(16)))
        assert answers.keys() <= {(200, None), (503, "OVERLOADED")}
        assert answers[200, None] > len(leads) / 2
        health = httpx2.get(f"http://127.0.0.1:{service.port}/ai/advanced-ml/health").json()
        assert (health["breaker"], health["database"]["status"]) == ({"state": "closed"}, "ok")
        assert service.stop() == 0


@contextmanager
def limited(pid: int, resource_number: int, soft: int) -> Iterator[None]:
    """What the process has it keeps; beyond the limit it gets nothing more. It may end meanwhile."""
    before = resource.prlimit(pid, resource_number)
    resource.prlimit(pid, resource_number, (soft, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource_number, before)


def bytes_mapped(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "statm").read_text().split()[0]) * resource.getpagesize()


async def test_without_descriptors_the_last_good_model_serves_on_and_nothing_needs_a_restart(
    database_url: str, tmp_path: Path
) -> None:
    leads = add_leads(database_url, 40)
    models = publish_crm_model(tmp_path / "models")
    async with AsyncExitStack() as stack:
        service = stack.enter_context(Service(tmp_path, database_url, models, ML_CACHE_TTL_SECONDS="0.05"))
        known = await stack.enter_async_context(connected(service.port))
        status, answer = await ask(known, leads[0], name="before")
        assert (status, answer["model_version"]) == (200, V1)
        with limited(service.pid, resource.RLIMIT_NOFILE, 3):
            publish(models, V2, feature_set=FEATURES.to_json())
            for number, lead_id in enumerate(leads):
                status, answer = await ask(known, lead_id, name=f"during-{number}")
                assert (status, answer["model_version"]) == (200, V1)
            stranger = asyncio.create_task(ask_anew(service.port, leads[0]))
            status, answer = await ask(known, leads[1], name="beside-a-stranger")
            assert (status, answer["model_version"]) == (200, V1)
        assert await stranger in (200, None)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await ask(known, leads[0]))[1]["model_version"] != V2:
                pass
            while await ask_anew(service.port, leads[2]) != 200:
                pass
        assert service.stop() == 0
    events = count_events(database_url)
    assert {events.get(f"during-{number}") for number in range(len(leads))} == {1}
    assert set(events.values()) == {1}


async def test_without_memory_no_answer_is_without_its_event_and_nobody_is_left_waiting(
    database_url: str, tmp_path: Path
) -> None:
    """A worker that ends for want of memory is started again, as whoever watches it would.

    It is left more and more, from too little for any answer on, until some requests were answered and the
    want of memory has shown.
    """
    leads = add_leads(database_url, 2000)
    models = publish_crm_model(tmp_path / "models")
    batch = json.dumps(leads).encode()
    answers: dict[str, tuple[int, str | None]] = {}
    wants = 0

    async def keep_asking(port: int, client: str) -> None:
        for number in range(2):
            name = f"client-{client}-{number}"
            with suppress(ConnectionError, asyncio.IncompleteReadError):  # but nobody waits in vain
                async with asyncio.timeout(PATIENCE_SECONDS), connected(port) as connection:
                    status, _, body = await connection.ask("POST", PREDICT, batch, [("X-Request-ID", name)])
                    answers[name] = status, json.loads(body).get("error_code")

    async def bring_back(service: Service) -> int:
        """Waits until the service answers, started again where it ended; returns how often it was."""
        starts = 0
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await ask_anew(service.port, leads[0]) != 200:
                if service.has_ended():
                    assert service.wait() != 0
                    await asyncio.to_thread(service.start)
                    starts += 1
        return starts

    with Service(tmp_path, database_url, models) as service:
        for left in MEGABYTES_LEFT:
            with limited(service.pid, resource.RLIMIT_AS, bytes_mapped(service.pid) + left * 2**20):
                await asyncio.gather(*(keep_asking(service.port, f"{left}-{client}") for client in range(8)))
            wants += await bring_back(service) + service.stderr.read_text().count("MemoryError")
            told = Counter(status for status, _ in answers.values())
            if told[200] and wants + told[500]:
                break
        assert told[200] > 0, answers
        assert wants + told[500] > 0, answers
        assert service.stop() == 0
        service.start()  # ships what the end had no time for
        assert service.stop() == 0
    events = count_events(database_url)
    # Where neither the log nor the database can be written, the answer says so, and it alone has no event.
    recorded = {name: told for name, told in answers.items() if told != (503, "TELEMETRY_UNAVAILABLE")}
    lost = {name: (told, events.get(name)) for name, told in recorded.items() if events.get(name) != 1}
    assert not lost, service.stderr.read_text()[-5000:]
    assert {status for status, _ in answers.values()} <= {200, 500, 503}


async def ask_anew(port: int, lead_id: str) -> int | None:
    """Asks over a new connection; None when the service could not take it."""
    with suppress(OSError, asyncio.IncompleteReadError):
        async with connected(port) as connection:
            return (await ask(connection, lead_id))[0]
    return None
