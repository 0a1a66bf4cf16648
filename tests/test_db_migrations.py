"""Migrations against a real server."""

import threading

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory

from app.ai.domain import InputColumn
from app.db import migrations
from app.db.ai_events import PostgresEventSink
from app.db.change_listener import ChangeListener
from app.db.engine import Database
from app.db.leads import PostgresLeadSource
from app.db.migrations import upgrade
from app.db.schema_state import check_lead_source, current_state, known_revisions
from app.errors import CommandError, DatabaseUnavailableError
from tests.fakes import fetch_at_once
from tests.test_change_listener import Observer


def downgrade(url: str, revision: str) -> None:
    with migrations._connect(url) as connection:
        config = migrations._config()
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_an_untouched_database_is_empty_and_current_after_an_upgrade(empty_database_url: str) -> None:
    assert current_state(empty_database_url) == "empty"
    upgrade(empty_database_url)
    assert current_state(empty_database_url) == "current"


def test_an_upgrade_of_a_current_database_changes_nothing(database_url: str) -> None:
    upgrade(database_url)
    assert current_state(database_url) == "current"


def test_starters_at_the_same_time_do_not_race(empty_database_url: str) -> None:
    failures: list[BaseException] = []

    def start() -> None:
        try:
            upgrade(empty_database_url)
        except BaseException as exc:  # noqa: BLE001 - reported by the assertion below
            failures.append(exc)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert current_state(empty_database_url) == "current"


def test_a_database_of_another_version_is_left_alone(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert current_state(database_url) == "unknown"
    with pytest.raises(CommandError, match="another version"):
        upgrade(database_url)


_CRM = """
    CREATE TABLE people (id uuid PRIMARY KEY, external_ref text UNIQUE, gpa numeric, created_at timestamptz);
    INSERT INTO people VALUES ('00000000-0000-0000-0000-00000000000a', 'crm-1', 2.5, now());
    CREATE VIEW leads AS SELECT id AS lead_id, external_ref, gpa, created_at FROM people;
"""


@pytest.mark.parametrize("more", ["", "CREATE TABLE alembic_version AS SELECT 'a1b2c3'::text AS version_num"])
async def test_beside_a_crm_whose_names_are_ours_the_service_lives_in_a_schema_of_its_own(
    empty_database_url: str, more: str
) -> None:
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(_CRM + more)
    with pytest.raises(CommandError, match=r'a schema of its own, see README\.md, "Your own CRM"'):
        upgrade(empty_database_url)
    # What the README says.
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("CREATE SCHEMA leadscore")
    url = f"{empty_database_url}&options=-csearch_path%3Dleadscore"
    upgrade(url)
    assert current_state(url) == "current"
    check_lead_source(url, "public.leads")
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("SELECT leadscore.lead_scoring_watch('people', 'id')")
        connection.execute("UPDATE people SET gpa = 3")
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
        assert connection.execute(tables).fetchall() == [("alembic_version",)] * bool(more) + [("people",)]
    database = Database(url, pool_size=1, deadline_seconds=5)
    listener = ChangeListener(url, "public.leads", Observer(), deadline_seconds=5)
    listener.start()
    try:
        source = PostgresLeadSource(database, "public.leads")
        found = await fetch_at_once(source, ["crm-1"], [InputColumn("gpa", "number")])
        assert found.leads.columns["gpa"].values.tolist() == [3.0]
        await PostgresEventSink(database).write_events([])
        assert listener.hears_everything()
    finally:
        listener.close()
        await database.close()


def test_a_database_that_is_not_there_is_unavailable(server_url: str) -> None:
    with pytest.raises(DatabaseUnavailableError):
        upgrade(server_url.replace("/postgres?", "/nowhere?"))


def test_an_address_that_only_the_driver_understands_is_no_error_of_its_own() -> None:
    with pytest.raises(DatabaseUnavailableError):
        upgrade("postgresql://127.0.0.1:1,127.0.0.1:2/crm")


def test_a_migration_gives_up_on_a_table_somebody_holds(database_url: str) -> None:
    downgrade(database_url, "0002")
    with psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE alembic_version IN EXCLUSIVE MODE")
        with pytest.raises(CommandError, match="locked"):
            upgrade(database_url)
    upgrade(database_url)
    assert current_state(database_url) == "current"


def test_a_database_that_lacks_revisions_is_behind(database_url: str) -> None:
    downgrade(database_url, "0001")
    assert current_state(database_url) == "behind"


def test_every_revision_can_be_undone_and_applied_again(database_url: str) -> None:
    tables = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    with psycopg.connect(database_url) as connection:
        before = connection.execute(tables).fetchall()
    downgrade(database_url, "base")
    with psycopg.connect(database_url) as connection:
        assert connection.execute(tables).fetchall() == [("alembic_version",), ("alembic_version_pkc",)]
    upgrade(database_url)
    with psycopg.connect(database_url) as connection:
        assert connection.execute(tables).fetchall() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("SELECT", "no table or view leads with a lead_id of type uuid"),
        ("CREATE VIEW leads AS SELECT 1 AS id", "no table or view leads with a lead_id of type uuid"),
        (
            "CREATE VIEW leads AS SELECT 'x'::text AS lead_id",
            "no table or view leads with a lead_id of type uuid",
        ),
        (
            "CREATE VIEW leads AS SELECT id AS lead_id FROM people WHERE 1 / 0 > 1",
            r"leads cannot be read \(SQLSTATE",
        ),
    ],
)
def test_a_lead_source_that_cannot_be_read_is_said(database_url: str, make: str, message: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(make)  # type: ignore[call-overload]
    with pytest.raises(CommandError, match=message):
        check_lead_source(database_url, "leads")


@pytest.mark.parametrize("relation", ["lead_source", "public.lead_source", "crm.Leads"])
def test_a_lead_source_is_checked_without_reading_it(database_url: str, relation: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE DOMAIN lead AS uuid")
        connection.execute('CREATE SCHEMA crm CREATE TABLE crm."Leads" (lead_id lead)')
    check_lead_source(database_url, relation)


def test_a_lead_source_that_is_locked_or_a_database_that_is_away_is_no_fault_of_it(database_url: str) -> None:
    with psycopg.connect(database_url) as holder:
        holder.execute("LOCK TABLE people IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseUnavailableError):
            check_lead_source(database_url, "lead_source")
    with pytest.raises(DatabaseUnavailableError):
        check_lead_source("postgresql://127.0.0.1:1/crm", "lead_source")


def test_the_newest_revision_is_the_one_a_migrated_database_has() -> None:
    scripts = ScriptDirectory.from_config(migrations._config())
    assert known_revisions() == [script.revision for script in scripts.walk_revisions()][::-1]
    assert known_revisions()[-1] == scripts.get_current_head()
