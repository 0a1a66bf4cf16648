"""Brings a database to the schema this code needs.

The revisions are in `alembic/versions`. All that are missing are applied in one transaction, under an
advisory lock: of two processes that start at the same time, one migrates and the other finds the work done.
Nothing here touches data, and serving never migrates a database it was given. Called by `app.cli`,
`app.serve`, the making of the shipped model and the tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from alembic import command
from alembic.config import Config
from alembic.util import CommandError as AlembicError
from sqlalchemy import Connection, NullPool, create_engine
from sqlalchemy.exc import DBAPIError

from app.db.command_connection import explain_failure
from app.db.conninfo import WITHOUT_TIMEOUTS, complete_address
from app.db.schema_state import CONNECT_SECONDS, REVISIONS
from app.errors import CommandError

_NEEDS = "CREATE on the first schema of its search_path, and to own the tables it made before"
_OWN_SCHEMA = 'a schema of its own, see README.md, "Your own CRM"'
_LOCK = 0x6C656164  # any number, as long as every release uses this one


def upgrade(url: str) -> None:
    """Applies every revision that is not applied yet; does nothing on a database that is current.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
        CommandError: another session held a table for longer than the migration may wait, the database was
            migrated by a newer version of this program or by another program, it has tables of the same names
            as ours, no schema can be used, or a statement failed.
        MissingRightError: the database user may not make or change the tables.
    """
    with _connect(url) as connection:
        # Held by the transaction, so it ends with it, whatever happens to this process.
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        config = _config()
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except AlembicError as exc:
            raise CommandError(
                "the database was migrated by another version of this program; or by another program, beside"
                f" which this one needs {_OWN_SCHEMA}"
            ) from exc


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(REVISIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@contextmanager
def _connect(url: str) -> Iterator[Connection]:
    """Yields one connection in a transaction that commits when the block ends well."""
    engine = create_engine(
        "postgresql+psycopg://",
        poolclass=NullPool,
        # The driver reads the address, as everywhere: SQLAlchemy understands another set of them.
        creator=lambda: psycopg.connect(complete_address(url), connect_timeout=CONNECT_SECONDS),
    )
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(WITHOUT_TIMEOUTS)
            yield connection
    except DBAPIError as exc:
        if isinstance(exc.orig, psycopg.errors.LockNotAvailable):
            raise CommandError(
                "another session keeps a table locked; end it and run `leadscore db upgrade` again"
            ) from exc
        if isinstance(exc.orig, psycopg.errors.DuplicateTable):
            raise CommandError(
                f"there are tables of the same names as the service's; beside them it needs {_OWN_SCHEMA}"
            ) from exc
        if isinstance(exc.orig, psycopg.errors.InvalidSchemaName):
            raise CommandError(
                "the search_path names no schema that is there and that the database user may use"
            ) from exc
        if not isinstance(exc.orig, psycopg.Error):
            raise
        failure = "the migrations cannot be applied"
        raise explain_failure(exc.orig, needs=_NEEDS, failure=failure) from exc
