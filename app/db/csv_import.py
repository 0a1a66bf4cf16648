"""Makes any CSV file a lead source: a typed table with `lead_id` and `external_ref`, all or nothing.

The file is read twice: once to check every line and find the types, once to copy. Readers of a table that is
replaced see the old one until the new one is complete. Never touches a table it did not make. Called by
`leadscore import`.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import psycopg
from psycopg import sql

from app.ai.domain import ColumnKind, Progress, canonical_lead_id, is_uuid
from app.db.bulk_copy import CopyColumn, write_rows
from app.db.command_connection import open_connection
from app.db.csv_columns import TO_POSTGRES
from app.db.csv_file import CsvFile, Record, open_csv
from app.db.csv_inspection import Inspection, inspect_csv
from app.db.table_access import write_access
from app.errors import CommandError, ImportFileError

_RELATION = re.compile(r"(?:[a-z_][a-z0-9_]{0,62}\.)?[a-z_][a-z0-9_]{0,52}")
_MARK = "Leads imported from a file by leadscore"
_DRAFT = "__import"  # what the new table is called until it is complete
_BLOCK = 5000

# Longer than the server takes (deadlock_timeout) to end an autovacuum that is in the way.
_LOCK_WAIT = "1.5s"
_LOCK_PAUSE = 0.5

_REASONS: dict[type[psycopg.Error], str] = {
    psycopg.errors.LockNotAvailable: (
        " was not replaced: another session still uses it; try again when it is done"
    ),
    psycopg.errors.UndefinedTable: " was not replaced: it was dropped meanwhile; import it once more",
    psycopg.errors.DuplicateTable: f"{_DRAFT} is in the way: leads are loaded under that name first",
    psycopg.errors.DependentObjectsStillExist: (
        " cannot be replaced: a view or another table depends on it; drop that first"
    ),
    psycopg.errors.InvalidSchemaName: " cannot be made: there is no such schema",
}
"""What to say after the table's name where more is known of a failure than its SQLSTATE."""


@dataclass(frozen=True, slots=True)
class ImportedColumn:
    """A column of the table: the header it comes from, its type, and in how many rows it is missing.

    `hints` say what kept a column of text from being numbers or times.
    """

    name: str
    header: str
    kind: ColumnKind
    missing: int
    hints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What was imported; `unaskable_ids` counts IDs that no scoring request can carry, unlike `lead_id`."""

    table: str
    rows: int
    label: str | None
    unaskable_ids: int
    columns: tuple[ImportedColumn, ...]


def import_csv(
    url: str,
    path: Path,
    *,
    table: str,
    id_column: str,
    label_column: str | None = None,
    positive: str | None = None,
    missing: Sequence[str] = (),
    replace: bool = False,
    patience: float = 15.0,
    progress: Progress = lambda *_: None,
) -> ImportSummary:
    """Loads a CSV file with a header into a new table, in one transaction.

    Args:
        url: the database.
        path: the file, in UTF-8, separated by commas, semicolons, tabs or bars.
        table: what to call the table, in lower case, optionally with its schema.
        id_column: the column that identifies a lead. It becomes `external_ref`; `lead_id` is the same where
            that is a UUID, and otherwise a UUID derived from it and the table's name.
        label_column: the column of the outcome (yes/no, true/false, 1/0 ...); it becomes a boolean.
        positive: the outcome that means yes, where it is another word; beside it there may be one more.
        missing: texts that mean missing, beside the empty one.
        replace: put the new table in the place of one that was imported before, with its owner and its
            grants. Indexes, constraints, triggers and policies that were added to it by hand are not kept.
        patience: seconds after which an old table that others still read is left in its place.
        progress: told the stage, how much is done, and how much there is.

    Raises:
        ImportFileError: the file cannot be imported as it is; the message names the line.
        CommandError: the table's name is taken or cannot be used, the user may not make tables there, or
            others read what is to be replaced.
        DatabaseUnavailableError: the server cannot be reached, or went away.
    """
    if not _RELATION.fullmatch(table):
        raise CommandError("the table needs a name in lower case, such as leads or crm.leads")
    with open_csv(path) as file:
        found = inspect_csv(
            file,
            id_column=id_column,
            label_column=label_column,
            positive=positive,
            missing=missing,
            progress=progress,
        )
        needs = f"CREATE and USAGE on the schema of {table}, and to own a table that is replaced"
        with open_connection(url, needs=needs, failure=f"{table} cannot be made") as connection:
            try:
                _load(
                    connection, table, file, found, patience=patience if replace else None, progress=progress
                )
            except tuple(_REASONS) as exc:
                raise CommandError(table + _REASONS[type(exc)]) from exc
    return _summarise(table, file.header, found)


def _fetch_parts(connection: psycopg.Connection[Any], table: str) -> tuple[str, ...]:
    """Returns the table's schema and name: where it is, or else where tables are made.

    A search path of several schemas finds a table in any of them, and makes every new one in the first.
    """
    *schema, name = table.split(".")
    if not schema:
        statement = (
            "SELECT coalesce((SELECT nspname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace"
            " WHERE pg_class.oid = to_regclass(%s)), current_schema())"
        )
        row = connection.execute(statement, [table]).fetchone()
        schema = [found for found in row or () if found]  # none: to make it there fails, and says why
    return *schema, name


def _refuse_taken(
    connection: psycopg.Connection[Any], table: str, target: sql.Identifier, *, replace: bool
) -> bool:
    """Returns whether there is a table to replace; what is there and must stay is refused."""
    row = connection.execute(
        "SELECT obj_description(oid, 'pg_class'), relrowsecurity FROM pg_class WHERE oid = to_regclass(%s)",
        [target.as_string(connection)],
    ).fetchone()
    if row is None:
        return False
    mark, row_security = row
    if mark != _MARK:
        raise CommandError(f"{table} exists and was not made by an import; choose another name")
    if not replace:
        raise CommandError(f"{table} exists already; --replace puts the new leads in its place")
    if row_security:  # the new table would show every row to all who may read the old one
        raise CommandError(f"{table} cannot be replaced: it has row-level security, which would be lost")
    return True


def _load(
    connection: psycopg.Connection[Any],
    table: str,
    file: CsvFile,
    found: Inspection,
    *,
    patience: float | None,
    progress: Progress,
) -> None:
    """Makes the table under another name and puts it in its place; with `patience` it may replace one."""
    *schema, name = _fetch_parts(connection, table)
    target, draft = sql.Identifier(*schema, name), sql.Identifier(*schema, f"{name}{_DRAFT}")
    types = {"lead_id": "uuid", "external_ref": "text"}
    types |= {found.names[at]: TO_POSTGRES[found.kind(at)][0] for at in _kept(found)}
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(column), sql.SQL(type_name))
        for column, type_name in types.items()
    )
    with connection.cursor() as cursor:
        _refuse_taken(connection, table, target, replace=patience is not None)
        cursor.execute(sql.SQL("CREATE TABLE {} ({})").format(draft, columns))
        # Once more: another import into this table is waited for where both make a draft.
        _refuse_taken(connection, table, target, replace=patience is not None)
        for block in _read_blocks(file, found, table, progress):
            write_rows(cursor, draft, block)
        # Built once the rows are there, and not named: the table being replaced still has its own.
        cursor.execute(sql.SQL("ALTER TABLE {} ADD PRIMARY KEY (lead_id)").format(draft))
        cursor.execute(
            sql.SQL("ALTER TABLE {} ALTER external_ref SET NOT NULL, ADD UNIQUE (external_ref)").format(draft)
        )
        cursor.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(draft, sql.Literal(_MARK)))
        cursor.execute(sql.SQL("ANALYZE {}").format(draft))
        _tell_of_changes(cursor, draft)
        if patience is not None and _refuse_taken(connection, table, target, replace=True):
            _lock(connection, target, patience)
            # What is locked may have taken the name while the rows were loaded; from here on nobody can.
            _refuse_taken(connection, table, target, replace=True)
            write_access(cursor, target, draft)
            cursor.execute(sql.SQL("DROP TABLE {}").format(target))
        try:
            cursor.execute(sql.SQL("ALTER TABLE {} RENAME TO {}").format(draft, sql.Identifier(name)))
        except (psycopg.errors.DuplicateTable, psycopg.errors.UniqueViolation) as exc:
            raise CommandError(f"{table} was made by somebody else meanwhile; nothing was imported") from exc


def _lock(connection: psycopg.Connection[Any], table: sql.Identifier, patience: float) -> None:
    """Keeps everybody else from a table; whoever comes to read it meanwhile waits no longer than one try."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with connection.transaction():  # a savepoint: what was loaded outlives a try
                connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(_LOCK_WAIT)))
                connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(table))
        except psycopg.errors.LockNotAvailable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOCK_PAUSE)
        else:
            return


