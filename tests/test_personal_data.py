"""Canaries in every personal column and in every place a caller can write; nobody may ever see them again.

Looked for in every answer, in `ai_events`, in the bytes of the telemetry log, in the log lines and in the
metrics, in the forms data leak in, on good days and on bad ones.
"""

import base64
import gzip
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from bench.canaries import Scanner, encode
from bench.personal_crm import CHOKING_VIEW, FEATURES, add_people, hostile_requests
from tests.model_files import publish
from tests.service import Connection, Service, count_events

BIRTH_DATE = "1907-03-11"
EMAIL_AS_REFERENCE = "ref.quillfeather@canary.example"

PERSONAL = {
    "full_name": "Zoë Quillfeather-Ångström",
    "email": "zoe.quillfeather@canary.example",
    "phone": "+44-7700-900-461",
    "notes": "Prefers évenings, mother is Xanthippe",
    "source": "canary-source-Vantablack",
    "country": "canary-country-Ruritania",
    "education_level": "canary-level-Thaumaturgy",
    "note": "Called at nïght about a Wyvern scholarship",
}
TYPED = "Ärger Typed-By-Caller 5531"


def find(canaries: dict[str, str], content: bytes) -> list[str]:
    """Returns which canaries are in the content, and how."""
    return [f"{hit.canary} ({hit.form})" for hit in sorted(Scanner(canaries).scan(content))]


@dataclass
class Sinks:
    """Everything that came out of the service, by where it came out."""

    answers: list[tuple[str, bytes]] = field(default_factory=list)
    others: dict[str, bytes] = field(default_factory=dict)

    def leaks(self) -> dict[str, list[str]]:
        everything = {**PERSONAL, "birth_date": BIRTH_DATE, "typed": TYPED}
        # An answer says which lead it is about in the caller's words; nothing else may.
        places = [(place, everything, content) for place, content in self.answers]
        places += [
            (place, {**everything, "reference": EMAIL_AS_REFERENCE}, content)
            for place, content in self.others.items()
        ]
        found = {place: find(canaries, content) for place, canaries, content in places}
        return {place: names for place, names in found.items() if names}


@pytest.fixture
def crm(database_url: str) -> str:
    """A CRM with one lead whose every column is a canary, and a view that chokes on it."""
    add_people(database_url, [{**PERSONAL, "external_ref": EMAIL_AS_REFERENCE}], birth_date=BIRTH_DATE)
    with psycopg.connect(database_url) as connection:
        connection.execute(f"CREATE VIEW choking_source AS {CHOKING_VIEW}")
    return database_url


@pytest.fixture
def models(tmp_path: Path) -> Path:
    publish(tmp_path / "models", feature_set=FEATURES.to_json())
    return tmp_path / "models"


async def drive(service: Service, sinks: Sinks) -> dict[str, int]:
    """Sends every request and notes every answer; returns the status by request ID where an event is due."""
    statuses = {}
    for number, (method, path, body, headers) in enumerate(hostile_requests(TYPED, EMAIL_AS_REFERENCE)):
        # A fresh connection each: a refusal may end one.
        connection = await Connection.open(service.port)
        status, head, content = await connection.ask(method, path, body, headers)
        await connection.close()
        sinks.answers.append((f"answer {number} to {method} {path.split('?')[0]}: {status}", head + content))
        request_id = re.search(rb"(?i)x-request-id: (\S+)", head)
        assert request_id is not None
        if path.startswith("/ai/") and method in ("POST", "PUT"):
            statuses[request_id[1].decode()] = status
    return statuses


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def collect(service: Service, sinks: Sinks, database_url: str, name: str) -> None:
    """Adds metrics, logs, the telemetry log's bytes and the table."""
    connection = await Connection.open(service.port)
    _, head, metrics = await connection.ask("GET", "/metrics")
    await connection.close()
    sinks.others[f"{name}: metrics"] = head + metrics
    sinks.others[f"{name}: standard error"] = service.stderr.read_bytes()
    for file in service.var_dir.rglob("*"):
        # A service that runs removes what it no longer needs; a directory is no file.
        with suppress(FileNotFoundError, IsADirectoryError):
            sinks.others[f"{name}: {file.relative_to(service.var_dir)}"] = file.read_bytes()
    with psycopg.connect(database_url) as rows, rows.cursor().copy("COPY ai_events TO STDOUT") as copy:
        sinks.others[f"{name}: ai_events"] = b"".join(bytes(block) for block in copy)


