"""The connection of a command: one transaction, or a relation to read over, and what is said when it fails.

Never used in the request path: it blocks, and it waits as long as it takes. Called by whatever the commands
do to a database, and by what reads a whole relation. What a command says when the database fails it is
decided here (`explain_failure`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from app.db.conninfo import WITHOUT_TIMEOUTS, complete_address
from app.errors import CommandError, DatabaseUnavailableError, LeadScoringError, MissingRightError

# No such database, a user or password it does not know, a connection that broke, a server that shuts down.
# While a connection is being opened the driver tells no SQLSTATE at all.
_UNREACHABLE = ("3D000", "28", "08", "57P")
_UNREACHABLE_TEXT = "the database cannot be reached or does not let the user in; is DATABASE_URL right?"


@contextmanager
def open_connection(
    url: str, *, needs: str, failure: str = "the database refused a statement", autocommit: bool = False
) -> Iterator[psycopg.Connection]:
    """Yields a connection; commits at the end, or rolls back when the body raises.

    `needs` names the rights that the body takes: what the database says of a missing one tells no remedy.
    `failure` is what to say where nothing better is known.

    Raises:
        DatabaseUnavailableError: the server cannot be reached, or went away.
        MissingRightError: the database user lacks one of the rights.
        CommandError: a table of the service's schema is not there yet, or a statement failed.
    """
    try:
        with psycopg.connect(complete_address(url), connect_timeout=10, autocommit=autocommit) as connection:
            connection.execute(WITHOUT_TIMEOUTS)
            connection.execute("SET TIME ZONE 'UTC'")
            yield connection
    except psycopg.errors.UndefinedTable as exc:
        raise CommandError("a table is missing in the database: run `leadscore db upgrade` first") from exc
    except psycopg.Error as exc:
        raise explain_failure(exc, needs=needs, failure=failure) from exc


@contextmanager
def open_reader(url: str, relation: str, *, autocommit: bool = False) -> Iterator[psycopg.Connection]:
    """Yields a connection to read this relation over; see `open_connection`."""
    needs = f"SELECT on {relation}, and USAGE on its schema"
    with open_connection(
        url, needs=needs, failure=f"{relation} cannot be read", autocommit=autocommit
    ) as connection:
        yield connection


def explain_failure(exc: psycopg.Error, *, needs: str, failure: str) -> LeadScoringError:
    """Returns what a command ends with, by SQLSTATE alone: what the server says may quote a value."""
    state = exc.sqlstate or "none"
    away = exc.sqlstate is None and isinstance(exc, psycopg.OperationalError)
    if away or state.startswith(_UNREACHABLE):
        return DatabaseUnavailableError(_UNREACHABLE_TEXT)
    if isinstance(exc, psycopg.errors.InsufficientPrivilege):
        return MissingRightError(needs)
    if isinstance(exc, psycopg.errors.ReadOnlySqlTransaction):
        return CommandError("the database is read-only; is it a standby?")
    if isinstance(exc, psycopg.errors.DiskFull):
        return CommandError("the disk of the database is full")
    if state.startswith("54"):
        failure += ": it has more columns or longer values than PostgreSQL takes, use fewer"
    return CommandError(f"{failure} (SQLSTATE {state})")
