"""The connection of a command, and bulk writing over it: one transaction, rows through COPY.

Knows nothing of what it writes. Never used in the request path: it blocks, and it waits as long as it takes.
Called by whatever the commands do to a database, and by what reads a whole relation.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psycopg
from psycopg import sql

from app.errors import CommandError, DatabaseUnavailableError, MissingRightError

_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})

CopyColumn = Sequence[str | None]


@contextmanager
def open_connection(url: str, *, needs: str, autocommit: bool = False) -> Iterator[psycopg.Connection]:
    """Yields a connection; commits at the end, or rolls back when the body raises.

    `needs` names the rights that the body takes: what the database says of a missing one tells no remedy.

    Raises:
        DatabaseUnavailableError: the server cannot be reached, or went away.
        MissingRightError: the database user lacks one of the rights.
        CommandError: a table of the service's schema is not there yet.
    """
    try:
        with psycopg.connect(url, connect_timeout=10, autocommit=autocommit) as connection:
            connection.execute("SET TIME ZONE 'UTC'")
            yield connection
    except psycopg.errors.InsufficientPrivilege as exc:
        raise MissingRightError(needs) from exc
    except psycopg.errors.UndefinedTable as exc:
        raise CommandError("a table is missing in the database: run `leadscore db upgrade` first") from exc
    except psycopg.OperationalError as exc:
        raise DatabaseUnavailableError("The database cannot be reached; is DATABASE_URL right?") from exc


def reader_needs(relation: str) -> str:
    """Returns the rights that reading the relation takes, in words."""
    return f"SELECT on {relation}, and USAGE on its schema"


def write_rows(cursor: psycopg.Cursor, table: sql.Identifier, columns: Mapping[str, CopyColumn]) -> None:
    """Appends rows, given as equally long columns of PostgreSQL text values (None for NULL), to the table."""
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        table, sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with cursor.copy(statement) as copy:
        fields = [[r"\N" if value is None else value.translate(_ESCAPES) for value in column]
                  for column in columns.values()]  # fmt: skip
        rows = "\n".join(map("\t".join, zip(*fields, strict=True)))
        if rows:
            copy.write(rows + "\n")