async def test_nothing_personal_comes_out_of_a_service_that_works(
    crm: str, models: Path, tmp_path: Path
) -> None:
    sinks = Sinks()
    with psycopg.connect(crm, autocommit=True) as connection, Service(tmp_path, crm, models) as service:
        # With their table out of the way the events stay in the log, where their bytes can be looked at.
        connection.execute("ALTER TABLE ai_events RENAME TO put_away")
        statuses = await drive(service, sinks)
        log = service.var_dir / "telemetry"
        in_log = b"".join(file.read_bytes() for file in log.rglob("*") if file.is_file())
        connection.execute("ALTER TABLE put_away RENAME TO ai_events")
        until(lambda: count_events(crm).keys() >= statuses.keys())
        await collect(service, sinks, crm, "working")
        sinks.others["telemetry log before shipping"] = in_log
        assert service.stop() == 0
    assert {200, 404, 405, 413, 415, 422} <= set(statuses.values())
    assert not [status for status in statuses.values() if status >= 500]
    assert [content for _, content in sinks.answers if b'"value":"another one"' in content]
    assert b"ml.prediction.success" in in_log
    assert b"ml.prediction.error" in sinks.others["working: ai_events"]
    assert b'"event":"request"' in sinks.others["working: standard error"]
    assert sinks.leaks() == {}


async def test_nothing_personal_comes_out_when_the_database_chokes_on_it(
    crm: str, models: Path, tmp_path: Path
) -> None:
    with psycopg.connect(crm) as connection, pytest.raises(psycopg.DataError, match="Xanthippe"):
        connection.execute("SELECT * FROM choking_source")
    sinks = Sinks()
    with Service(tmp_path, crm, models, LEAD_SOURCE="choking_source") as service:
        statuses = await drive(service, sinks)
        with psycopg.connect(crm, autocommit=True) as connection:
            # What the server says of a row that breaks a rule quotes the row.
            connection.execute("ALTER TABLE ai_events ADD CONSTRAINT no_more CHECK (action = '') NOT VALID")
            statuses |= await drive(service, sinks)
            until(lambda: b"telemetry_shipping_delayed" in service.stderr.read_bytes())
            connection.execute("ALTER TABLE ai_events DROP CONSTRAINT no_more")
        until(lambda: count_events(crm).keys() >= statuses.keys())
        await collect(service, sinks, crm, "choking")
    assert {500, 503} & set(statuses.values())
    assert b'"sqlstate":"22P02"' in sinks.others["choking: standard error"]
    assert sinks.leaks() == {}


@pytest.mark.parametrize("name", PERSONAL)
@pytest.mark.parametrize("form", encode("x" * 20))
def test_a_planted_leak_is_found(name: str, form: str) -> None:
    leak = b'{"event": "request", "detail": "' + encode(PERSONAL[name])[form] + b'"}'
    assert any(found.startswith(name) for found in find(PERSONAL, leak))


@pytest.mark.parametrize("offset", range(3))
def test_a_planted_leak_is_found_wherever_it_stands_in_base64(offset: int) -> None:
    leak = base64.b64encode(b"x" * offset + PERSONAL["email"].encode() + b"tail")
    assert find(PERSONAL, leak)


def test_a_planted_leak_is_found_in_what_is_compressed() -> None:
    assert find(PERSONAL, b"before" + gzip.compress(PERSONAL["notes"].encode()) + b"after")
