"""Fills an empty database with a demo admissions CRM.

The same people, seed and end of history give the same rows, IDs included. Never touches a database that has
people in it, and never runs by itself when `DATABASE_URL` is set. Called by `leadscore demo` and by the first
`leadscore serve`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import psycopg
from numpy.random import Generator
from psycopg import sql

from app.ai.domain import Progress
from app.db import demo_words as words
from app.db.bulk_copy import CopyColumn, write_rows
from app.db.command_connection import open_connection
from app.db.demo_history import draw_applications, draw_touchpoints
from app.db.demo_leads import draw_leads
from app.db.demo_rows import (
    build_application_columns,
    build_attribute_columns,
    build_touchpoint_columns,
    draw_ids,
    draw_personal_columns,
    draw_standing_columns,
)
from app.errors import CommandError

_TABLES = "campuses, programmes, people, touchpoints, applications"

_BLOCK = 10_000
"""People drawn and written at a time; bounds the memory, whatever their number."""


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """What was loaded: rows by table, and the history's first and last moment."""

    people: int
    touchpoints: int
    applications: int
    programmes: int
    campuses: int
    first_enquiry: datetime
    until: datetime


def has_people(url: str) -> bool:
    """Tells whether the CRM has anybody in it.

    Raises:
        DatabaseUnavailableError, CommandError: see `open_connection`.
    """
    with open_connection(url, needs="SELECT on people") as connection:
        return _has_people(connection)


def load_demo(
    url: str, *, people: int, seed: int, until: datetime, progress: Progress = lambda *_: None
) -> DemoSummary:
    """Draws a CRM of that many people whose history ends at `until`, and loads it in one transaction.

    Args:
        url: the database; its schema must be up to date.
        people: how many leads; they get the external references `lead_1` to `lead_<people>`.
        seed: of the one generator everything is drawn from.
        until: the last moment of the history, aware of its time zone; fractions of a second are dropped.
        progress: called with "people", how many are written, and how many there are to be.

    Raises:
        CommandError: the database already has people, or its schema is not up to date.
        DatabaseUnavailableError: the server cannot be reached, or went away.
    """
    needs = f"SELECT, INSERT and UPDATE on {_TABLES} and their sequences"
    with open_connection(url, needs=needs) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE people IN SHARE ROW EXCLUSIVE MODE")
        if _has_people(connection):
            raise CommandError("the database already has people in it; the demo CRM is for an empty one")
        loading = _Loading(cursor, np.random.default_rng(seed), int(until.timestamp()))
        for first in range(1, people + 1, _BLOCK):
            n = min(_BLOCK, people + 1 - first)
            loading.write_people(first, n)
            progress("people", first + n - 1, people)
        loading.advance_identities()
    _vacuum(url)
    return DemoSummary(
        people=people,
        touchpoints=loading.touchpoints,
        applications=loading.applications,
        programmes=len(words.PROGRAMMES),
        campuses=len(words.CAMPUSES),
        first_enquiry=datetime.fromtimestamp(loading.first_enquiry, UTC),
        until=until,
    )


class _Loading:
    """One load under way: where it writes, what it draws from, and how much it has written."""

    def __init__(self, cursor: psycopg.Cursor[Any], rng: Generator, until: int) -> None:
        self.touchpoints = 0
        self.applications = 0
        self.first_enquiry = until
        self._cursor = cursor
        self._rng = rng
        self._until = until
        self._programme_ids = draw_ids(rng, len(words.PROGRAMMES))
        self._write_catalogue(draw_ids(rng, len(words.CAMPUSES)))

    def write_people(self, first: int, n: int) -> None:
        """Draws and writes people number `first` to `first + n - 1` with all that happened to them."""
        rng, until = self._rng, self._until
        leads = draw_leads(rng, first - 1, n, until)
        applications = draw_applications(rng, leads, until)
        touchpoints = draw_touchpoints(rng, leads, until)
        ids = draw_ids(rng, n)
        people = {
            "id": ids,
            "external_ref": [f"lead_{number}" for number in range(first, first + n)],
            **draw_personal_columns(rng, leads, first),
            **build_attribute_columns(leads, self._programme_ids),
            **draw_standing_columns(rng, leads, applications, touchpoints, until),
        }
        applied = build_application_columns(applications, leads, ids, self._programme_ids, self.applications)
        self._write("people", people)
        self._write("touchpoints", build_touchpoint_columns(touchpoints, ids, self.touchpoints))
        self._write("applications", applied)
        self.touchpoints += touchpoints.owner.size
        self.applications += applications.owner.size
        self.first_enquiry = min(self.first_enquiry, int(leads.created.min()))

    def advance_identities(self) -> None:
        """Lets the CRM's own later rows continue after the IDs written here."""
        for table in ("touchpoints", "applications"):
            self._cursor.execute(
                sql.SQL(
                    "SELECT setval(pg_get_serial_sequence({}, 'id'), greatest(max(id), 1)) FROM {}"
                ).format(sql.Literal(table), sql.Identifier(table))
            )

    def _write_catalogue(self, campus_ids: list[str]) -> None:
        offered = words.PROGRAMMES
        campuses = {
            "id": campus_ids,
            "name": [name for name, _ in words.CAMPUSES],
            "city": [city for _, city in words.CAMPUSES],
        }
        programmes = {
            "id": self._programme_ids,
            "name": [programme.name for programme in offered],
            "level": [programme.level for programme in offered],
            "study_mode": [programme.study_mode for programme in offered],
            "campus_id": [campus_ids[programme.campus] for programme in offered],
            "tuition_fee": [str(programme.tuition_fee) for programme in offered],
        }
        self._write("campuses", campuses)
        self._write("programmes", programmes)

    def _write(self, table: str, columns: Mapping[str, CopyColumn]) -> None:
        write_rows(self._cursor, sql.Identifier(table), columns)


def _has_people(connection: psycopg.Connection[Any]) -> bool:
    row = connection.execute("SELECT EXISTS (SELECT FROM people)").fetchone()
    return row is not None and bool(row[0])


def _vacuum(url: str) -> None:
    """Gives the planner its figures and the index-only scans of the views their visibility map."""
    with open_connection(url, needs=f"to own {_TABLES}", autocommit=True) as connection:
        connection.execute(f"VACUUM (ANALYZE) {_TABLES}")
