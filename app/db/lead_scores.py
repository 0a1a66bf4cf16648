"""The table of scores that bulk scoring fills: one row for each lead, the latest word on it.

A page is written by one binary COPY whose rows NumPy lays out: straight into the table where it has nothing
yet among the IDs of the page, otherwise into a stage, from which only what changed goes on. How far the
source is (`lead_score_runs`) is part of the same transaction. Never computes a score. Called by
`app.bulk_scoring`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg.rows import namedtuple_row

from app.ai.domain import VERDICTS, AnswerArray, IntArray, ModelRef
from app.db.lead_cells import quoted_relation
from app.db.lead_pages import LeadPage
from app.errors import CommandError

WRITER_NEEDS = (
    "SELECT, INSERT, UPDATE and DELETE on lead_scores and lead_score_runs, and TEMPORARY on the database"
)
"""The rights a connection of `LeadScoreWriter` takes."""

_LOCK, _LOCK_WAIT = 0x73636F72, "2s"  # any number, as long as every release uses this one

# The order of the fields in a row of COPY: of a fixed size, the same in every row, of varying size.
_COLUMNS = (
    "lead_id", "probability", "raw_score", "coverage",
    "source", "model_version", "model_sha256", "scored_at",
    "verdict", "external_ref",
)  # fmt: skip
_NAMES = ", ".join(_COLUMNS)
_COMPARED = [name for name in _COLUMNS if name not in ("lead_id", "scored_at")]
_RANGE = "(%(after)s::uuid IS NULL OR old.lead_id > %(after)s) AND old.lead_id <= %(last)s"

_STAGE = "CREATE TEMP TABLE stage (LIKE lead_scores) ON COMMIT DELETE ROWS"
_ANY = f"SELECT EXISTS (SELECT FROM lead_scores old WHERE {_RANGE})"  # noqa: S608  names of our own
_DELETE = (
    f"DELETE FROM lead_scores old WHERE {_RANGE} AND old.source = %(source)s"  # noqa: S608
    " AND NOT EXISTS (SELECT FROM stage WHERE stage.lead_id = old.lead_id)"
)
# What did not change is sorted out before the INSERT, because ON CONFLICT would lock, and so write, its row.
_UPSERT = (
    f"INSERT INTO lead_scores ({_NAMES}) SELECT {_NAMES} FROM stage WHERE NOT EXISTS ("  # noqa: S608
    f"SELECT FROM lead_scores old WHERE {_RANGE} AND old.lead_id = stage.lead_id"
    f" AND ({', '.join(f'old.{name}' for name in _COMPARED)})"
    f" IS NOT DISTINCT FROM ({', '.join(f'stage.{name}' for name in _COMPARED)}))"
    f" ON CONFLICT (lead_id) DO UPDATE SET {', '.join(f'{name} = EXCLUDED.{name}' for name in _COLUMNS[1:])}"
)
_FIND_NAME = """
SELECT CASE WHEN pg_table_is_visible(c.oid) THEN c.relname::text ELSE n.nspname || '.' || c.relname END
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s::regclass
"""
_UNFINISHED = (
    "SELECT last_lead_id, leads, scored FROM lead_score_runs WHERE source = %s AND manifest_sha256 = %s"
    " AND as_of = %s AND min_coverage = %s AND finished_at IS NULL"
    # What was read longer ago is stale: all of it is read again.
    " AND started_at > now() - interval '1 hour'"
)
_BEGIN = (
    "INSERT INTO lead_score_runs (source, manifest_sha256, as_of, min_coverage, leads, scored, started_at)"
    " VALUES (%s, %s, %s, %s, 0, 0, now()) ON CONFLICT (source) DO UPDATE SET"
    " manifest_sha256 = EXCLUDED.manifest_sha256, as_of = EXCLUDED.as_of,"
    " min_coverage = EXCLUDED.min_coverage, last_lead_id = NULL, leads = 0, scored = 0,"
    " started_at = EXCLUDED.started_at, finished_at = NULL"
)
_ADVANCE = "UPDATE lead_score_runs SET last_lead_id = %s, leads = %s, scored = %s WHERE source = %s"

_COPY_HEADER, _COPY_END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL's


@dataclass(frozen=True, slots=True)
class RunKey:
    """What a run scores: if any of it is another, scores may be, and the run begins anew."""

    source: str
    model: ModelRef
    as_of: datetime
    min_coverage: float


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run is: `leads` read up to `last_id`, `scored` of them."""

    last_id: UUID | None
    leads: int
    scored: int