def _tell_of_changes(cursor: psycopg.Cursor[Any], table: sql.Composable) -> None:
    """Lets services that remember predictions know of this change, and of every later one."""
    cursor.execute("SELECT pg_notify('lead_scoring_changes', '*'), to_regproc('lead_scoring_watch')")
    _, watch = cursor.fetchone() or (None, None)
    if watch is not None:  # the migrations have been here
        cursor.execute("SELECT lead_scoring_watch(%s, 'lead_id')", [table.as_string(cursor)])


def _read_blocks(
    file: CsvFile, found: Inspection, table: str, progress: Progress
) -> Iterator[dict[str, CopyColumn]]:
    """Reads the file for the second time, as columns ready for COPY."""
    records, done = file.records("read again"), 0
    while block := list(islice(records, _BLOCK)):
        yield _build_columns(block, found, table)
        done += len(block)
        progress("load", done, found.rows)
    if done != found.rows:
        raise ImportFileError("the file changed while it was being read; nothing was imported")


def _build_columns(block: Sequence[Record], found: Inspection, table: str) -> dict[str, CopyColumn]:
    by_place = list(zip(*(record.fields for record in block), strict=True))
    ids = by_place[found.id_at]
    columns: dict[str, CopyColumn] = {"lead_id": [_lead_id(table, text) for text in ids], "external_ref": ids}
    for at in _kept(found):
        _, write = TO_POSTGRES[found.kind(at)]
        if at == found.label_at:
            write = found.write_label
        columns[found.names[at]] = [
            None if text in found.placeholders else write(text) for text in by_place[at]
        ]
    return columns


def _kept(found: Inspection) -> list[int]:
    return [at for at in range(len(found.names)) if at != found.id_at]


def _lead_id(table: str, text: str) -> str:
    """Returns the ID's UUID; the table is part of a derived one, so that two files may both number from 1."""
    return (
        canonical_lead_id(text)
        if is_uuid(text)
        else str(uuid5(NAMESPACE_URL, f"lead-scoring:{table}:{text}"))
    )


def _summarise(table: str, header: Sequence[str], found: Inspection) -> ImportSummary:
    columns = tuple(
        ImportedColumn(
            found.names[at],
            header[at],
            found.kind(at),
            found.rows - found.guesses[at].present,
            found.hints[at].tell(found.guesses[at]) if found.kind(at) == "text" else (),
        )
        for at in _kept(found)
    )
    label = None if found.label_at is None else found.names[found.label_at]
    return ImportSummary(table, found.rows, label, found.unaskable_ids, columns)
