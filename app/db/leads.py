"""Reads leads as columns: one statement for a batch, and the same cells in pages for whoever reads them all.

The relation is whatever `LEAD_SOURCE` names: it has `lead_id uuid`, perhaps `external_ref`, and the
columns a model asks for. A row whose `lead_id` is NULL is no lead, whoever reads. Nothing here writes, or
knows what a feature is. Used by the predictor through `LeadSource`, and by training; bulk scoring reads the
same cells by `app.db.lead_pages`.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import psycopg
import structlog
from psycopg import sql
from psycopg.pq.abc import PGresult

from app.ai.domain import (
    AMBIGUOUS_LEAD,
    UNKNOWN_LEAD,
    ColumnKind,
    FetchedLeads,
    InputColumn,
    IntArray,
    UsePart,
    canonical_lead_id,
    is_uuid,
    split_uuids,
)
from app.db.array_parameters import UUID_BYTES, join_uuids, pack_texts, pack_uuids
from app.db.command_connection import open_reader
from app.db.engine import Connection, Database
from app.db.lead_cells import (
    COLUMN_TYPES,
    CREATED_AT,
    EXTERNAL_REF,
    LEAD_ID,
    PART_LEADS,
    ColumnTypes,
    LeadChunk,
    Rows,
    batch_statement,
    column_kinds,
    decode_batch,
    decode_rows,
    each_lead_statement,
    has_references,
    quoted_relation,
    recent_statement,
    refs_to_ask,
    split_texts,
    wrong_columns,
)
from app.db.session import row_values
from app.errors import CommandError, PredictionFailedError

_FEW_LEADS = 8
"""Up to so many leads come as a row each: to put the cells of one together takes half the server's time."""

SCHEMA_LOOK_SECONDS = 60.0
"""So often the relation is looked at again by whoever reads it: the CRM may have given it more columns."""

_OF_THE_RELATION = ("42", "0A")
"""Classes of SQLSTATE after which it is looked at again: it may have other columns now, or other types."""

_Key = TypeVar("_Key", bound=Hashable)

_log = structlog.get_logger()


