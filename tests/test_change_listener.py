"""Listening for changes on a real PostgreSQL: in time, or not trusted; over every way a session can end."""

import asyncio
import math
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.ai.domain import InputColumn, LeadObserver
from app.db.change_listener import APPLICATION_NAME, LOOK_SECONDS, TRUST_SECONDS, ChangeListener
from app.db.embedded import open_embedded
from app.db.engine import Database
from app.db.leads import PostgresLeadSource
from app.db.migrations import upgrade
from tests.fakes import fetch_at_once
from tests.test_db_engine import eventually, frozen
from tests.test_prediction_cache import DAY, MODEL, build_answers, build_cache

GPA = [InputColumn("gpa", "number")]


class Observer:
    """Keeps what it is told; `trusted_until` is in the monotonic seconds of the machine."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.emptied = 0
        self.trusted_until = -math.inf

    def forget(self, uuids: Sequence[str]) -> None:
        self.forgotten += uuids

    def forget_all(self) -> None:
        self.emptied += 1

    def trust_until(self, monotonic_seconds: float) -> None:
        self.trusted_until = monotonic_seconds

    def is_trusted(self) -> bool:
        return time.monotonic() < self.trusted_until


Listen = Callable[..., ChangeListener]


@pytest.fixture
def listen() -> Iterator[Listen]:
    with ExitStack() as stack:

        def start(
            url: str,
            observer: LeadObserver,
            relation: str = "lead_source",
            look_seconds: float = LOOK_SECONDS,
        ) -> ChangeListener:
            listener = ChangeListener(
                url, relation, observer, deadline_seconds=0.5, look_seconds=look_seconds
            )
            listener.start()
            stack.callback(listener.close)
            return listener

        yield start


@pytest.fixture(scope="module")
def own_server(make_server_dir: Callable[[], Path]) -> Iterator[tuple[str, Path]]:
    """A server of this module's own, migrated, that its tests may freeze: its URL and data directory."""
    folder = make_server_dir()
    with open_embedded(folder) as url:
        upgrade(url)
        yield url, folder / "postgres" / "data"


def execute(url: str, statement: str, *parameters: object) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement, parameters)


def add_lead(url: str, ref: str = "lead_1") -> str:
    lead_id = str(uuid4())
    execute(
        url, "INSERT INTO people (id, external_ref, gpa, created_at) VALUES (%s, %s, 1, now())", lead_id, ref
    )
    return lead_id


def session_of_the_listener(url: str) -> int | None:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()",
            [APPLICATION_NAME],
        ).fetchone()
        return row and int(row[0])


async def test_a_changed_lead_is_named_and_silence_is_trusted(database_url: str, listen: Listen) -> None:
    observer = Observer()
    listener = listen(database_url, observer)
    assert observer.emptied == 1
    assert await eventually(observer.is_trusted)
    assert listener.hears_everything()
    lead_id = add_lead(database_url)
    assert await eventually(lambda: lead_id in observer.forgotten)
    execute(database_url, "TRUNCATE touchpoints")
    assert await eventually(lambda: observer.emptied == 2)


@pytest.mark.parametrize("payload", ["", "*", "nonsense", "Zürich", "6f1c0c1e-5f0b-4a57-9a1c-0c6a3f0e9b11 x"])
async def test_a_notification_that_is_not_understood_means_any_lead(
    database_url: str, listen: Listen, payload: str
) -> None:
    observer = Observer()
    listen(database_url, observer)
    execute(database_url, "SELECT pg_notify('lead_scoring_changes', %s)", payload)
    execute(database_url, "SELECT pg_notify('lead_scoring_changes', %s)", str(uuid4()).upper())
    assert await eventually(lambda: len(observer.forgotten) == 1)
    assert observer.emptied == (2 if payload else 1)
    assert observer.forgotten[0].islower()


async def test_whoever_is_trusted_has_heard_of_everything_committed_a_fifth_of_a_second_before(
    database_url: str, listen: Listen
) -> None:
    observer = Observer()
    listen(database_url, observer)
    for _ in range(50):
        lead_id = add_lead(database_url, ref=str(uuid4()))
        committed = time.monotonic()
        assert await eventually(lambda c=committed: observer.trusted_until >= c + TRUST_SECONDS)
        assert lead_id in observer.forgotten


