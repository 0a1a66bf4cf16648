"""What the database says of its changes: the triggers of the migration, heard over a real connection."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

from app.db.embedded import open_embedded
from app.db.migrations import upgrade
from tests.test_db_migrations import downgrade

CHANNEL = "lead_scoring_changes"
EVERYTHING = "*"


class Crm:
    """A CRM of a few people, and what is heard of each change."""

    def __init__(self, url: str, listener: psycopg.Connection) -> None:
        self.url = url
        self._listener = listener
        self.people = [uuid4() for _ in range(5)]
        self.programme, self.campus = uuid4(), uuid4()
        self.change("INSERT INTO campuses VALUES (%s, 'North', 'Zürich')", self.campus)
        self.change(
            "INSERT INTO programmes (id, name, level, study_mode, campus_id) VALUES (%s, 'L', 'B', 'x', %s)",
            self.programme,
            self.campus,
        )
        self.change(
            "INSERT INTO people (id, external_ref, programme_id, created_at)"
            " SELECT id, 'ref_' || n, %s, now() FROM unnest(%s::uuid[]) WITH ORDINALITY p (id, n)",
            self.programme,
            self.people,
        )

    def change(self, *statements: str | UUID | Sequence[UUID] | None) -> list[str]:
        """Executes a statement with its parameters, and returns the payloads of its notifications."""
        statement, *parameters = statements
        with psycopg.connect(self.url) as connection:
            connection.execute(str(statement), parameters)
        return self.hear()

    def hear(self) -> list[str]:
        # What was committed before this statement is delivered with its answer.
        self._listener.execute("SELECT 1")
        return [notification.payload for notification in self._listener.notifies(timeout=0)]


@pytest.fixture
def crm(database_url: str) -> Iterator[Crm]:
    with psycopg.connect(database_url, autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")
        yield Crm(database_url, listener)


def ids(payloads: Sequence[str]) -> set[UUID]:
    return {UUID(word) for payload in payloads for word in payload.split()}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE people SET gpa = 3 WHERE id = %s",
        "UPDATE people SET external_ref = 'another' WHERE id = %s",
        "DELETE FROM people WHERE id = %s",
        "INSERT INTO people (id, created_at) VALUES (%s, now()) ON CONFLICT (id) DO UPDATE SET gpa = 2",
        "INSERT INTO touchpoints (person_id, kind,direction,occurred_at) VALUES (%s, 'x', 'inbound', now())",
        "INSERT INTO applications (person_id, submitted_at) VALUES (%s, now())",
    ],
)
def test_a_change_names_the_lead_it_concerns_and_no_other(crm: Crm, statement: str) -> None:
    assert ids(crm.change(statement, crm.people[0])) == {crm.people[0]}


@pytest.mark.parametrize("table", ["touchpoints", "applications"])
def test_what_moves_from_one_lead_to_another_names_both(crm: Crm, table: str) -> None:
    columns = {
        "touchpoints": "(kind, direction, occurred_at, person_id) VALUES ('call', 'inbound', now(), %s)",
        "applications": "(submitted_at, person_id) VALUES (now(), %s)",
    }
    crm.change(f"INSERT INTO {table} {columns[table]}", crm.people[0])
    assert ids(crm.change(f"UPDATE {table} SET person_id = %s", crm.people[1])) == set(crm.people[:2])
    assert ids(crm.change(f"DELETE FROM {table}")) == {crm.people[1]}


def test_a_lead_that_gets_another_id_is_named_by_both(crm: Crm) -> None:
    new = uuid4()
    assert ids(crm.change("UPDATE people SET id = %s WHERE id = %s", new, crm.people[0])) == {
        new,
        crm.people[0],
    }


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE programmes SET tuition_fee = 1",
        "UPDATE campuses SET name = 'South'",
        "TRUNCATE people CASCADE",
        "TRUNCATE touchpoints",
        "TRUNCATE applications",
    ],
)
def test_a_change_that_may_concern_any_lead_says_so(crm: Crm, statement: str) -> None:
    assert set(crm.change(statement)) == {EVERYTHING}


@pytest.mark.parametrize(
    "statement",
    ["UPDATE people SET gpa = 1 WHERE false", "UPDATE campuses SET name = 'x' WHERE false", "SELECT 1"],
)
def test_what_changes_nothing_says_nothing(crm: Crm, statement: str) -> None:
    assert crm.change(statement) == []


def test_a_change_that_is_rolled_back_says_nothing(crm: Crm) -> None:
    with psycopg.connect(crm.url) as connection:
        connection.execute("UPDATE people SET gpa = 1")
        connection.rollback()
    assert crm.hear() == []


def test_two_thousand_leads_are_named_in_several_notifications_and_more_are_everything(crm: Crm) -> None:
    insert = "INSERT INTO people (id, created_at) SELECT id, now() FROM unnest(%s::uuid[]) id"
    many = [uuid4() for _ in range(2000)]
    payloads = crm.change(insert, many)
    assert ids(payloads) == set(many)
    assert len(payloads) == 10
    assert crm.change(insert, [uuid4() for _ in range(2001)]) == [EVERYTHING]


def test_leads_that_are_copied_in_are_named_too(crm: Crm) -> None:
    new = uuid4()
    with (
        psycopg.connect(crm.url) as connection,
        connection.cursor().copy("COPY people (id, created_at) FROM STDIN") as copy,
    ):
        copy.write_row((new, "2026-01-01"))
    assert ids(crm.hear()) == {new}


@pytest.fixture
def own_table(crm: Crm) -> Callable[..., None]:
    def create(*arguments: str) -> None:
        crm.change('CREATE SCHEMA crm; CREATE TABLE crm."Odd leads" ("The id" uuid, "text" text)')
        crm.change(f"SELECT lead_scoring_watch('crm.\"Odd leads\"'{''.join(f', {a}' for a in arguments)})")

    return create


def test_a_table_of_ones_own_is_watched_by_one_call_however_often_it_is_made(
    crm: Crm, own_table: Callable[..., None]
) -> None:
    own_table("'The id'")
    crm.change("SELECT lead_scoring_watch('crm.\"Odd leads\"', 'The id')")
    assert crm.change('INSERT INTO crm."Odd leads" VALUES (NULL, NULL)') == []
    assert ids(crm.change('INSERT INTO crm."Odd leads" VALUES (%s, NULL)', crm.people[0])) == {crm.people[0]}
    crm.change("SELECT lead_scoring_unwatch('crm.\"Odd leads\"')")
    assert crm.change('DELETE FROM crm."Odd leads"') == []


def test_a_table_without_lead_ids_concerns_every_lead(crm: Crm, own_table: Callable[..., None]) -> None:
    own_table()
    assert crm.change('INSERT INTO crm."Odd leads" VALUES (NULL, NULL)') == [EVERYTHING]


@pytest.mark.parametrize("column", ["text", "nothing"])
def test_a_column_that_cannot_hold_lead_ids_is_refused(
    crm: Crm, own_table: Callable[..., None], column: str
) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="no column"):
        own_table(f"'{column}'")


def test_a_lead_id_may_be_a_domain_over_another(crm: Crm) -> None:
    crm.change("CREATE DOMAIN lead AS uuid")
    crm.change("CREATE DOMAIN own_lead AS lead")
    crm.change("CREATE TABLE leads (plain lead, own own_lead)")
    for column in ("plain", "own"):
        crm.change("SELECT lead_scoring_watch('leads', %s)", column)
        new = uuid4()
        assert ids(crm.change(f"INSERT INTO leads ({column}) VALUES (%s)", new)) == {new}
    downgrade(crm.url, "0008")
    with pytest.raises(psycopg.errors.RaiseException, match="no column"):
        crm.change("SELECT lead_scoring_watch('leads', 'own')")


def test_whoever_watches_where_transactions_can_be_prepared_is_warned(
    make_server_dir: Callable[[], Path],
) -> None:
    folder = make_server_dir()
    with open_embedded(folder) as url, psycopg.connect(url, autocommit=True) as administrator:
        administrator.execute("ALTER SYSTEM SET max_prepared_transactions = 1")
    heard: list[object] = []
    with open_embedded(folder) as url, psycopg.connect(url, autocommit=True) as connection:
        upgrade(url)
        connection.execute("CREATE TABLE leads (lead_id uuid)")
        connection.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        connection.execute("SELECT lead_scoring_watch('leads', 'lead_id')")
        assert heard[0] == "PREPARE TRANSACTION fails from now on for transactions that write to leads"
        # What it warns of, and what it says to do.
        for unwatch, refused in (("", True), ("SELECT lead_scoring_unwatch('leads')", False)):
            connection.execute(unwatch)
            connection.execute("BEGIN; INSERT INTO leads VALUES (gen_random_uuid())")
            with pytest.raises(psycopg.errors.FeatureNotSupported) if refused else nullcontext():
                connection.execute("PREPARE TRANSACTION 'two phases'")
        connection.execute("ROLLBACK PREPARED 'two phases'")


def test_where_no_transaction_can_be_prepared_nobody_is_warned(database_url: str) -> None:
    heard: list[object] = []
    with psycopg.connect(database_url) as connection:
        connection.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        connection.execute("CREATE TABLE leads (lead_id uuid); SELECT lead_scoring_watch('leads', 'lead_id')")
    assert not [message for message in heard if "PREPARE" in str(message)]


def test_a_watched_column_that_is_renamed_never_costs_the_crm_its_write(
    crm: Crm, own_table: Callable[..., None]
) -> None:
    own_table("'The id'")
    crm.change('ALTER TABLE crm."Odd leads" RENAME COLUMN "The id" TO "Another"')
    assert crm.change('INSERT INTO crm."Odd leads" VALUES (%s, NULL)', crm.people[0]) == [EVERYTHING]
    with psycopg.connect(crm.url) as connection:
        assert connection.execute('SELECT count(*) FROM crm."Odd leads"').fetchall() == [(1,)]
