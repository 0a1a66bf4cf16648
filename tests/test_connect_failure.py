"""The word for why a database lets nobody in, against a server that refuses and addresses where none is."""

import json
import re
import socket
from pathlib import Path

import psycopg
import pytest

from app.db.connect_failure import name_failure
from app.errors import DatabaseUnavailableError
from tests.service import Service, publish_crm_model

AWAY = psycopg.OperationalError("the driver's words")


def of_another(part: str, url: str) -> str:
    pattern, other = {"database": (r"/[^/?]+\?", "/s3cret?"), "role": ("//postgres@", "//s3cret@")}[part]
    changed = re.sub(pattern, other, url)
    assert changed != url
    return changed


@pytest.mark.parametrize(("part", "sqlstate"), [("database", "3D000"), ("role", "28000")])
def test_what_the_server_refuses_is_told_by_its_sqlstate(server_url: str, part: str, sqlstate: str) -> None:
    assert name_failure(AWAY, of_another(part, server_url)) == sqlstate


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("postgresql://u@127.0.0.1:1/x", "refused"),
        ("postgresql://u@nosuch.invalid/x", "unreachable"),
        ("postgresql://u@/x?host=/nosuch", "unreachable"),
        ("postgresql://u@127.0.0.1:1,nosuch.invalid:1/x", "refused"),
    ],
)
def test_what_fails_on_the_way_is_told_by_a_word(url: str, word: str) -> None:
    assert name_failure(AWAY, url) == word


def test_a_server_that_says_nothing_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert name_failure(AWAY, f"postgresql://u@127.0.0.1:{port}/x") == "timeout"


def test_what_is_known_already_is_not_asked_for_again(server_url: str) -> None:
    nowhere = "postgresql://u@127.0.0.1:1/x"
    assert name_failure(psycopg.errors.ConnectionTimeout(), nowhere) == "timeout"
    error = DatabaseUnavailableError()
    error.__cause__ = psycopg.errors.AdminShutdown()
    assert name_failure(error, nowhere) == "57P01"
    assert name_failure(AWAY, server_url) == "session_lost"


@pytest.mark.parametrize(("part", "sqlstate"), [("database", "3D000"), ("role", "28000")])
def test_a_service_logs_why_its_database_is_away_and_nothing_of_the_address(
    server_url: str, tmp_path: Path, part: str, sqlstate: str
) -> None:
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, of_another(part, server_url), models) as service:
        assert service.stop() == 0
    log = service.stderr.read_text()
    told = {line["event"]: line["cause"] for line in map(json.loads, log.splitlines()) if "cause" in line}
    assert told == {"database_unavailable": sqlstate, "change_listener": sqlstate}
    assert "s3cret" not in log
