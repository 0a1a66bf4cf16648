"""Bulk writing: rows into a table through COPY.

Knows nothing of what it writes, and blocks: never used in the request path. Called by `csv_import`,
`demo_crm` and `demo_rows`.
"""

from collections.abc import Mapping, Sequence

import psycopg
from psycopg import sql

_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})

CopyColumn = Sequence[str | None]


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