class LeadScoreWriter:
    """Writes the pages of one run, one after the other, over one connection in autocommit mode.

    `state` is where the run stands: at its beginning, or where an earlier process left it. `written` and
    `removed` are rows of `lead_scores` this process touched.

    Raises:
        CommandError: another process is writing scores.
    """

    def __init__(self, connection: psycopg.Connection, key: RunKey) -> None:
        self._connection = connection
        connection.prepare_threshold = None  # a plan is made for one page and no other
        _lock(connection)
        connection.execute(_STAGE)
        # Under one name, however it is spelled: what one spelling wrote, the other would never take away.
        [(self._source,)] = connection.execute(_FIND_NAME, [quoted_relation(key.source)]).fetchall()
        names = (self._source, key.model.manifest_sha256, key.as_of, key.min_coverage)
        with connection.cursor(row_factory=namedtuple_row) as cursor:
            row = cursor.execute(_UNFINISHED, names).fetchone()
        if row is None:
            connection.execute(_BEGIN, names)
        self.state = RunState(None, 0, 0) if row is None else RunState(*row)
        self.written = self.removed = 0
        moment = (datetime.now(UTC) - _EPOCH) // timedelta(microseconds=1)
        texts = (self._source, key.model.version, key.model.sha256)
        self._constants = b"".join(_field(text.encode()) for text in texts) + _field(
            struct.pack(">q", moment)
        )

    def write_page(self, page: LeadPage, rows: IntArray, answers: AnswerArray) -> None:
        """Writes the answers (n,) of these rows of a page, and takes away what the table has of the others.

        All of it or nothing, with the state of the run. Other leads between this page and the one before, of
        the same source, are there no longer, and their scores go too.
        """
        state = RunState(page.last_id, self.state.leads + page.leads.n, self.state.scored + len(rows))
        data = _encode(page, rows, answers, self._constants)
        ids = {"after": self.state.last_id, "last": page.last_id, "source": self._source}
        with self._connection.transaction(), self._connection.cursor() as cursor:
            occupied = cursor.execute(_ANY, ids).fetchone() == (True,)
            with cursor.copy(
                f"COPY {'stage' if occupied else 'lead_scores'} ({_NAMES}) FROM STDIN (FORMAT binary)"
            ) as copy:
                copy.write(data)
            written, removed = len(rows), 0
            if occupied:
                removed = cursor.execute(_DELETE, ids).rowcount
                written = cursor.execute(_UPSERT, ids).rowcount
            cursor.execute(_ADVANCE, [state.last_id, state.leads, state.scored, self._source])
        self.state, self.written, self.removed = state, self.written + written, self.removed + removed

    def finish(self) -> None:
        """Takes away the scores of leads after the last one, and marks the run as finished."""
        last, source = self.state.last_id, self._source
        with self._connection.transaction():
            self.removed += self._connection.execute(
                "DELETE FROM lead_scores WHERE source = %s AND (%s::uuid IS NULL OR lead_id > %s)",
                [source, last, last],
            ).rowcount
            self._connection.execute(
                "UPDATE lead_score_runs SET finished_at = now() WHERE source = %s", [source]
            )


def _lock(connection: psycopg.Connection) -> None:
    # Held by the session. The session of a process that was killed may live for a moment, hence the wait.
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'")
            connection.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
    except psycopg.errors.LockNotAvailable as exc:
        raise CommandError(
            "another `leadscore score` is writing to lead_scores: wait for its end, or end it and start again"
        ) from exc


def _encode(page: LeadPage, rows: IntArray, answers: AnswerArray, constants: bytes) -> bytes:
    """Returns the rows as COPY reads them in its binary format."""
    numbers = ("probability", "raw_score", "coverage")
    layout = np.dtype([
        ("fields", ">i2"), ("id_size", ">i4"), ("lead_id", "V16"),
        *((name, [("size", ">i4"), ("value", ">f8")]) for name in numbers),
        ("constants", f"V{len(constants)}"),
    ])  # fmt: skip
    records: NDArray[np.void] = np.empty(len(rows), layout)
    records["fields"], records["id_size"], records["lead_id"] = len(_COLUMNS), 16, page.ids[rows]
    for name in numbers:
        records[name]["size"], records[name]["value"] = 8, answers[name][rows]
    records["constants"] = np.void(constants)
    verdicts = [_field(verdict.encode()) for verdict in VERDICTS]
    pieces: list[bytes] = [b""] * (3 * len(rows))
    pieces[0::3] = records.view(f"V{layout.itemsize}").tolist()
    pieces[1::3] = [verdicts[code] for code in answers["verdict"][rows].tolist()]
    pieces[2::3] = map(_field, _choose(page.external_refs, rows))
    return _COPY_HEADER + b"".join(pieces) + _COPY_END


def _choose(values: Sequence[bytes | None], rows: IntArray) -> Sequence[bytes | None]:
    return values if len(rows) == len(values) else [values[row] for row in rows.tolist()]


def _field(value: bytes | None) -> bytes:
    return b"\xff\xff\xff\xff" if value is None else len(value).to_bytes(4, "big") + value
