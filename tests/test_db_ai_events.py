"""Writing events: whole groups, once, whatever is in them."""

import json
from collections.abc import AsyncIterator
from uuid import UUID

import psycopg
import pytest

from app.ai.domain import StoredEvent
from app.db.ai_events import PostgresEventSink
from app.db.engine import Database
from app.errors import DatabaseUnavailableError


@pytest.fixture
async def sink(database_url: str) -> AsyncIterator[PostgresEventSink]:
    database = Database(database_url, pool_size=1, deadline_seconds=10)
    yield PostgresEventSink(database)
    await database.close()


def event(number: int, meta: str = '{"n": 1}', request_id: str | None = "r-1") -> StoredEvent:
    return StoredEvent(
        str(UUID(int=number)), "ml.prediction.success", meta, request_id, "2026-01-01T12:00:00.123456Z"
    )


def stored(url: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT id::text, action, meta, request_id, created_at::text FROM ai_events ORDER BY id"
        ).fetchall()


async def test_an_event_arrives_as_it_was_recorded(sink: PostgresEventSink, database_url: str) -> None:
    await sink.write_events([event(1, '{"text": "Zürich \\"quoted\\" {,}", "list": [1, null]}', None)])
    assert stored(database_url) == [
        (
            str(UUID(int=1)),
            "ml.prediction.success",
            {"text": 'Zürich "quoted" {,}', "list": [1, None]},
            None,
            "2026-01-01 12:00:00.123456+00",
        )
    ]


async def test_a_repeated_delivery_changes_nothing(sink: PostgresEventSink, database_url: str) -> None:
    await sink.write_events([event(1), event(2)])
    await sink.write_events([event(2, '{"n": 9}'), event(3), event(3)])
    assert [(row[0], row[2]) for row in stored(database_url)] == [
        (str(UUID(int=number)), {"n": 1}) for number in (1, 2, 3)
    ]


async def test_a_large_group_is_one_statement(sink: PostgresEventSink, database_url: str) -> None:
    await sink.write_events([event(number, json.dumps({"n": number})) for number in range(5000)])
    assert [row[2] for row in stored(database_url)] == [{"n": number} for number in range(5000)]


async def test_a_group_is_written_whole_or_not_at_all(sink: PostgresEventSink, database_url: str) -> None:
    with pytest.raises(psycopg.DataError):
        await sink.write_events([event(1), event(2, "not json")])
    assert stored(database_url) == []


async def test_writing_nothing_tells_whether_the_table_could_be_written(
    sink: PostgresEventSink, database_url: str, server_url: str
) -> None:
    await sink.write_events([])
    assert stored(database_url) == []
    nowhere = Database(server_url.replace("/postgres?", "/nowhere?"), pool_size=1, deadline_seconds=1)
    with pytest.raises(DatabaseUnavailableError):
        await PostgresEventSink(nowhere).write_events([])


@pytest.mark.parametrize(
    "change", ["DROP TABLE ai_events", "ALTER DATABASE {} SET default_transaction_read_only = on"]
)
async def test_a_table_that_cannot_be_written_yet_is_an_outage(
    sink: PostgresEventSink, database_url: str, change: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(change.format(connection.info.dbname))
    with pytest.raises(DatabaseUnavailableError):
        await sink.write_events([event(1)])


async def test_a_session_that_began_read_only_is_not_asked_to_write_for_ever(
    sink: PostgresEventSink, database_url: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        with pytest.raises(DatabaseUnavailableError):
            await sink.write_events([event(1)])
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await sink.write_events([event(1)])
    assert [row[0] for row in stored(database_url)] == [str(UUID(int=1))]
