"""Where events end up for good: the table `ai_events`.

One statement a group, all or nothing, and harmless to repeat. Nothing here builds or reads an event. Called
by the telemetry shipper, with a database room of its own.
"""

from collections.abc import Sequence

import psycopg

from app.ai.domain import StoredEvent
from app.db.array_parameters import pack_texts
from app.db.engine import Database
from app.errors import DatabaseUnavailableError

# Cast row by row: arrays of what is not text would be made first, and copied, which takes the server longer.
_INSERT = """
    INSERT INTO ai_events (id, action, meta, request_id, created_at)
    SELECT id::uuid, action, meta::jsonb, request_id, created_at::timestamptz
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])
        AS event (id, action, meta, request_id, created_at)
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
        columns: list[Sequence[str | None]] = [
            [event.id for event in events],
            [event.action for event in events],
            [event.meta for event in events],
            [event.request_id for event in events],
            [event.created_at for event in events],
        ]

        try:
            await self._database.query(_INSERT, [pack_texts(column) for column in columns])
        except (psycopg.ProgrammingError, psycopg.InternalError) as exc:
            # The table is missing, not ours to write, or on a standby: that ends, and no event is at fault.
            raise DatabaseUnavailableError from exc
