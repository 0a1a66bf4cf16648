"""The commands, as a person or a script runs them: against a real database, by status and by output."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import psycopg
import pytest
from click.testing import CliRunner, Result

from app.ai.domain import InputColumn
from app.ai.features import FeatureSet, FeatureSpec
from app.ai.served_versions import ServedVersions
from app.cli import cli
from tests.model_files import V1, V2, publish
from tests.service import Connection, Service, add_leads, publish_crm_model

ROOT = Path(__file__).parent.parent
Run = Callable[..., Result]


@pytest.fixture
def run(database_url: str, tmp_path: Path) -> Run:
    """`run("models", "list")` runs a command against a database and a models directory of this test's own."""
    environment = {
        "DATABASE_URL": database_url,
        "ML_MODEL_DIR": str(tmp_path / "models"),
        "VAR_DIR": str(tmp_path / "var"),
    }
    (tmp_path / "models").mkdir()

    def invoke(*arguments: str, **more: str) -> Result:
        return CliRunner().invoke(cli, arguments, env={**environment, **more})

    return invoke


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    """Four hundred leads whose number tells half the story of their outcome."""
    rng = np.random.default_rng(7)
    visits = rng.poisson(4, 400)
    won = rng.random(400) < 1 / (1 + np.exp(3 - 0.6 * visits))
    channels = rng.choice(["Fair", "Web", "Select"], 400)
    lines = [
        f"L-{number},{visit},{channel},{'Yes' if outcome else 'No'}"
        for number, (visit, channel, outcome) in enumerate(zip(visits, channels, won, strict=True))
    ]
    path = tmp_path / "leads.csv"
    path.write_text("\n".join(["Lead No,Visits,Channel,Enrolled", *lines]) + "\n", encoding="utf-8")
    return path