class PostgresLeadSource:
    """Implements `LeadSource` over one relation."""

    def __init__(
        self, database: Database, relation: str, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """`relation` is a table or view, optionally with its schema (`crm.leads`)."""
        self._database = database
        self._relation = relation
        self._monotonic = monotonic
        self._types: ColumnTypes = {}
        self._stale = True
        self._look_again = 0.0
        self._looking = asyncio.Lock()
        self._statements: dict[tuple[object, ...], str] = {}
        self._under_way = 0

    def source_columns(self) -> Mapping[str, ColumnKind]:
        """Returns the columns features can read, by name, as last seen; empty when never seen."""
        return column_kinds(self._types)

    async def fetch_schema(self) -> Mapping[str, ColumnKind]:
        """Looks at the relation again, and returns `source_columns`.

        Raises:
            DatabaseUnavailableError: no answer within the deadline.
            PredictionFailedError: there is no such relation, it has no `lead_id uuid`, or may not be seen.
        """

        async def look(connection: Connection) -> ColumnTypes:
            cursor = await connection.execute(COLUMN_TYPES, [quoted_relation(self._relation)])
            return dict(await cursor.fetchall())

        try:
            types = await self._database.run(look)
        except psycopg.Error as exc:  # its schema may not be used, for one
            raise self._failure("the relation cannot be looked at", exc) from exc
        if types.get(LEAD_ID) != "uuid":
            raise self._failure("the relation is missing or has no lead_id of type uuid")
        if types != self._types:
            self._types, self._statements = types, {}
        self._stale, self._look_again = False, self._monotonic() + SCHEMA_LOOK_SECONDS
        return column_kinds(types)

    async def fetch(self, lead_ids: Sequence[str], columns: Sequence[InputColumn], use_part: UsePart) -> None:
        """Reads the named columns of these leads in one statement, and hands them to `use_part` as they come.

        `lead_ids` are canonical and distinct. An ID that more than one row carries is ambiguous.

        Raises:
            DatabaseUnavailableError: no answer within the deadline.
            PredictionFailedError: the relation no longer has a column, or it has another type.
        """
        now = self._monotonic()
        if not self._stale and now < self._look_again:
            await self._fetch(lead_ids, tuple(columns), use_part)
            return
        async with self._database.one_deadline():
            if self._stale:
                async with self._looking:
                    if self._stale:  # else it was looked at while this one waited
                        await self.fetch_schema()
            else:
                self._look_again = now + SCHEMA_LOOK_SECONDS  # who comes meanwhile goes by what is known
                await self.fetch_schema()
            await self._fetch(lead_ids, tuple(columns), use_part)

    async def _fetch(
        self, lead_ids: Sequence[str], columns: tuple[InputColumn, ...], use_part: UsePart
    ) -> None:
        uuids, others = split_uuids(lead_ids)
        refs = refs_to_ask(self._types, others) if has_references(self._types) else []
        if not uuids and not refs:
            use_part(0, _understand_rows(lead_ids, columns, [], with_refs=False))
            return
        rows = self._choose_rows(len(lead_ids), one_kind=not uuids or not others)
        statement = self._statement(columns, by_id=bool(uuids), by_ref=bool(refs), rows=rows)
        asked = join_uuids(uuids)
        parameters = ([pack_uuids(asked)] if uuids else []) + ([pack_texts(refs)] if refs else [])

        def use_row(row: PGresult) -> None:
            place, *values = row_values(row, 0)
            first = int.from_bytes(place or b"")
            part = slice(first, first + PART_LEADS)
            of_part = asked[first * UUID_BYTES : part.stop * UUID_BYTES]
            use_part(first, _understand(lead_ids[part], columns, values, of_part))

        self._under_way += 1
        try:
            result = await self._database.query(statement, parameters, use_row if rows == "parts" else None)
        except psycopg.Error as exc:
            # A value that cannot be read, say, tells nothing of the relation.
            self._stale = self._stale or (exc.sqlstate or "").startswith(_OF_THE_RELATION)
            raise self._failure("the statement failed", exc) from exc
        finally:
            self._under_way -= 1
        if rows == "leads":
            found = [row_values(result, row) for row in range(result.ntuples)]
            use_part(0, _understand_rows(lead_ids, columns, found, with_refs=bool(refs)))
        elif rows == "one":
            use_part(0, _understand(lead_ids, columns, row_values(result, 0), asked))

    def _choose_rows(self, leads: int, *, one_kind: bool) -> Rows:
        """Returns how a batch is read; only IDs of one kind can be counted off in parts."""
        if leads <= _FEW_LEADS:
            return "leads"
        # Parts keep the processor busy while the database reads on; where others are read, they do that.
        return "parts" if leads > PART_LEADS and one_kind and not self._under_way else "one"

    async def fetch_recent(self, leads: int) -> list[str]:
        """Returns the IDs of the newest leads, newest first: for each its UUID, then its reference if any.

        Without a column `created_at` no lead is newer than another, and none is returned.

        Raises:
            DatabaseUnavailableError: no answer within the deadline.
            PredictionFailedError: the relation cannot be read.
        """
        if not self._types:
            await self.fetch_schema()
        if CREATED_AT not in self._types:
            _log.warning("no_recent_leads", relation=self._relation, reason="it has no created_at")
            return []
        statement = recent_statement(self._relation, self._types, leads)

        async def read(connection: Connection) -> Any:
            return await (await connection.execute(statement)).fetchall()

        try:
            rows = await self._database.run(read)
        except psycopg.Error as exc:
            raise self._failure("the newest leads cannot be read", exc) from exc
        return list(dict.fromkeys(canonical_lead_id(value) for row in rows for value in row if value))

    def _statement(self, columns: tuple[InputColumn, ...], *, by_id: bool, by_ref: bool, rows: Rows) -> str:
        key = (columns, by_id, by_ref, rows)
        statement = self._statements.get(key)
        if statement is None:
            wrong = wrong_columns(self._types, columns)
            if wrong:
                self._stale = True  # looked at again next time: the relation may have been mended
                raise self._failure(f"columns are missing or have another type: {', '.join(wrong)}")
            statement = self._statements[key] = batch_statement(
                self._relation, self._types, columns, by_id=by_id, by_ref=by_ref, rows=rows
            )
        return statement

    def _failure(self, reason: str, cause: psycopg.Error | None = None) -> PredictionFailedError:
        # Names of columns and the SQLSTATE are safe to log; what the driver says may quote a value.
        sqlstate = None if cause is None else cause.sqlstate
        _log.error("lead_source_failed", relation=self._relation, reason=reason, sqlstate=sqlstate)
        return PredictionFailedError()


def fetch_columns(url: str, relation: str) -> Mapping[str, ColumnKind]:
    """Returns the columns features can read, by name, in the order of the relation.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
        CommandError: there is no such relation, it has no `lead_id uuid`, or cannot or may not be read.
    """
    with open_reader(url, relation) as connection:
        return column_kinds(fetch_types(connection, relation))


def is_same_relation(url: str, relation: str, other: str) -> bool:
    """Tells whether both names, spelled as they may be, stand for the same table or view of this database.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
    """
    with open_reader(url, relation) as connection:
        names = [quoted_relation(relation), quoted_relation(other)]
        row = connection.execute("SELECT to_regclass(%s) = to_regclass(%s)", names).fetchone()
    return row == (True,)


def count_leads(url: str, relation: str) -> int:
    """Returns how many leads a relation has whose columns are known.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
        CommandError: it cannot or may not be read.
    """
    with open_reader(url, relation) as connection:
        statement = sql.SQL("SELECT count(lead_id) FROM {}").format(sql.SQL(quoted_relation(relation)))
        row = connection.execute(statement).fetchone()
    return row[0] if row else 0


def fetch_all_chunks(
    url: str, relation: str, columns: Sequence[InputColumn], *, chunk_rows: int = 20_000
) -> Iterator[LeadChunk]:
    """Yields every lead of the relation, from one snapshot, in the order of `lead_id`.

    There is no deadline: reading everything takes as long as it takes.

    Raises:
        DatabaseUnavailableError: the connection failed.
        CommandError: the relation is not there, lacks one of the columns, or cannot be read.
    """
    with open_reader(url, relation) as connection:
        types = fetch_types(connection, relation)
        require_columns(relation, types, columns)
        # The same session settings as serving, and a plan for reading all of it, not the first rows.
        connection.execute(
            "SET LOCAL TimeZone = 'UTC'; SET LOCAL jit = off; SET LOCAL cursor_tuple_fraction = 1"
        )
        with connection.cursor("leads", binary=True) as cursor:
            cursor.execute(each_lead_statement(relation, types, columns))
            while rows := cursor.fetchmany(chunk_rows):
                yield decode_rows(rows, columns, with_refs=EXTERNAL_REF in types)


def fetch_types(connection: psycopg.Connection[Any], relation: str) -> ColumnTypes:
    """Returns the columns of the relation and their types.

    Raises:
        CommandError: there is no such relation, or it has no `lead_id uuid`.
    """
    types: ColumnTypes = dict(connection.execute(COLUMN_TYPES, [quoted_relation(relation)]).fetchall())
    if types.get(LEAD_ID) != "uuid":
        raise CommandError(f"there is no table or view {relation} with a lead_id of type uuid")
    return types


def require_columns(relation: str, types: ColumnTypes, columns: Sequence[InputColumn]) -> None:
    """Checks that the relation has these columns.

    Raises:
        CommandError: it lacks some; their names are told.
    """
    wrong = wrong_columns(types, columns)
    if wrong:
        raise CommandError(f"{relation} lacks columns, or has them with another type: {', '.join(wrong)}")


def _understand(
    lead_ids: Sequence[str], columns: Sequence[InputColumn], values: Sequence[bytes | None], asked: bytes
) -> FetchedLeads:
    """Decodes one row of many leads: those found of these IDs, of which `asked` are the joined UUIDs."""
    ids, found_refs, *cells = values
    found = ids or b""
    leads = decode_batch(columns, cells, len(found) // UUID_BYTES)
    if len(asked) == len(lead_ids) * UUID_BYTES:
        return FetchedLeads(_match_uuids(asked, found), lead_ids, leads)
    refs = [] if found_refs is None else split_texts(found_refs)
    row_of, uuid_of = _match_names(lead_ids, _name_leads(found), refs)
    return FetchedLeads(row_of, uuid_of, leads)


def _understand_rows(
    lead_ids: Sequence[str], columns: Sequence[InputColumn], rows: Sequence[Any], *, with_refs: bool
) -> FetchedLeads:
    """Decodes rows of one lead each: those found of these IDs."""
    if not rows:
        nothing = decode_batch(columns, [None] * len(columns), 0)
        return FetchedLeads(_look_up(lead_ids, {}), lead_ids, nothing)
    chunk = decode_rows(rows, columns, with_refs=with_refs)
    row_of, uuid_of = _match_names(lead_ids, chunk.lead_ids, chunk.external_refs)
    return FetchedLeads(row_of, uuid_of, chunk.leads)


def _match_names(
    lead_ids: Sequence[str], uuids: Sequence[str], refs: Sequence[bytes | None]
) -> tuple[IntArray, Sequence[str]]:
    """Returns the row of each lead asked, and its UUID, or what it was asked by if it is not there.

    `uuids` and, unless nobody asked by one, `refs` are those of the rows found.
    """
    rows = _rows(uuids)
    row_of = _look_up(lead_ids, _rows_by_ref(refs) | rows if refs else rows)
    named = zip(lead_ids, row_of.tolist(), strict=True)
    return row_of, [lead_id if row < 0 else uuids[row] for lead_id, row in named]


def _match_uuids(asked: bytes, found: bytes) -> IntArray:
    """Returns the row of each UUID asked among those found, both joined."""
    if min(len(asked), len(found)) > _FEW_LEADS * UUID_BYTES:
        wanted, there = (np.frombuffer(ids, np.uint64).reshape(-1, 2) for ids in (asked, found))
        order = there[:, 1].argsort()
        halves = there[order, 1]  # the random ones of most UUIDs, so mostly distinct
        if (halves[1:] != halves[:-1]).all():
            rows = order[np.minimum(halves.searchsorted(wanted[:, 1]), len(order) - 1)]
            return np.where((there[rows] == wanted).all(axis=1), rows, UNKNOWN_LEAD)
    return _look_up(_split_uuids(asked), _rows(_split_uuids(found)))


def _split_uuids(ids: bytes) -> list[bytes]:
    return [ids[at : at + UUID_BYTES] for at in range(0, len(ids), UUID_BYTES)]


def _name_leads(ids: bytes) -> list[str]:
    # Cut by hand: 2,000 objects of the class UUID took 3 ms of every batch.
    digits = map(bytes.hex, _split_uuids(ids))
    return [f"{hex_[:8]}-{hex_[8:12]}-{hex_[12:16]}-{hex_[16:20]}-{hex_[20:]}" for hex_ in digits]


def _rows(keys: Sequence[_Key]) -> dict[_Key, int]:
    rows = {key: row for row, key in enumerate(keys)}
    if len(rows) < len(keys):
        rows |= {key: AMBIGUOUS_LEAD for key, count in Counter(keys).items() if count > 1}
    return rows


def _rows_by_ref(refs: Sequence[bytes | None]) -> dict[str, int]:
    # A UUID is never understood as a reference, whatever a CRM has for references.
    named = {ref.decode(): row for ref, row in _rows(refs).items() if ref is not None}
    return {ref: row for ref, row in named.items() if not is_uuid(ref)}


def _look_up(keys: Sequence[_Key], row_of: Mapping[_Key, int]) -> IntArray:
    return np.fromiter(map(row_of.get, keys, repeat(UNKNOWN_LEAD)), np.int64, len(keys))
