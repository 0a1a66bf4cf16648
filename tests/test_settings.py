"""The settings: what is accepted, and what a wrong value is answered with."""

import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from app.cli import cli
from app.settings import Settings, load_settings
from app.training.answers import _MIN_COVERAGE


def read(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]


# --- DATABASE_URL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+asyncpg", "postgresql+psycopg2"]
)
@pytest.mark.parametrize(
    "address",
    ["u:p%40ss@db.example:5432/crm", "/crm?host=/run/postgresql", "h1,h2:5433/crm?connect_timeout=3", ""],
)
def test_every_spelling_of_a_database_becomes_the_one_the_driver_reads(scheme: str, address: str) -> None:
    assert read(database_url=f"{scheme}://{address}").database_url == f"postgresql://{address}"


def test_every_command_understands_sqlalchemys_spelling(database_url: str) -> None:
    environment = {"DATABASE_URL": database_url.replace("postgresql://", "postgresql+psycopg://")}
    for command in ("db upgrade", "keys list", "demo --people 5"):
        assert CliRunner().invoke(cli, command.split(), env=environment).exit_code == 0, command


@pytest.mark.parametrize("command", ["serve", "db upgrade", "score", "keys list", "models list"])
def test_every_command_refuses_what_is_no_database(command: str) -> None:
    assert_refused(command, "garbage-s3cret")


@pytest.mark.parametrize(
    "value",
    [
        "mysql://u:s3cret@h/x",
        "host=h password=s3cret",
        "postgresql:/u:s3cret@h/x",
        "postgresql+://u:s3cret@h/x",
        "postgresql://u:s3cret%zz@h/x",
        "postgresql://u:p@s3cret@h/x",
        "postgresql://u:s3cret@h:port/x",
        "postgresql://u:s3cret@h:99999/x",
        "postgresql://u:s3cret@h:0/x",
        "postgresql://u:s3cret@h:5432,g:65536/x",
        "postgresql://u:s3cret@h/x?sslmode=verify_full",
        "postgresql://u:s3cret@h/x?connect_timeout=soon",
        "postgresql://u:s3cret@h/x?nonsense=1",
    ],
)
def test_what_is_no_database_is_one_line_without_the_value(value: str) -> None:
    assert_refused("db upgrade", value)


def assert_refused(command: str, value: str) -> None:
    result = CliRunner().invoke(cli, command.split(), env={"DATABASE_URL": value})
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: DATABASE_URL: expected an address such as postgresql://")
    assert "s3cret" not in result.output


def test_a_wrong_setting_does_not_show_its_value_where_the_error_is_printed() -> None:
    with pytest.raises(ValidationError) as wrong:
        read(database_url="mysql://u:s3cret@h/x")
    assert "s3cret" not in str(wrong.value)


def test_settings_that_are_printed_show_no_password() -> None:
    url = "//u:s3cret@h.example/x"
    settings = read(
        database_url=f"postgresql:{url}", auth_jwks_url=f"https:{url}", auth_key_pepper="s3cret" * 6
    )
    assert "s3cret" not in f"{settings!r} {settings}"


def test_training_measures_a_model_with_the_default_coverage() -> None:
    assert Settings.model_fields["ml_min_feature_coverage"].default == _MIN_COVERAGE


# --- The others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ML_MODEL_VERSION", "garbage"),
        ("ML_MODEL_VERSION", "20260101_1200000"),
        ("CORS_ORIGINS", "garbage"),
        ("CORS_ORIGINS", ","),
        ("ML_TRUSTED_KEYS", " , "),
        ("HOST", "unix:"),
        ("CORS_ORIGINS", "https://crm.example/"),
        ("CORS_ORIGINS", "https://crm.example, crm.example"),
        ("CORS_ORIGINS", "https://*.example"),
        ("CORS_ORIGINS", "https://CRM.example"),
        ("CORS_ORIGINS", "https://u:p@crm.example"),
        ("CORS_ORIGINS", "https://crm.example:port"),
        ("CORS_ORIGINS", "https://crm.example:443"),
        ("CORS_ORIGINS", "http://crm.example:80"),
        ("CORS_ORIGINS", "https://crm.example:65536"),
        ("CORS_ORIGINS", "https://crm.example:08443"),
        ("CORS_ORIGINS", "https://crm..example"),
        ("CORS_ORIGINS", "foo://."),
        ("CORS_ORIGINS", "null"),
        ("CORS_ORIGINS", "https://münchen.example"),
        ("AI_LEGACY_SUNSET", "20270301"),
        ("AI_LEGACY_SUNSET", "1e9"),
        ("AI_LEGACY_SUNSET", "2027-W09-1"),
        ("AI_LEGACY_SUNSET", "2027-02-29"),
        ("AI_LEGACY_SUNSET", "9999-12-31T23:59:59-05:00"),
        ("AI_LEGACY_SUNSET", "0001-01-01T00:00:00+05:00"),
        ("ML_CACHE_TTL_SECONDS", "1e9"),
        ("ML_PREDICTION_CACHE_TTL_SECONDS", "1e9"),
        *(
            (name.upper(), value)
            for name, field in Settings.model_fields.items()
            if field.annotation is float
            for value in ("inf", "nan", "1e999")
        ),
    ],
)
def test_a_value_that_cannot_be_meant_is_one_line_that_names_the_variable(name: str, value: str) -> None:
    result = CliRunner().invoke(cli, ["models", "list"], env={name: value})
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"Error: {name}: ")


