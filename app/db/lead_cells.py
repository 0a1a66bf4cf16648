"""How a lead's cell is asked for and decoded: the SQL of one batch, of one page, and the arrays they become.

Every cell is computed by the one expression `_cell` gives, whoever reads it, so training rows equal serving
rows bit for bit. A number travels as the eight bytes of its float64 and a text as UTF-8, each with a mark for
NULL that no value can have, which they keep: decoding a batch is one call of NumPy for all numbers, and texts
stay as they are, whatever the number of leads. Nothing here talks to a database.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple
from uuid import UUID

import numpy as np
from psycopg import sql

from app.ai.column_blocks import NULL_NUMBER, NULL_TEXT, ColumnBlocks
from app.ai.domain import ColumnKind, InputColumn, LeadColumns

LEAD_ID, EXTERNAL_REF, CREATED_AT = "lead_id", "external_ref", "created_at"

Rows = Literal["leads", "one", "parts"]
"""What a row of a batch is: a lead, all of them, or a part of them, after the place of its first ID."""

PART_LEADS = 250

ColumnTypes = Mapping[str, str]
"""The names of a relation's columns and of their PostgreSQL types.

`enum` for any enumeration, `decimal` for a numeric that is declared with digits a float8 has room for.
"""

COLUMN_TYPES = """
    -- A domain may be over another one; only one of them declares the digits of a numeric.
    WITH RECURSIVE base (attnum, attname, type, modifier) AS (
        SELECT attnum, attname, atttypid, atttypmod FROM pg_attribute
        WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
        UNION ALL
        SELECT attnum, attname, t.typbasetype, greatest(modifier, t.typtypmod)
        FROM base JOIN pg_type t ON t.oid = base.type WHERE t.typtype = 'd'
    )
    SELECT base.attname, CASE
        WHEN t.typtype = 'e' THEN 'enum'
        WHEN t.typname = 'numeric' AND declared.digits <= 300 AND declared.scale <= 300 THEN 'decimal'
        ELSE t.typname END
    FROM base JOIN pg_type t ON t.oid = base.type
    -- The modifier of a numeric is its digits, shifted by 16 bits, and its scale, and 4 more.
    CROSS JOIN LATERAL (SELECT nullif(base.modifier, -1) - 4 AS packed) AS modifier
    CROSS JOIN LATERAL (SELECT packed >> 16 AS digits, packed & 2047 AS scale) AS declared
    WHERE t.typtype <> 'd' ORDER BY base.attnum
