"""A database that fails a command: one line says in which way, by SQLSTATE, and quotes nothing."""

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner

from app.cli import cli
from app.db import migrations
from app.db.command_connection import open_connection
from tests.lead_models import publish_lead_model

Refuse = Callable[..., str]

AWAY = "Error: the database cannot be reached or does not let the user in; is DATABASE_URL right?"
READ_ONLY = "Error: the database is read-only; is it a standby?"
FULL = "Error: the disk of the database is full"
WRITING = [
    "db upgrade",
    "demo --people 20",
    "import {file}",
    "keys create --client crm --scope score",
    "score",
]
COMMANDS = [*WRITING, "keys list", "train"]


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    """`refuse(url, "keys list")` runs a command that must fail, and returns the one line it says of that."""
    publish_lead_model(tmp_path / "models")
    leads = tmp_path / "leads.csv"
    leads.write_text("No,A\n1,x\n")

    def run(url: str, command: str, *, file: Path = leads, source: str = "lead_source") -> str:
        environment = {
            "DATABASE_URL": url,
            "VAR_DIR": str(tmp_path / "var"),
            "ML_MODEL_DIR": str(tmp_path / "models"),
            "AUTH_KEY_PEPPER": "a pepper of thirty-two characters",
            "LEAD_SOURCE": source,
        }
        arguments = command.format(file=f"{file} --table leads --id No").split()
        result = CliRunner().invoke(cli, arguments, env=environment)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1
        *log, line = result.stderr.splitlines()
        assert not [logged for logged in log if "model_loaded" not in logged]
        return line

    return run


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)  # type: ignore[call-overload]


def fill_the_disk(url: str) -> None:
    """From here on whatever makes a table is told that there is no room for it."""
    execute(
        url,
        "CREATE FUNCTION no_room() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE disk_full USING MESSAGE = 'could not extend file \"base/1/2\"'; END$$",
        "CREATE EVENT TRIGGER no_room ON ddl_command_start WHEN TAG IN ('CREATE TABLE')"
        " EXECUTE FUNCTION no_room()",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_database_that_is_not_there_or_refuses_the_user_asks_for_another_address(
    server_url: str, refuse: Refuse, command: str
) -> None:
    for url in (
        server_url.replace("/postgres?", "/nowhere?"),
        server_url.replace("postgres@", "nobody@"),
        "postgresql://127.0.0.1:1/crm",
    ):
        assert refuse(url, command) == AWAY


def test_a_server_that_ends_the_session_is_away(database_url: str, refuse: Refuse) -> None:
    execute(
        database_url,
        "CREATE VIEW leads AS SELECT gen_random_uuid() AS lead_id FROM generate_series(1, 2) n"
        " WHERE pg_terminate_backend(pg_backend_pid() + 0 * n)",
    )
    assert refuse(database_url, "score", source="leads") == AWAY


@pytest.mark.parametrize("command", WRITING)
def test_a_read_only_database_is_called_that(
    database_url: str, empty_database_url: str, refuse: Refuse, command: str
) -> None:
    url = empty_database_url if command == "db upgrade" else database_url
    assert refuse(f"{url}&options=-cdefault_transaction_read_only%3Don", command) == READ_ONLY


@pytest.mark.parametrize("command", ["db upgrade", "import {file}", "score"])
def test_a_full_disk_is_no_wrong_address(
    database_url: str, empty_database_url: str, refuse: Refuse, command: str
) -> None:
    url = empty_database_url if command == "db upgrade" else database_url
    fill_the_disk(url)
    assert refuse(url, command) == FULL


@pytest.mark.parametrize(
    ("columns", "sqlstate"),
    # More than a table may have; and numbers, which stay in the row, of more bytes than one may have.
    [(1_700, 54011), (1_200, 54000)],
)
def test_a_file_too_wide_for_a_table_is_told_so(
    database_url: str, tmp_path: Path, refuse: Refuse, columns: int, sqlstate: int
) -> None:
    wide = tmp_path / "wide.csv"
    wide.write_text(
        ",".join(["No", *(f"c{number}" for number in range(columns))]) + "\n" + "1," * columns + "1\n"
    )
    assert refuse(database_url, "import {file}", file=wide) == (
        "Error: leads cannot be made: it has more columns or longer values than PostgreSQL takes, use fewer"
        f" (SQLSTATE {sqlstate})"
    )


@pytest.mark.parametrize("command", ["score", "train --source leads --label won"])
def test_a_view_that_fails_is_named_with_the_sqlstate(
    database_url: str, refuse: Refuse, command: str
) -> None:
    execute(
        database_url,
        "CREATE VIEW leads AS SELECT gen_random_uuid() AS lead_id, true AS won, 2.5::float8 AS gpa,"
        " 1 AS minutes_on_site, 1 AS touchpoint_count, true AS newsletter_opt_in, now() AS created_at,"
        " 'fair' AS source, 1 AS tuition_fee FROM generate_series(0, 9) n WHERE 1 / n < 2",
    )
    assert refuse(database_url, command, source="leads") == "Error: leads cannot be read (SQLSTATE 22012)"


def test_scores_that_cannot_be_written_are_named_with_the_sqlstate(database_url: str, refuse: Refuse) -> None:
    execute(database_url, "ALTER TABLE lead_score_runs ADD CHECK (source <> 'lead_source')")
    line = refuse(database_url, "score")
    assert line == "Error: lead_scores cannot be written (SQLSTATE 23514)"


def test_a_migration_that_fails_says_the_sqlstate_and_no_sql(empty_database_url: str, refuse: Refuse) -> None:
    execute(empty_database_url, "CREATE DOMAIN people AS integer")
    line = refuse(empty_database_url, "db upgrade")
    assert line == "Error: the migrations cannot be applied (SQLSTATE 42710)"


def test_no_timeout_of_a_role_or_a_database_ends_what_waits_as_long_as_it_takes(database_url: str) -> None:
    # Long ones, lest a slow machine decide the test: what counts is that they are gone.
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    for name in names:
        alter = f"format('ALTER DATABASE %I SET {name} = ''1h''', current_database())"
        execute(database_url, f"DO $$ BEGIN EXECUTE {alter}; END $$")
    show = f"SELECT {', '.join(f'current_setting({name!r})' for name in names)}"
    with psycopg.connect(database_url) as connection:
        assert connection.execute(show).fetchone() == ("1h",) * 3
    for autocommit in (False, True):
        with open_connection(database_url, needs="", autocommit=autocommit) as connection:
            assert connection.execute(show).fetchone() == ("0",) * 3
    with migrations._connect(database_url) as migrating:
        assert tuple(migrating.exec_driver_sql(show).one()) == ("0",) * 3