async def test_a_session_that_is_ended_is_replaced_and_nothing_from_before_counts(
    database_url: str, listen: Listen
) -> None:
    observer = Observer()
    listen(database_url, observer)
    execute(database_url, "SELECT pg_terminate_backend(%s)", session_of_the_listener(database_url))
    assert await eventually(lambda: observer.emptied == 2)
    assert await eventually(observer.is_trusted)
    lead_id = add_lead(database_url)
    assert await eventually(lambda: lead_id in observer.forgotten)


async def test_an_unexpected_failure_counts_as_a_loss_and_does_not_end_listening(
    database_url: str, listen: Listen
) -> None:
    observer = FailingOnce()
    before = losses()
    listen(database_url, observer)
    add_lead(database_url)
    assert await eventually(lambda: observer.emptied == 2)
    assert losses() == before + 1
    assert await eventually(observer.is_trusted)
    lead_id = add_lead(database_url, ref="lead_2")
    assert await eventually(lambda: observer.forgotten == [lead_id])
    assert REGISTRY.get_sample_value("leadscore_change_listener") == 1


def losses() -> float:
    return REGISTRY.get_sample_value("leadscore_change_listener_losses_total") or 0.0


class FailingOnce(Observer):
    """Has no memory left at the first change it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self._failed = False

    def forget(self, uuids: Sequence[str]) -> None:
        if not self._failed:
            self._failed = True
            raise MemoryError
        super().forget(uuids)


async def test_a_session_that_hangs_is_not_trusted_any_longer_and_replaced(
    own_server: tuple[str, Path], listen: Listen
) -> None:
    url, _ = own_server
    observer = Observer()
    listen(url, observer)
    session = session_of_the_listener(url)
    assert session is not None
    os.kill(session, signal.SIGSTOP)
    try:
        frozen_at = time.monotonic()
        assert await eventually(lambda: observer.emptied == 2)
    finally:
        os.kill(session, signal.SIGCONT)
    assert await eventually(observer.is_trusted)
    assert observer.trusted_until > frozen_at


async def test_a_frozen_server_is_not_trusted_beyond_its_time_and_heard_again_after_it(
    own_server: tuple[str, Path], listen: Listen
) -> None:
    url, data = own_server
    observer = Observer()
    listen(url, observer)
    assert await eventually(observer.is_trusted)
    with frozen(data):
        frozen_at = time.monotonic()
        assert observer.trusted_until <= frozen_at + 0.2
        assert await eventually(lambda: not observer.is_trusted())
        assert await eventually(lambda: observer.trusted_until == -math.inf)
    assert await eventually(observer.is_trusted)
    lead_id = add_lead(url, ref=str(uuid4()))
    assert await eventually(lambda: lead_id in observer.forgotten)


async def test_a_server_that_is_not_there_yet_is_heard_once_it_is(
    make_server_dir: Callable[[], Path], listen: Listen
) -> None:
    folder = make_server_dir()
    with open_embedded(folder) as url:
        pass
    observer = Observer()
    listen(url, observer)
    assert not observer.is_trusted()
    with open_embedded(folder) as again:
        assert again == url
        assert await eventually(observer.is_trusted)


@pytest.mark.parametrize(
    ("watch", "complete"),
    [
        ("", False),
        ("SELECT lead_scoring_watch('crm.a', 'id')", False),
        ("SELECT lead_scoring_watch('crm.a', 'id'), lead_scoring_watch('crm.b')", True),
    ],
)
def test_a_source_of_ones_own_is_heard_completely_when_every_table_under_it_is_watched(
    database_url: str, listen: Listen, watch: str, complete: bool
) -> None:
    execute(database_url, """
        CREATE SCHEMA crm; CREATE TABLE crm.a (id uuid); CREATE TABLE crm.b (x int);
        CREATE VIEW crm.inner AS SELECT id AS lead_id FROM crm.a;
        CREATE VIEW crm.leads AS SELECT i.* FROM crm.inner i CROSS JOIN crm.b
    """)  # fmt: skip
    if watch:
        execute(database_url, watch)
    listener = listen(database_url, Observer(), "crm.leads")
    assert listener.hears_everything() is complete


async def test_a_table_that_is_watched_from_now_on_or_no_longer_is_noticed(
    database_url: str, listen: Listen
) -> None:
    listener = listen(database_url, Observer())
    assert listener.hears_everything()
    execute(database_url, "SELECT lead_scoring_unwatch('campuses')")
    assert await eventually(lambda: not listener.hears_everything())
    execute(database_url, "SELECT lead_scoring_watch('campuses')")
    assert await eventually(listener.hears_everything)


@pytest.mark.parametrize(
    ("away", "back"),
    [
        ("ALTER TABLE people DISABLE TRIGGER USER", "ALTER TABLE people ENABLE TRIGGER USER"),
        (
            "ALTER TABLE people ENABLE REPLICA TRIGGER lead_scoring_update",
            "ALTER TABLE people ENABLE TRIGGER lead_scoring_update",
        ),
        ("DROP TRIGGER lead_scoring_update ON people", "SELECT lead_scoring_watch('people', 'id')"),
    ],
)
async def test_a_trigger_that_goes_without_a_word_is_missed_at_the_next_look(
    database_url: str, listen: Listen, away: str, back: str
) -> None:
    observer = Observer()
    listener = listen(database_url, observer, look_seconds=0.05)
    assert listener.hears_everything()
    assert observer.emptied == 1
    with capture_logs() as lines:
        execute(database_url, away)
        assert await eventually(lambda: not listener.hears_everything())
    told = [line["tables"] for line in lines if line["event"] == "lead_source_not_watched"]
    assert told == ["people"]
    assert observer.emptied == 2
    execute(database_url, back)
    assert await eventually(listener.hears_everything)
    assert observer.emptied > 2


def test_a_source_that_is_not_there_is_not_heard_completely(database_url: str, listen: Listen) -> None:
    assert not listen(database_url, Observer(), "nowhere").hears_everything()


def test_closing_ends_thread_and_session(database_url: str, listen: Listen) -> None:
    listener = listen(database_url, Observer())
    listener.close()
    assert "change-listener" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
async def source(database_url: str) -> AsyncIterator[PostgresLeadSource]:
    execute(database_url, """
        CREATE FUNCTION slow() RETURNS boolean LANGUAGE sql VOLATILE
            AS 'SELECT pg_advisory_lock_shared(7); SELECT pg_advisory_unlock_shared(7)';
        CREATE VIEW slow_source AS SELECT id AS lead_id, external_ref, gpa FROM people WHERE slow()
    """)  # fmt: skip
    database = Database(database_url, pool_size=1, deadline_seconds=10)
    yield PostgresLeadSource(database, "slow_source")
    await database.close()


async def test_a_read_that_began_before_a_change_and_ends_after_its_notification_is_not_found(
    database_url: str, source: PostgresLeadSource, listen: Listen
) -> None:
    cache = build_cache(100, time.monotonic, trusted_until=-math.inf)
    listen(database_url, cache)
    lead_id = add_lead(database_url)

    async def read(asked: str) -> float:
        since = cache.moment()
        found = await fetch_at_once(source, [asked], GPA)
        gpa = float(found.leads.columns["gpa"].values[0])
        cache.remember(MODEL, DAY, [asked], build_answers(gpa), uuids=found.uuid_of, since=since)
        return gpa

    await source.fetch_schema()
    for asked in (lead_id, "lead_1"):
        with psycopg.connect(database_url) as holder:
            holder.execute("UPDATE people SET gpa = 1")
            holder.commit()
            holder.execute("SELECT pg_advisory_lock(7)")
            reading = asyncio.create_task(read(asked))
            assert await eventually(lambda: _waits_for_lock(database_url))
            heard = cache.moment().changes
            execute(database_url, "UPDATE people SET gpa = 2")
            assert await eventually(lambda h=heard: cache.moment().changes > h)
        assert await reading == 1
        assert await eventually(cache.is_trusted)
        assert not cache.find(MODEL, DAY, [asked])[0].any()
        assert await read(asked) == 2
        assert cache.find(MODEL, DAY, [asked])[1]["probability"] == 2


def _waits_for_lock(url: str) -> bool:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
        ).fetchone()
        assert row is not None
        return bool(row[0])