"""
"""The statement that reads `ColumnTypes`; its parameter is `quoted_relation`."""

_KINDS: Mapping[ColumnKind, tuple[str, ...]] = {
    "number": ("int2", "int4", "int8", "float4", "float8", "decimal", "numeric"),
    "boolean": ("bool",),
    "timestamp": ("timestamptz", "timestamp", "date"),
    "text": ("text", "varchar", "bpchar", "name", "citext", "enum"),
}
_KIND_OF_TYPE = {name: kind for kind, names in _KINDS.items() for name in names}

# So that an index on references is used. No text can be sure to be of another type, such as an enumeration.
_WHOLE, _DECIMAL = ("int2", "int4", "int8"), ("decimal", "numeric")
_REF_CONDITION: Mapping[str, str] = {
    **dict.fromkeys(("text", "varchar", "name"), "external_ref = ANY({}::text[])"),
    "bpchar": "external_ref = ANY({}::text[]::bpchar[])",
    **dict.fromkeys(_WHOLE, "external_ref = ANY({}::text[]::int8[])"),
    **dict.fromkeys(_DECIMAL, "external_ref = ANY({}::text[]::numeric[])"),
}
_is_number = re.compile(r"[0-9]+(\.[0-9]+)?").fullmatch

# E: databases and roles may say that a backslash in a text is always an escape, as it was long ago.
_NULL_NUMBER_SQL = sql.SQL(rf"E'\\x{int(NULL_NUMBER):016x}'::bytea")
_NULL_TEXT_SQL = sql.SQL(rf"E'\\x{NULL_TEXT.hex()}'::bytea")
# A character that a PostgreSQL text never has.
_SEPARATOR_SQL, _SEPARATOR = sql.SQL(r"E'\\x00'::bytea"), b"\0"


class LeadChunk(NamedTuple):
    """Leads that came as a row each; `external_refs` are UTF-8, None for NULL, and none where not read."""

    lead_ids: list[str]
    external_refs: Sequence[bytes | None]
    leads: LeadColumns


def column_kinds(types: ColumnTypes) -> dict[str, ColumnKind]:
    """Returns the columns that can be read as one of the four kinds, in the order of the relation."""
    return {name: _KIND_OF_TYPE[type_name] for name, type_name in types.items() if type_name in _KIND_OF_TYPE}


def wrong_columns(types: ColumnTypes, columns: Sequence[InputColumn]) -> list[str]:
    """Returns the names of the columns that are missing or of another kind."""
    kinds = column_kinds(types)
    return [column.name for column in columns if kinds.get(column.name) != column.kind]


def has_references(types: ColumnTypes) -> bool:
    """Tells whether the relation has references to ask by; a UUID is never understood as one."""
    return types.get(EXTERNAL_REF, "uuid") != "uuid"


def refs_to_ask(types: ColumnTypes, refs: Sequence[str]) -> Sequence[str | None]:
    """Returns what to ask for these references by, None for what no reference of this type can be."""
    if types[EXTERNAL_REF] in _WHOLE:
        return [ref if ref.isdecimal() and _is_number(ref) and int(ref) < 1 << 63 else None for ref in refs]
    if types[EXTERNAL_REF] in _DECIMAL:
        return [ref if _is_number(ref) else None for ref in refs]
    return refs


def quoted_relation(relation: str) -> str:
    """Returns a table or view name, perhaps with its schema, as SQL reads it."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in relation.split("."))


def batch_statement(
    relation: str,
    types: ColumnTypes,
    columns: Sequence[InputColumn],
    *,
    by_id: bool,
    by_ref: bool,
    rows: Rows,
) -> str:
    """Returns the statement for a batch.

    A row of many leads has lead IDs, references or NULL, then one value for each column; a row that is one
    lead is as in `each_lead_statement`, with a reference if it asks by them. Its parameters are, numbered in
    this order, lead IDs (`uuid[]`) if it asks by them and references (`text[]`, see `refs_to_ask`) if it asks
    by them; it asks by one of them at least, and for `parts` by one of them only.
    """
    conditions = []
    if by_id:
        conditions.append("lead_id = ANY({}::uuid[])")
    if by_ref:
        conditions.append(_REF_CONDITION.get(types[EXTERNAL_REF], "external_ref::text = ANY({}::text[])"))
    matches = " OR ".join(
        condition.format(_asked(number, rows)) for number, condition in enumerate(conditions, 1)
    )
    of_rows = _of_each_lead if rows == "leads" else _of_all_leads
    composed = sql.SQL("SELECT {} FROM {} WHERE {}").format(
        of_rows(types, columns, with_refs=by_ref),
        sql.Identifier(*relation.split(".")),
        # A row without an ID is no lead, and only a reference would find it.
        sql.SQL(f"lead_id IS NOT NULL AND ({matches})" if by_ref else matches),
    )
    if rows == "parts":
        composed = sql.SQL(
            "SELECT lead_scoring_parts.first - 1, part.* FROM generate_series(1, cardinality($1::{}), {})"
            " AS lead_scoring_parts(first) CROSS JOIN LATERAL ({}) AS part"
        ).format(sql.SQL("uuid[]" if by_id else "text[]"), sql.Literal(PART_LEADS), composed)
    return composed.as_string(None)


