"""What a start asks of a database: how far along the migrations it is, and whether there are leads to read.

Nothing here applies a migration. Apart from `app.db.migrations` because every start asks, and the library
that migrates takes longer to import than most starts have work for. Used by `app.serve` and
`app.db.migrations`.
"""

from pathlib import Path
from typing import Literal

import psycopg
from psycopg import sql

from app.db.command_connection import open_reader
from app.db.conninfo import complete_address
from app.errors import CommandError, DatabaseUnavailableError, MissingRightError

SchemaState = Literal["empty", "behind", "current", "unknown"]

REVISIONS = Path(__file__).resolve().parents[2] / "alembic"
CONNECT_SECONDS = 5


def current_state(url: str) -> SchemaState:
    """Compares the database with the revisions of this checkout.

    Returns:
        `empty`: never migrated; `behind`: `leadscore db upgrade` has work to do; `current`; `unknown`:
        migrated by another version of this program.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
        MissingRightError: the database user may not see which migrations were applied.
    """
    try:
        with psycopg.connect(complete_address(url), connect_timeout=CONNECT_SECONDS) as connection:
            applied = _applied_revision(connection)
    except psycopg.errors.InsufficientPrivilege as exc:
        raise MissingRightError("SELECT on alembic_version") from exc
    except psycopg.OperationalError as exc:
        raise DatabaseUnavailableError from exc
    revisions = known_revisions()
    if applied is None:
        return "empty"
    if applied == revisions[-1]:
        return "current"
    return "behind" if applied in revisions else "unknown"


def check_lead_source(url: str, relation: str) -> None:
    """Plans a read of the relation, which is what every request will need; reads nothing.

    Raises:
        CommandError: there is no such relation, it has no `lead_id uuid`, or it cannot or may not be read.
        DatabaseUnavailableError: the database cannot be reached, or somebody keeps the relation locked.
    """
    statement = sql.SQL("SELECT lead_id FROM {} LIMIT 0").format(sql.Identifier(*relation.split(".")))
    with open_reader(url, relation) as connection:
        connection.execute(f"SET LOCAL statement_timeout = '{CONNECT_SECONDS}s'")
        try:
            columns = connection.execute(statement).description
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
            columns = None
        except psycopg.OperationalError as exc:
            raise DatabaseUnavailableError from exc  # a lock, or want of something: a start waits for neither
        if not columns or columns[0].type_code != psycopg.adapters.types["uuid"].oid:
            raise CommandError(f"there is no table or view {relation} with a lead_id of type uuid")


def known_revisions() -> list[str]:
    """Returns the revisions of this checkout, oldest first: the numbers their files begin with."""
    return sorted(file.name.partition("_")[0] for file in (REVISIONS / "versions").glob("[0-9]*.py"))


def _applied_revision(connection: psycopg.Connection) -> str | None:
    if connection.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,):
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])