@pytest.mark.parametrize(
    "text",
    ["2027-03-01", "2027-03-01T00:00:00", "2027-03-01t00:00:00.000z", "2027-02-28 19:00:00-05:00"],
)
def test_a_date_is_that_of_utc_wherever_the_service_runs(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert str(read(ai_legacy_sunset=text).ai_legacy_sunset) == "2027-03-01 00:00:00+00:00"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AUTH_KEY_PEPPER", "s3cret", "expected 32 characters or more"),
        ("AI_RATE_LIMIT", "100/day", "expected a rate such as 100/second or 6000/minute"),
        ("ML_MODEL_VERSION", "newest", "expected a version, YYYYMMDD_HHMMSS"),
    ],
)
def test_a_wrong_value_is_told_in_words_of_ours(name: str, value: str, message: str) -> None:
    result = CliRunner().invoke(cli, ["models", "list"], env={name: value})
    assert (result.exit_code, result.stderr) == (1, f"Error: {name}: {message}\n")


@pytest.mark.parametrize("name", ["APP_ENV", "AUTH_MODE"])
@pytest.mark.parametrize("in_file", [True, False])
def test_a_guard_is_not_turned_off_by_setting_it_to_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, in_file: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text(f"{name if in_file else 'PORT'}=\n")
    env = {name: None if in_file else "", "WORKERS": ""}  # what else is empty is not set
    result = CliRunner().invoke(cli, ["models", "list"], env=env)
    assert result.exit_code == 1
    assert result.stderr.strip() == f"Error: {name}: it is empty; give it a value, or do not set it"


# --- .env -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"PORT=80\n\nAUTH_MODE: api_key\n", ".env: line 3 is not of the form NAME=value"),
        (b"AUTH_MODE api_key\r\n", ".env: line 1 is not of the form NAME=value"),
        (b"# none\nAUTH_MODE\n", ".env: line 2 is not of the form NAME=value"),
        (b"ML_MODEL_DIR='models\n", ".env: line 1 is not of the form NAME=value"),
        (b"\nAUTH_MOD=jwt\n", ".env: line 2: there is no setting AUTH_MOD; .env.example has them all"),
        (b"ml_x=", ".env: line 1: there is no setting ml_x; .env.example has them all"),
        ("PORT=80\n".encode("utf-16"), ".env: it is not a text in UTF-8; save it as one"),
    ],
)
def test_an_environment_file_that_would_be_read_in_part_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_bytes(written)
    assert_told(message)


def test_an_environment_file_that_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").symlink_to("/proc/self/mem")  # also root may not read where nothing is mapped
    assert_told(".env: it cannot be read (input/output error)")


def assert_told(message: str) -> None:
    result = CliRunner().invoke(cli, ["models", "list"])
    assert (result.exit_code, result.stderr) == (1, f"Error: {message}\n")


def test_an_environment_file_may_hold_what_other_programs_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\ufeff# a note\n\nexport ml_max_batch_size = '7' # few\nPGUSER=x\nPOSTGRES_PASSWORD=\nMLFLOW=1\n"
    Path(".env").write_text(text, encoding="utf-8")
    assert load_settings().ml_max_batch_size == 7
    Path(".env").unlink()
    Path(".env").mkdir()  # as `python -m venv .env` does
    assert load_settings().ml_max_batch_size == 2000


# --- Origins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origins",
    [
        "https://crm.example",
        "http://[::1]:3000,http://10.0.0.1:8080",
        "capacitor://localhost",
        "http://crm.example:443,https://crm.example:80,https://crm.example:65535",
    ],
)
def test_origins_as_browsers_send_them_are_taken(origins: str) -> None:
    assert read(cors_origins=origins).cors_origins == tuple(origins.split(","))