def _asked(number: int, rows: Rows) -> str:
    """Returns a parameter, or of `parts` what a part has of it."""
    if rows != "parts":
        return f"${number}"
    first = "lead_scoring_parts.first"  # named as no relation is, whose columns would be meant otherwise
    return f"(${number})[{first} : {first} + {PART_LEADS - 1}]"


def each_lead_statement(relation: str, types: ColumnTypes, columns: Sequence[InputColumn]) -> sql.Composed:
    """Returns the statement with two values a lead: its numbers, and its texts, ID and reference first."""
    return sql.SQL("SELECT {} FROM {} WHERE lead_id IS NOT NULL ORDER BY lead_id").format(
        _of_each_lead(types, columns, with_refs=EXTERNAL_REF in types), sql.Identifier(*relation.split("."))
    )


def page_statement(
    relation: str, types: ColumnTypes, columns: Sequence[InputColumn], *, after: UUID | None, leads: int
) -> sql.Composed:
    """Returns the statement whose one row is, for the next `leads` by ID, what `batch_statement` gives.

    They come `after` the last ID of the page before, or are the first ones. Rows that share an ID are never
    on two pages, so there may be a few more. It has no parameters: the driver would take a percent sign in a
    name for one, and so its plan is for this page and no other.
    """
    return sql.SQL(
        "SELECT {} FROM (SELECT * FROM {} WHERE lead_id {} ORDER BY lead_id FETCH FIRST {} ROWS WITH TIES)"
        " AS page"
    ).format(
        _of_all_leads(types, columns, with_refs=EXTERNAL_REF in types),
        sql.Identifier(*relation.split(".")),
        sql.SQL("IS NOT NULL") if after is None else sql.SQL("> {}").format(sql.Literal(after)),
        sql.Literal(leads),
    )


def recent_statement(relation: str, types: ColumnTypes, leads: int) -> sql.Composed:
    """Returns the statement whose rows are the ID and perhaps the reference of the newest leads, as text.

    It names their number: a plan for any number would expect a tenth of all leads, and sort them.
    """
    refs = ", external_ref::text" if has_references(types) else ""
    return sql.SQL(
        f"SELECT lead_id::text{refs} FROM {{}}"  # noqa: S608  names of our own
        " WHERE created_at IS NOT NULL AND lead_id IS NOT NULL ORDER BY created_at DESC LIMIT {}"
    ).format(sql.Identifier(*relation.split(".")), sql.Literal(leads))


def _of_each_lead(types: ColumnTypes, columns: Sequence[InputColumn], *, with_refs: bool) -> sql.Composed:
    """Returns the two values of a row that is one lead: its numbers, and ID, perhaps reference, and texts."""
    numbers: list[sql.Composable] = [_cell(column, types) for column in columns if column.kind != "text"]
    texts: list[sql.Composable] = [sql.SQL("convert_to(lead_id::text, 'UTF8')")]
    if with_refs:
        texts.append(_cell(InputColumn(EXTERNAL_REF, "text"), types))
    texts += [_cell(column, types) for column in columns if column.kind == "text"]
    return sql.SQL("{}, {}").format(
        sql.SQL(" || ").join(numbers or [sql.SQL("''::bytea")]),
        sql.SQL(r" || E'\\x00'::bytea || ").join(texts),
    )


def _of_all_leads(types: ColumnTypes, columns: Sequence[InputColumn], *, with_refs: bool) -> sql.Composed:
    """Returns the values of a row of many leads: their IDs, references or NULL, then those of each column."""

    def together(cell: sql.Composable, separator: sql.SQL) -> sql.Composable:
        return sql.SQL("string_agg({}, {})").format(cell, separator)

    def of_column(column: InputColumn) -> sql.Composable:
        return together(_cell(column, types), _SEPARATOR_SQL if column.kind == "text" else sql.SQL("''"))

    ids = together(sql.SQL("uuid_send(lead_id)"), sql.SQL("''"))
    refs = of_column(InputColumn(EXTERNAL_REF, "text")) if with_refs else sql.SQL("NULL")
    return sql.SQL(", ").join([ids, refs, *map(of_column, columns)])


