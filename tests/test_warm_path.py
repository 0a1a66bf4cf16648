"""The warm path is always fresh: the whole service, a real database, and leads that change under it."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest

from app.db.demo_crm import load_demo
from app.db.embedded import open_embedded
from app.db.migrations import upgrade
from tests.in_process import build_settings, serve
from tests.lead_models import publish_lead_model
from tests.test_change_listener import session_of_the_listener

SCORE, HEALTH = "/ai/advanced-ml/predict-batch", "/ai/advanced-ml/health"
PROMISE_SECONDS = 0.25


@pytest.fixture(scope="module")
def url(make_server_dir: Callable[[], Path]) -> Iterator[str]:
    """A CRM on a server of this module's own, because a session of it is stopped."""
    with open_embedded(make_server_dir()) as url:
        upgrade(url)
        load_demo(url, people=60, seed=4, until=datetime.now(UTC))
        yield url


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    folder = tmp_path_factory.mktemp("service")
    publish_lead_model(folder / "models")
    with serve(build_settings(folder, url)) as base, httpx2.Client(base_url=base) as http:
        yield http


def execute(url: str, statement: str, *parameters: object) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(statement, parameters)


def add_lead(url: str, ref: str) -> str:
    lead_id = str(uuid4())
    execute(
        url,
        "INSERT INTO people (id, external_ref, gpa, created_at) VALUES (%s, %s, 2, now() - interval '1 day')",
        lead_id,
        ref,
    )
    return lead_id


def ask(client: httpx2.Client, *lead_ids: str) -> dict[str, Any]:
    answer: dict[str, Any] = client.post(SCORE, json=list(lead_ids)).raise_for_status().json()
    return answer


def coverages(answer: dict[str, Any]) -> list[float]:
    return [prediction["features_present_ratio"] for prediction in answer["predictions"]]


def warm_up(client: httpx2.Client, *lead_ids: str) -> dict[str, Any]:
    """Asks until every answer comes out of the cache."""
    deadline = time.monotonic() + 10
    while not (answer := ask(client, *lead_ids))["cache_hit"]:
        assert time.monotonic() < deadline
    return answer


def assert_new_within_the_promise(client: httpx2.Client, old: list[float], *lead_ids: str) -> None:
    """Asks on and on from the commit; whoever asks after the time promised must not get an old answer."""
    due = time.monotonic() + PROMISE_SECONDS
    asked = -math.inf
    # However slow the machine is, the last one is asked after the time promised.
    while asked < due + PROMISE_SECONDS:
        asked = time.monotonic()
        new = coverages(ask(client, *lead_ids))
        if asked >= due:
            assert all(a != b for a, b in zip(old, new, strict=True))


_CHANGES = [
    "UPDATE people SET gpa = NULL WHERE id = %s",
    (
        "INSERT INTO touchpoints (person_id, kind, direction, occurred_at, duration_seconds) "
        "VALUES (%s, 'site_visit', 'inbound', now() - interval '1 hour', 60)"
    ),
    (
        "UPDATE people SET programme_id = (SELECT id FROM programmes WHERE tuition_fee > 0 LIMIT 1) "
        "WHERE id = %s"
    ),
]


@pytest.mark.parametrize("statement", _CHANGES)
def test_a_changed_lead_is_answered_anew_by_either_of_its_ids(
    url: str, client: httpx2.Client, statement: str
) -> None:
    ref = f"ref_{uuid4()}"
    lead_id = add_lead(url, ref)
    old = coverages(warm_up(client, lead_id, ref))
    execute(url, statement, lead_id)
    assert_new_within_the_promise(client, old, lead_id, ref)
    assert warm_up(client, lead_id, ref)["cache_hits"] == 2


def test_a_changed_lead_is_answered_anew_even_while_the_session_that_listens_hangs(
    url: str, client: httpx2.Client
) -> None:
    lead_id = add_lead(url, "hangs")
    old = coverages(warm_up(client, lead_id))
    session = session_of_the_listener(url)
    assert session is not None
    os.kill(session, signal.SIGSTOP)
    try:
        execute(url, _CHANGES[0], lead_id)
        assert_new_within_the_promise(client, old, lead_id)
    finally:
        os.kill(session, signal.SIGCONT)


def test_a_changed_lead_is_answered_anew_although_the_session_that_listens_was_ended(
    url: str, client: httpx2.Client
) -> None:
    lead_id = add_lead(url, "ended")
    old = coverages(warm_up(client, lead_id))
    execute(
        url,
        "WITH e AS (SELECT pg_terminate_backend(%s)) UPDATE people SET gpa = NULL FROM e WHERE id = %s",
        session_of_the_listener(url),
        lead_id,
    )
    assert_new_within_the_promise(client, old, lead_id)
    assert warm_up(client, lead_id)["cache_hit"]


def test_a_reference_that_moves_to_another_lead_moves_in_the_cache_too(
    url: str, client: httpx2.Client
) -> None:
    one, two = add_lead(url, "moves"), add_lead(url, "stays")
    execute(url, _CHANGES[0], two)
    old = warm_up(client, "moves", one)
    execute(url, "UPDATE people SET external_ref = 'moved' WHERE id = %s", one)
    execute(url, "UPDATE people SET external_ref = 'moves' WHERE id = %s", two)
    assert_new_within_the_promise(client, coverages(old)[:1], "moves")
    assert coverages(ask(client, "moves", two)) == 2 * coverages(ask(client, "moves"))
    execute(url, "DELETE FROM people WHERE id = %s", two)
    deadline = time.monotonic() + PROMISE_SECONDS
    asked = time.monotonic()
    while ask(client, "moves", two)["failed_predictions"] < 2:
        assert asked < deadline
        asked = time.monotonic()


def test_a_lead_that_was_unknown_is_answered_as_soon_as_it_is_there(url: str, client: httpx2.Client) -> None:
    assert ask(client, "late")["failed_predictions"] == 1
    add_lead(url, "late")
    assert ask(client, "late")["failed_predictions"] == 0


def test_health_says_that_changes_are_heard_of(client: httpx2.Client) -> None:
    deadline = time.monotonic() + 10
    while client.get(HEALTH).json()["prediction_cache"] != {"freshness": "notified"}:
        assert time.monotonic() < deadline
