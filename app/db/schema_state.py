"""How far a database is along the migrations of this checkout; nothing here applies one.

Apart from `app.db.migrations` because every start asks, and the library that migrates takes longer to import
than most starts have work for. Called by `app.serve` and the tests.
"""

from pathlib import Path
from typing import Literal

import psycopg

from app.errors import DatabaseUnavailableError, MissingRightError

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
        with psycopg.connect(url, connect_timeout=CONNECT_SECONDS) as connection:
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


def known_revisions() -> list[str]:
    """Returns the revisions of this checkout, oldest first: the numbers their files begin with."""
    return sorted(file.name.partition("_")[0] for file in (REVISIONS / "versions").glob("[0-9]*.py"))


def _applied_revision(connection: psycopg.Connection) -> str | None:
    if connection.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,):
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])
