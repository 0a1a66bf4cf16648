"""A database user who may not do something: one line says what it needs, and with that it works."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

from app.cli import cli
from app.db.api_keys import create_key
from app.db.csv_import import import_csv
from app.db.demo_crm import load_demo
from app.db.engine import Database
from app.db.lead_scores import WRITER_NEEDS
from app.db.leads import PostgresLeadSource
from app.errors import MissingRightError, PredictionFailedError
from tests.conftest import DEMO_UNTIL
from tests.fakes import fetch_at_once
from tests.lead_models import publish_lead_model
from tests.service import Service, refuse_to_start

LEAD = "00000000-0000-0000-0000-00000000000a"
PEPPER = "a pepper of thirty-two characters"
READ = "GRANT SELECT ON ALL TABLES IN SCHEMA public TO onlooker"
CRM = "campuses, programmes, people, touchpoints, applications"


@pytest.fixture
def url(database_url: str) -> Iterator[str]:
    """A migrated database as `onlooker` sees it, who may only read."""
    with psycopg.connect(database_url, autocommit=True) as administrator:
        administrator.execute("CREATE ROLE onlooker LOGIN")
        administrator.execute(READ)
        try:
            yield database_url.replace("postgres@", "onlooker@")
        finally:
            administrator.execute("DROP OWNED BY onlooker CASCADE")
            administrator.execute("DROP ROLE onlooker")


@pytest.fixture
def run(url: str, tmp_path: Path) -> Callable[..., Result]:
    """`run("keys", "list")` runs a command as the onlooker."""
    publish_lead_model(tmp_path / "models")
    environment = {
        "DATABASE_URL": url,
        "VAR_DIR": str(tmp_path / "var"),
        "ML_MODEL_DIR": str(tmp_path / "models"),
        "AUTH_KEY_PEPPER": PEPPER,
    }
    return lambda *arguments: CliRunner().invoke(cli, arguments, env=environment)


def change(url: str, statement: str) -> None:
    with psycopg.connect(url.replace("onlooker@", "postgres@"), autocommit=True) as administrator:
        administrator.execute(statement)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("command", "needs", "grants"),
    [
        (
            "keys create --client crm --scope score",
            "SELECT, INSERT and UPDATE on api_keys",
            ["SELECT, INSERT, UPDATE ON api_keys"],
        ),
        ("keys list", "SELECT on api_keys", ["SELECT ON api_keys"]),
        ("keys revoke {key}", "SELECT and UPDATE on api_keys", ["SELECT, UPDATE ON api_keys"]),
        (
            "demo --people 20",
            f"SELECT, INSERT and UPDATE on {CRM} and their sequences",
            [f"SELECT, INSERT, UPDATE ON {CRM}", "SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA public"],
        ),
        (
            "score",
            WRITER_NEEDS,
            ["SELECT, INSERT, UPDATE, DELETE ON lead_scores, lead_score_runs"],
        ),
        (
            "train",
            "SELECT on lead_training, and USAGE on its schema",
            [],
        ),
    ],
)
def test_a_command_says_what_it_needs_and_needs_no_more(
    url: str, run: Callable[..., Result], command: str, needs: str, grants: list[str]
) -> None:
    as_owner = url.replace("onlooker@", "postgres@")
    key = create_key(as_owner, "crm", ["score"], PEPPER.encode()).partition(".")[0]
    if command == "score":
        load_demo(as_owner, people=20, seed=1, until=DEMO_UNTIL)
    if command.startswith(("keys list", "train")):
        change(url, "REVOKE SELECT ON ALL TABLES IN SCHEMA public FROM onlooker")
    arguments = command.format(key=key).split()
    refused = run(*arguments)
    assert refused.exit_code == 1
    *log, line = refused.stderr.splitlines()
    assert line == f"Error: the database user may not do this: it needs {needs}"
    assert not [logged for logged in log if "model_loaded" not in logged]
    for grant in grants:
        change(url, f"GRANT {grant} TO onlooker")
    if grants:
        assert run(*arguments).exit_code == 0


def test_a_source_that_may_not_be_read_is_not_scored(url: str, run: Callable[..., Result]) -> None:
    change(url, "REVOKE SELECT ON lead_source FROM onlooker")
    assert "it needs SELECT on lead_source, and USAGE on its schema" in run("score").stderr


def test_an_import_says_what_it_needs(url: str, tmp_path: Path) -> None:
    path = tmp_path / "leads.csv"
    path.write_text("No,A\n1,x\n")
    with pytest.raises(MissingRightError, match="it needs CREATE and USAGE on the schema of leads"):
        import_csv(url, path, table="leads", id_column="No")
    change(url, "CREATE SCHEMA closed")
    with pytest.raises(MissingRightError, match=r"the schema of closed\.leads"):
        import_csv(url, path, table="closed.leads", id_column="No")
    change(url, "GRANT CREATE ON SCHEMA public TO onlooker")
    assert import_csv(url, path, table="leads", id_column="No").rows == 1


@pytest.mark.parametrize("schema", ["public", "leadscore"])
def test_migrations_say_what_they_need(url: str, run: Callable[..., Result], schema: str) -> None:
    change(url, "DROP TABLE alembic_version; CREATE SCHEMA leadscore")
    change(url, f"ALTER ROLE onlooker SET search_path = {schema}; GRANT USAGE ON SCHEMA {schema} TO onlooker")
    refused = run("db", "upgrade")
    assert refused.exit_code == 1
    assert refused.stderr == (
        "Error: the database user may not do this: it needs CREATE on the first schema of its search_path,"
        " and to own the tables it made before\n"
    )


@pytest.mark.parametrize("prepare", ["CREATE SCHEMA leadscore", "SELECT"])
def test_migrations_say_that_there_is_no_schema_for_them(
    url: str, run: Callable[..., Result], prepare: str
) -> None:
    change(url, f"{prepare}; ALTER ROLE onlooker SET search_path = leadscore")
    refused = run("db", "upgrade")
    assert refused.exit_code == 1
    assert refused.stderr == (
        "Error: the search_path names no schema that is there and that the database user may use\n"
    )


def test_the_service_does_not_start_where_it_may_not_read_leads(url: str, tmp_path: Path) -> None:
    change(url, "REVOKE SELECT ON lead_source FROM onlooker")
    (line,) = refuse_to_start(url, tmp_path, PORT="0")
    assert line == (
        "LEAD_SOURCE: the database user may not do this: it needs SELECT on lead_source,"
        " and USAGE on its schema"
    )


def test_the_service_starts_also_where_it_may_not_see_the_migrations(url: str, tmp_path: Path) -> None:
    change(url, "REVOKE SELECT ON alembic_version FROM onlooker")
    with Service(tmp_path, url, tmp_path / "models") as service:
        assert service.stop() == 0
    (line,) = [line for line in service.stderr.read_text().splitlines() if "migrations_not_seen" in line]
    assert "it needs SELECT on alembic_version" in line


async def test_leads_in_a_schema_that_may_not_be_used_are_read_once_it_may(url: str) -> None:
    change(url, "CREATE SCHEMA crm CREATE TABLE leads (lead_id uuid)")
    change(url, f"INSERT INTO crm.leads VALUES ('{LEAD}')")
    change(url, "GRANT SELECT ON crm.leads TO onlooker")
    database = Database(url, pool_size=1, deadline_seconds=5)
    source = PostgresLeadSource(database, "crm.leads")
    try:
        with pytest.raises(PredictionFailedError):
            await source.fetch_schema()
        with pytest.raises(PredictionFailedError):
            await fetch_at_once(source, [LEAD], [])
        change(url, "GRANT USAGE ON SCHEMA crm TO onlooker")
        assert (await fetch_at_once(source, [LEAD], [])).row_of.tolist() == [0]
    finally:
        await database.close()
        change(url, "DROP SCHEMA crm CASCADE")
