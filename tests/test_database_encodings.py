"""Databases and environments that do not speak UTF-8: what is asked, read and written is the same text."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from app.ai.domain import InputColumn
from app.ai.predictor import ScoringPolicy
from app.bulk_scoring import score_source
from app.db.change_listener import ChangeListener
from app.db.csv_import import import_csv
from app.db.engine import Database
from app.db.leads import PostgresLeadSource, fetch_all_chunks
from app.db.migrations import upgrade
from app.db.schema_state import check_lead_source, current_state
from tests.fakes import fetch_at_once
from tests.lead_models import build_lead_bundle
from tests.test_change_listener import Observer

RELATION = "anfragen_für_uns"
LEAD = str(UUID(int=1))
COLUMNS = [InputColumn("source", "text"), InputColumn("größe", "number")]


@pytest.fixture(params=["LATIN1", "WIN1252", "SQL_ASCII", "UTF8"])
def url(request: pytest.FixtureRequest, server_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A migrated database of this encoding with one lead, for a process whose environment says LATIN1."""
    name = f"in_{request.param.lower()}"
    with psycopg.connect(server_url, autocommit=True) as administrator:
        administrator.execute(
            f"CREATE DATABASE {name} ENCODING '{request.param}' TEMPLATE template0 LOCALE 'C'"
        )
        url = server_url.replace("/postgres?", f"/{name}?")
        if request.param == "UTF8":
            monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
        upgrade(url)
        execute(
            url,
            f"CREATE TABLE {RELATION} AS SELECT '{LEAD}'::uuid AS lead_id, 'José-1' AS external_ref,"
            " 'Münster'::text AS source, 7 AS größe, now() AS created_at, 3 AS touchpoint_count, 1.5 AS gpa,"
            " 2 AS minutes_on_site, true AS newsletter_opt_in, 1 AS tuition_fee",
        )
        yield url
        monkeypatch.undo()
        administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, client_encoding="utf8") as connection:
        cursor = connection.execute(statement)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


async def test_a_lead_is_found_and_read(url: str) -> None:
    assert current_state(url) == "current"
    check_lead_source(url, RELATION)
    database = Database(url, pool_size=1, deadline_seconds=5)
    source = PostgresLeadSource(database, RELATION)
    try:
        found = await fetch_at_once(source, ["José-1", "Jos\xc3\xa9-1"], COLUMNS)
        assert await source.fetch_recent(1) == [LEAD, "José-1"]
    finally:
        await database.close()
    assert found.row_of.tolist() == [0, -1]
    assert [found.leads.columns[column.name].values.tolist() for column in COLUMNS] == [["Münster"], [7.0]]


def test_training_and_bulk_scoring_read_and_write_the_same(url: str) -> None:
    [chunk] = fetch_all_chunks(url, RELATION, COLUMNS)
    assert chunk.external_refs == ["José-1".encode()]
    assert chunk.leads.columns["source"].values.tolist() == ["Münster"]
    score_source(
        url, RELATION, build_lead_bundle(), as_of=datetime(2026, 6, 1, tzinfo=UTC),
        policy=ScoringPolicy(min_coverage=0.6, confidence_method="max_probability"),
        progress=lambda *_: None,
    )  # fmt: skip
    assert execute(url, "SELECT external_ref, source FROM lead_scores") == [("José-1", RELATION)]


def test_an_import_keeps_what_the_file_says(url: str, tmp_path: Path) -> None:
    file = tmp_path / "leads.csv"
    file.write_text("Nr,Ort\nJosé-2,für\n", encoding="utf-8")
    import_csv(url, file, table="leads", id_column="Nr")
    assert execute(url, "SELECT external_ref, ort FROM leads") == [("José-2", "für")]


def test_changes_are_heard(url: str) -> None:
    execute(url, f"SELECT lead_scoring_watch('{RELATION}', 'lead_id')")
    observer = Observer()
    listener = ChangeListener(url, RELATION, observer, deadline_seconds=5)
    listener.start()
    try:
        assert observer.trusted_until > -math.inf
        assert listener.hears_everything()
    finally:
        listener.close()
