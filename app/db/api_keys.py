"""The table of API keys: what the commands do to it, and how a worker reads it.

A key itself is never written, only its keyed hash; a revoked one keeps its row. Called by `app.cli`, and by
the key table of a worker, with a database room of its own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg.rows import class_row

from app.db.command_connection import open_connection
from app.db.engine import Connection, Database
from app.errors import CommandError, DatabaseUnavailableError
from app.security.access import Client, Scope
from app.security.api_keys import ApiKey, digest_key, generate_key

MAX_LIVE_KEYS = 2
"""Of one client: the one it uses, and the one it is moving to."""

_is_client_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}").fullmatch


@dataclass(frozen=True, slots=True)
class KeyRow:
    """What may be shown of a key."""

    id: str
    client: str
    scopes: list[str]
    created_at: datetime
    revoked_at: datetime | None


def create_key(url: str, client: str, scopes: Sequence[Scope], pepper: bytes) -> str:
    """Returns a new key of this client; nobody can ever show it again.

    Raises:
        CommandError: the name is none, or the client has `MAX_LIVE_KEYS` already.
        DatabaseUnavailableError: the database cannot be reached.
    """
    if not _is_client_name(client):
        raise CommandError(
            "a client's name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit"
        )
    key = generate_key()
    with open_connection(url, needs="SELECT, INSERT and UPDATE on api_keys") as connection:
        connection.execute("LOCK TABLE api_keys IN SHARE ROW EXCLUSIVE MODE")
        live = connection.execute(
            "SELECT id FROM api_keys WHERE client = %s AND revoked_at IS NULL ORDER BY created_at", [client]
        ).fetchall()
        if len(live) >= MAX_LIVE_KEYS:
            oldest = live[0][0]
            raise CommandError(
                f"{client} has {len(live)} keys already: `leadscore keys revoke {oldest}` first"
            )
        connection.execute(
            "INSERT INTO api_keys (id, client, scopes, digest) VALUES (%s, %s, %s, %s)",
            [key.partition(".")[0], client, sorted(set(scopes)), digest_key(pepper, key)],
        )
    return key


def list_keys(url: str) -> list[KeyRow]:
    """Returns every key there is or was, by client and age.

    Raises:
        CommandError, DatabaseUnavailableError: see `create_key`.
    """
    with (
        open_connection(url, needs="SELECT on api_keys") as connection,
        connection.cursor(row_factory=class_row(KeyRow)) as cursor,
    ):
        cursor.execute("SELECT id, client, scopes, created_at, revoked_at FROM api_keys ORDER BY 2, 4")
        return cursor.fetchall()


def revoke_key(url: str, key_id: str) -> None:
    """Ends a key; workers refuse it within five seconds. One that is revoked already stays as it is.

    Raises:
        CommandError: there is no such key.
        DatabaseUnavailableError: the database cannot be reached.
    """
    with open_connection(url, needs="SELECT and UPDATE on api_keys") as connection:
        found = connection.execute(
            "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = %s", [key_id]
        )
        if found.rowcount == 0:
            raise CommandError("there is no key with this ID; `leadscore keys list` shows them")


class PostgresApiKeys:
    """Implements `ApiKeySource`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def fetch_keys(self) -> list[ApiKey]:
        """Returns every key that is not revoked.

        Raises:
            DatabaseUnavailableError: no answer within the deadline, or no such table that we may read.
        """

        async def select(connection: Connection) -> list[tuple[str, str, list[str], bytes]]:
            statement = "SELECT id, client, scopes, digest FROM api_keys WHERE revoked_at IS NULL"
            cursor = await connection.execute(statement, prepare=True)
            return await cursor.fetchall()

        try:
            rows = await self._database.run(select)
        except psycopg.Error as exc:
            raise DatabaseUnavailableError from exc
        return [
            ApiKey(id_, Client(client, frozenset(scopes)), digest) for id_, client, scopes, digest in rows
        ]