def _commands(group: click.Group, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [
        path
        for name, command in group.commands.items()
        for path in (
            [
                (*prefix, name),
                *(_commands(command, (*prefix, name)) if isinstance(command, click.Group) else []),
            ]
        )
    ]


@pytest.mark.parametrize("path", _commands(cli), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 3


def test_a_file_becomes_a_source_a_model_and_scores(run: Run, csv_file: Path, database_url: str) -> None:
    imported = run(
        "import",
        str(csv_file),
        "--table",
        "leads",
        "--id",
        "Lead No",
        "--label",
        "Enrolled",
        "--missing",
        "Select",
        "--json",
    )
    assert imported.exit_code == 0, imported.output
    assert "400" in imported.stdout

    trained = run(
        "train", "--source", "leads", "--label", "enrolled", "--model", "logistic_regression", "--json"
    )
    assert trained.exit_code == 0, trained.output
    facts = json.loads(trained.stdout)
    assert 0.5 < facts["metrics"]["roc_auc"] < 1

    listed = json.loads(run("models", "list", "--json").stdout)
    assert [(model["version"], model["state"]) for model in listed] == [(facts["version"], "verified")]
    assert run("models", "verify").exit_code == 0

    scored = run("score", "--json", LEAD_SOURCE="leads")
    assert scored.exit_code == 0, scored.output
    with psycopg.connect(database_url) as connection:
        rows = connection.execute("SELECT probability, model_version FROM lead_scores").fetchall()
    assert len(rows) == 400
    assert {version for _, version in rows} == {facts["version"]}
    assert all(0 <= probability <= 1 for probability, _ in rows)


def import_text(run: Run, path: Path, text: str, *options: str) -> str:
    """Imports a file of this text, whose IDs are in the column No; returns what is printed."""
    path.write_text(text)
    return run("import", str(path), "--table", "leads", "--id", "No", "--replace", *options).stdout


def list_hints(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("hint: ")]


def test_an_import_says_what_was_not_read_as_a_number(run: Run, tmp_path: Path) -> None:
    path, text = tmp_path / "leads.csv", "No;Fee;City\n1;12,5;Bonn\n2;13,5;Ulm\n"
    (hint,) = list_hints(import_text(run, path, text))
    assert hint.startswith("hint: fee is text: 2 of 2 values look like numbers: write them 1234.50")
    columns = json.loads(import_text(run, path, text, "--json"))["columns"]
    assert [len(column["hints"]) for column in columns] == [1, 0]


def test_an_import_says_what_is_to_be_done_about_ids_no_request_can_carry(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "leads.csv"
    (hint,) = list_hints(import_text(run, path, "No,Fee\nA 1,2\n#2,3\nL-3,4\n"))
    assert hint.startswith("hint: IDs that cannot be asked for over HTTP: 2 (allowed are 1 to 64 of")
    assert hint.endswith("ask for those leads by their lead_id")
    assert "hint: " not in import_text(run, path, "No,Fee\nL-3,4\n")


def test_a_word_that_means_yes_needs_a_label(run: Run, csv_file: Path) -> None:
    refused = run("import", str(csv_file), "--table", "leads", "--id", "Lead No", "--positive", "Yes")
    assert refused.exit_code == 2
    assert "--label" in refused.stderr
    accepted = run(
        *("import", str(csv_file), "--table", "leads", "--id", "Lead No"),
        *("--label", "Enrolled", "--positive", "Yes"),
    )
    assert accepted.exit_code == 0, accepted.output


@pytest.mark.parametrize(("unbuffered", "command"), [("", "models list"), ("1", "import --help")])
def test_output_that_cannot_be_written_is_one_line(unbuffered: str, command: str) -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "app.cli", *command.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == "Error: output cannot be written: No space left on device\n"


def test_a_sign_that_cannot_be_shown_fails_no_command(
    run: Run, csv_file: Path, tmp_path: Path, database_url: str
) -> None:
    csv_file.write_text("".join(csv_file.read_text().splitlines(keepends=True)[:20]))
    run("import", str(csv_file), "--table", "leads", "--id", "Lead No", "--label", "Enrolled")
    environment = {"DATABASE_URL": database_url, "ML_MODEL_DIR": str(tmp_path / "modèles")}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "app.cli",
            "train",
            "--source",
            "leads",
            "--label",
            "enrolled",
            "--base-rate",
            ".3",
        ],
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONIOENCODING": "ascii", "COLUMNS": "500"},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "mod?les").encode() in result.stdout


@pytest.mark.parametrize("command", ["models list", "models verify", "score"])
def test_a_models_directory_that_is_not_there_is_named(run: Run, tmp_path: Path, command: str) -> None:
    result = run(*command.split(), ML_MODEL_DIR=str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert f"ML_MODEL_DIR: there is no directory {tmp_path / 'nowhere'}" in result.stderr
    assert not result.stdout


def test_a_model_that_cannot_be_trusted_fails_the_verify_command(
    run: Run, csv_file: Path, tmp_path: Path
) -> None:
    run("import", str(csv_file), "--table", "leads", "--id", "Lead No", "--label", "Enrolled")
    run("train", "--source", "leads", "--label", "enrolled", "--model", "logistic_regression")
    artifact = next((tmp_path / "models").glob("*.skops"))
    artifact.write_bytes(artifact.read_bytes()[:-1])
    result = run("models", "verify")
    assert result.exit_code == 1
    assert "size_mismatch" in result.output
    assert "Traceback" not in result.output


def test_a_models_directory_that_cannot_be_written_stops_a_training_before_it_begins(
    run: Run, csv_file: Path
) -> None:
    run("import", str(csv_file), "--table", "leads", "--id", "Lead No", "--label", "Enrolled")
    # A column of this name does not exist: had the training begun, it would say so.
    result = run("train", "--source", "leads", "--label", "none", ML_MODEL_DIR=str(csv_file / "models"))
    assert result.exit_code == 1
    assert result.stderr == f"Error: {csv_file / 'models'} cannot be written: not a directory.\n"


def test_whoever_watches_sees_how_far_the_verification_is(run: Run, tmp_path: Path) -> None:
    publish_crm_model(tmp_path / "models")
    watched = run("models", "verify", FORCE_COLOR="1", TERM="xterm")  # what makes rich believe in a terminal
    assert watched.exit_code == 0
    assert "1/1" in watched.stderr
    assert "1/1" not in run("models", "verify").stderr


def test_a_progress_bar_shows_no_total_that_nobody_knows(run: Run, csv_file: Path) -> None:
    csv_file.write_text("".join(csv_file.read_text().splitlines(keepends=True)[:20]))
    run("import", str(csv_file), "--table", "leads", "--id", "Lead No", "--label", "Enrolled")
    watched = run(
        *("train", "--source", "leads", "--label", "enrolled", "--base-rate", "0.3"),
        FORCE_COLOR="1",
        TERM="xterm",
    )
    assert watched.exit_code == 0, watched.output
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", watched.stderr)
    assert re.search(r"read .*19/\?", shown)
    assert "19/0" not in shown


def test_a_version_that_is_not_there_is_answered_with_those_that_are(run: Run, tmp_path: Path) -> None:
    models = tmp_path / "models"
    empty = run("evaluate", "--model", "nonsense")
    assert empty.stderr.startswith(
        f"Error: no model nonsense in {models} can be loaded (no_artifact); publish"
    )
    for version in (V1, V2):
        publish(models, version)
    result = run("evaluate", "--model", "nonsense")
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: no model nonsense in {models} can be loaded (no_artifact); the newest there: {V2}, {V1}.\n",
    )


def test_no_model_at_all_fails_the_verify_command(run: Run) -> None:
    result = run("models", "verify")
    assert result.exit_code == 1
    assert "no model" in result.stderr


def test_the_demo_fills_an_empty_database_once(run: Run, database_url: str) -> None:
    first = run("demo", "--people", "50", "--seed", "3", "--until", "2026-01-01", "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["people"] == 50
    second = run("demo", "--people", "50")
    assert second.exit_code == 1
    assert len(second.stderr.strip().splitlines()) == 1
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM people").fetchone() == (50,)


def test_upgrade_migrates_a_database_without_a_schema_and_seeds_nothing(empty_database_url: str) -> None:
    result = CliRunner().invoke(cli, ["db", "upgrade"], env={"DATABASE_URL": empty_database_url})
    assert result.exit_code == 0, result.output
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("SELECT count(*) FROM people").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM ai_events").fetchone() == (0,)


def test_what_may_be_a_misspelt_setting_is_warned_of(tmp_path: Path) -> None:
    away = "postgresql://u@127.0.0.1:1/x"
    with Service(tmp_path, away, tmp_path / "models", AUTH_MOD="s3cret", MLFLOW="1") as service:
        assert service.stop() == 0
    log = service.stderr.read_text()
    assert [json.loads(line)["names"] for line in log.splitlines() if "settings_not_known" in line] == [
        ["AUTH_MOD"]
    ]
    assert "s3cret" not in log


def test_serving_a_database_of_your_own_neither_migrates_nor_seeds_it_and_says_what_is_missing(
    empty_database_url: str, tmp_path: Path
) -> None:
    with Service(tmp_path, empty_database_url, ROOT / "models") as service:
        assert service.stop() == 0
    warnings = [line for line in service.stderr.read_text().splitlines() if "database_not_migrated" in line]
    assert len(warnings) == 1
    assert "leadscore db upgrade" in warnings[0]
    with psycopg.connect(empty_database_url) as connection:
        tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        assert connection.execute(tables).fetchone() == (0,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("ML_CACHE_TTL_SECONDS", "-1"),
        ("ML_PREWARM_LEADS", "25001"),
        ("CORS_ORIGINS", "*"),
        ("LEAD_SOURCE", "a;b"),
        ("APP_ENV", "prod"),
        ("ML_TRUSTED_KEYS", "not base64"),
        ("ML_TRUSTED_KEYS", "c2hvcnQ="),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_variable(name: str, value: str) -> None:
    result = CliRunner().invoke(cli, ["models", "list"], env={name: value})
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert name in result.stderr


def test_production_refuses_the_embedded_database() -> None:
    result = CliRunner().invoke(cli, ["serve"], env={"APP_ENV": "production", "DATABASE_URL": ""})
    assert result.exit_code == 1
    assert "DATABASE_URL" in result.stderr


def test_production_refuses_to_start_without_a_trusted_key(database_url: str) -> None:
    environment = {
        "APP_ENV": "production",
        "DATABASE_URL": database_url,
        "CORS_ORIGINS": "https://crm.example",
        "ML_TRUSTED_KEYS": "",
    }
    result = CliRunner().invoke(cli, ["serve"], env=environment)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "ML_TRUSTED_KEYS must be set when APP_ENV=production" in result.stderr


def test_production_serves_a_signed_model_and_no_other(run: Run, database_url: str, tmp_path: Path) -> None:
    models = publish_crm_model(tmp_path / "models")
    trusted = run("models", "keygen", str(tmp_path / "key")).stdout.strip().removeprefix("ML_TRUSTED_KEYS=")
    environment = {
        "APP_ENV": "production",
        "CORS_ORIGINS": "https://crm.example",
        "ML_TRUSTED_KEYS": trusted,
    }
    with Service(tmp_path, database_url, models, **environment) as service:
        status, body = asyncio.run(_get(service.port, "/readyz"))
        assert (status, json.loads(body)["error_code"]) == (503, "MODEL_NOT_READY")
        assert service.stop() == 0
    assert "signature_missing" in service.stderr.read_text()
    assert run("models", "sign", "all", "--key", str(tmp_path / "key")).exit_code == 0
    with Service(tmp_path, database_url, models, **environment) as service:
        assert asyncio.run(_get(service.port, "/readyz"))[0] == 200
        _, body = asyncio.run(_get(service.port, "/ai/advanced-ml/models"))
        assert [model["signature"] for model in json.loads(body)["available"]] == ["valid"]
        assert service.stop() == 0


async def _get(port: int, path: str) -> tuple[int, bytes]:
    connection = await Connection.open(port)
    status, _, body = await connection.ask("GET", path)
    await connection.close()
    return status, body


def test_a_key_is_made_once_and_only_its_owner_can_read_it(run: Run, tmp_path: Path) -> None:
    key = tmp_path / "key"
    made = run("models", "keygen", str(key))
    assert re.fullmatch(r"ML_TRUSTED_KEYS=[A-Za-z0-9+/]{43}=\n", made.stdout)
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    again = run("models", "keygen", str(key))
    assert again.exit_code == 1
    assert "exists" in again.stderr
    assert key.read_bytes() == before


def test_models_are_signed_listed_and_verified_by_key(run: Run, csv_file: Path, tmp_path: Path) -> None:
    key, models = str(tmp_path / "key"), tmp_path / "models"
    trusted = run("models", "keygen", key).stdout.strip().removeprefix("ML_TRUSTED_KEYS=")
    run("import", str(csv_file), "--table", "leads", "--id", "Lead No", "--label", "Enrolled")
    train = ("train", "--source", "leads", "--label", "enrolled", "--model", "logistic_regression", "--json")
    version = json.loads(run(*train).stdout)["version"]
    refused = run("score", ML_TRUSTED_KEYS=trusted, LEAD_SOURCE="leads")
    assert refused.exit_code == 1
    assert "signature_missing" in refused.stderr
    assert "leadscore models sign" in refused.stderr

    refused = run("models", "sign", version[:8], "--key", key)
    assert refused.exit_code == 1
    assert (
        f"no manifest of version {version[:8]} to sign in {models}; the newest there: {version}."
        in refused.stderr
    )
    assert run("models", "sign", version, "--key", key).exit_code == 0
    (listed,) = json.loads(run("models", "list", "--json", ML_TRUSTED_KEYS=trusted).stdout)
    assert (listed["state"], listed["signature"]) == ("verified", "valid")
    assert f"signed by {listed['signed_by']}" in run("models", "verify", ML_TRUSTED_KEYS=trusted).stdout
    assert "signature unchecked" in run("models", "list").stdout
    assert run("score", ML_TRUSTED_KEYS=trusted, LEAD_SOURCE="leads").exit_code == 0

    for path in models.iterdir():
        path.unlink()
    assert run(*train, "--sign-key", key).exit_code == 0
    assert run("models", "verify", ML_TRUSTED_KEYS=trusted).exit_code == 0


def test_scores_are_not_written_with_an_older_model_than_before(
    run: Run, csv_file: Path, tmp_path: Path
) -> None:
    run("import", str(csv_file), "--table", "leads", "--id", "Lead No", "--label", "Enrolled")
    run("train", "--source", "leads", "--label", "enrolled", "--model", "logistic_regression")
    ServedVersions(tmp_path / "var").record("29990101_000000")
    refused = run("score", LEAD_SOURCE="leads")
    assert refused.exit_code == 1
    assert "rollback_refused" in refused.stderr
    assert "ML_MODEL_VERSION" in refused.stderr
    (listed,) = json.loads(run("models", "list", "--json").stdout)
    assert run("score", LEAD_SOURCE="leads", ML_MODEL_VERSION=listed["version"]).exit_code == 0


def test_a_model_the_lead_source_cannot_feed_is_passed_over_and_not_remembered_as_served(
    run: Run, database_url: str, tmp_path: Path
) -> None:
    add_leads(database_url, 3)
    publish_crm_model(tmp_path / "models")
    unknown = FeatureSet(
        tuple(
            FeatureSpec(name, "value", (InputColumn(f"no_such_{name}", "number"),), {}, f"The {name}.")
            for name in "abc"
        )
    )
    publish(tmp_path / "models", V2, feature_set=unknown.to_json())
    scored = run("score", "--json")
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["model_version"] == V1
    assert ServedVersions(tmp_path / "var").highest() == V1
    refused = run("score", ML_MODEL_VERSION=V2)
    assert refused.exit_code == 1
    assert (
        "(incompatible); why: The lead source has no column no_such_a, no_such_b, no_such_c."
        in refused.stderr
    )
    assert ServedVersions(tmp_path / "var").highest() == V1


def test_a_taken_port_is_said_in_one_line_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {**os.environ, "PORT": str(taken.getsockname()[1]), "VAR_DIR": str(tmp_path / "var")}
        result = subprocess.run(
            [sys.executable, "-m", "app.cli", "serve"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "PORT" in result.stderr
    assert not (tmp_path / "var").exists()
