"""Where events end up for good: the table `ai_events`.

One statement a group, all or nothing, and harmless to repeat. Nothing here builds or reads an event. Called
by the telemetry shipper, with a database room of its own.
"""

from collections.abc import Sequence

import psycopg

from app.ai.domain import StoredEvent
from app.db.engine import Connection, Database
from app.errors import DatabaseUnavailableError

_INSERT = """
    INSERT INTO ai_events (id, action, meta, request_id, created_at)
    SELECT * FROM unnest(
        %b::text[]::uuid[], %b::text[], %b::text[]::jsonb[], %b::text[], %b::text[]::timestamptz[]
    )
    ON CONFLICT (id) DO NOTHING
"""


class PostgresEventSink:
    """Implements `EventSink`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write_events(self, events: Sequence[StoredEvent]) -> None:
        """Writes all of them or none; an event already there is left as it is.

        Writing none tells whether the table could be written.

        Raises:
            DatabaseUnavailableError: no answer within the deadline, or the table is not there yet.
        """
        columns = [
            [event.id for event in events],
            [event.action for event in events],
            [event.meta for event in events],
            [event.request_id for event in events],
            [event.created_at for event in events],
        ]

        async def insert(connection: Connection) -> None:
            await connection.execute(_INSERT, columns, prepare=True)

        try:
            await self._database.run(insert)
        except (psycopg.ProgrammingError, psycopg.InternalError) as exc:
            # The table is missing, not ours to write, or on a standby: that ends, and no event is at fault.
            raise DatabaseUnavailableError from exc