def _cell(column: InputColumn, types: ColumnTypes) -> sql.Composed:
    """Returns the expression of one cell, of type bytea and never NULL."""
    name = sql.Identifier(column.name)
    if column.kind == "text":
        return sql.SQL("coalesce(convert_to({}::text, 'UTF8'), {})").format(name, _NULL_TEXT_SQL)
    if column.kind == "boolean":
        number = sql.SQL("{}::int::float8").format(name)
    elif types[column.name] == "date":
        number = sql.SQL("extract(epoch FROM {})::float8").format(name)
    elif column.kind == "timestamp":
        # The same number without the way round by a numeric; but there are dates it cannot name.
        number = sql.SQL("date_part('epoch', {})").format(name)
    elif types[column.name] == "numeric":
        # A numeric may be too large or too small for a float8, and the cast would fail the whole batch.
        number = sql.SQL(
            "CASE WHEN abs({0}) > 1e300 THEN sign({0})::float8 * 'Infinity' WHEN abs({0}) < 1e-300 THEN 0"
            " ELSE {0}::float8 END"
        ).format(name)
    else:
        number = sql.SQL("{}::float8").format(name)
    return sql.SQL("coalesce(float8send({}), {})").format(number, _NULL_NUMBER_SQL)


def decode_batch(columns: Sequence[InputColumn], cells: Sequence[bytes | None], n: int) -> LeadColumns:
    """Decodes the values of a row of many leads, one for each column: those of the `n` it found."""
    found = list(zip(columns, cells, strict=True))
    numbers = [(column, cell or b"") for column, cell in found if column.kind != "text"]
    texts = [(column, cell or b"") for column, cell in found if column.kind == "text"]
    bits = np.frombuffer(b"".join([cell for _, cell in numbers]), ">u8").astype(np.uint64)
    blocks = ColumnBlocks(
        tuple([column for column, _ in numbers + texts]),
        bits.view(np.float64).reshape(len(numbers), n),
        _join_texts([cell for _, cell in texts]) if n else b"",
    )
    return LeadColumns(n, blocks)


def split_texts(cells: bytes) -> list[bytes | None]:
    """Returns the texts of one value of a batch row as UTF-8, None for NULL; there is at least one row."""
    return _find_nulls(cells.split(_SEPARATOR))


def _find_nulls(texts: Sequence[bytes]) -> list[bytes | None]:
    return [None if text == NULL_TEXT else text for text in texts]


def _join_texts(texts: Sequence[bytes]) -> bytes:
    """Returns texts that may already be several each, so that every one of them ends with the separator."""
    return _SEPARATOR.join([*texts, b""])


def decode_rows(
    rows: Sequence[Sequence[bytes]], columns: Sequence[InputColumn], *, with_refs: bool
) -> LeadChunk:
    """Decodes one or more rows that are one lead each."""
    inputs = [column for column in columns if column.kind != "text"]
    inputs += [column for column in columns if column.kind == "text"]
    bits = np.frombuffer(b"".join(row[0] for row in rows), ">u8").reshape(len(rows), -1)
    texts = _SEPARATOR.join([row[1] for row in rows]).split(_SEPARATOR)
    width = len(texts) // len(rows)
    numbers = np.ascontiguousarray(bits.T, dtype=np.uint64).view(np.float64)
    by_column = [text for at in range(1 + with_refs, width) for text in texts[at::width]]
    blocks = ColumnBlocks(tuple(inputs), numbers, _join_texts(by_column))
    lead_ids = [lead_id.decode() for lead_id in texts[0::width]]
    refs = _find_nulls(texts[1::width]) if with_refs else []
    return LeadChunk(lead_ids, refs, LeadColumns(len(rows), blocks))
