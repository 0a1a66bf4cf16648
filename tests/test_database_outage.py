"""The database stopped and frozen under the running service: what is answered meanwhile, what comes after."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import psycopg
import pytest

from app.db.demo_crm import load_demo
from app.db.embedded import open_embedded
from app.db.migrations import upgrade
from app.schemas.ai_ml import PredictBatchResponse
from tests.in_process import build_settings, serve
from tests.lead_models import publish_lead_model
from tests.test_db_engine import frozen

SCORE, LEGACY = "/ai/advanced-ml/predict-batch", "/ai/advanced-ml-legacy/predict-batch"
HEALTH = "/ai/advanced-ml/health"
DEADLINE_SECONDS = 2.0
SLACK_SECONDS = 1.0  # for a machine that is busy with other tests
FAILURES = 3


class Server:
    """A PostgreSQL of this module's own that can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self.start()

    def start(self) -> None:
        self.url = self._stack.enter_context(open_embedded(self.folder))

    def stop(self) -> None:
        self._stack.close()

    @property
    def data(self) -> Path:
        return self.folder / "postgres" / "data"


@pytest.fixture(scope="module")
def server(make_server_dir: Callable[[], Path]) -> Iterator[Server]:
    server = Server(make_server_dir())
    upgrade(server.url)
    load_demo(server.url, people=60, seed=4, until=datetime.now(UTC))
    yield server
    server.stop()


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Iterator[httpx2.Client]:
    publish_lead_model(tmp_path / "models")
    settings = build_settings(
        tmp_path,
        server.url,
        database_deadline_seconds=DEADLINE_SECONDS,
        ai_breaker_failures=FAILURES,
        ai_breaker_open_seconds=1.0,
        log_level="ERROR",
    )
    with serve(settings) as base, httpx2.Client(base_url=base) as http:
        yield http


def timed(client: httpx2.Client, path: str, *lead_ids: str) -> tuple[httpx2.Response, float]:
    began = time.perf_counter()
    response = client.post(path, json=list(lead_ids)) if lead_ids else client.get(path)
    return response, time.perf_counter() - began


def assert_unavailable(client: httpx2.Client, *lead_ids: str, within: float = DEADLINE_SECONDS) -> None:
    response, seconds = timed(client, SCORE, *lead_ids)
    assert (response.status_code, response.json()["error_code"]) == (503, "DATABASE_UNAVAILABLE")
    assert int(response.headers["retry-after"]) >= 1
    assert seconds <= within + SLACK_SECONDS


def assert_answered_in_part(client: httpx2.Client, remembered: str, *, unread: str) -> None:
    response, seconds = timed(client, SCORE, unread, remembered)
    answer = response.json()
    PredictBatchResponse.model_validate_json(response.content)
    assert [answered["lead_id"] for answered in answer["predictions"]] == [remembered]
    assert [(told["position"], told["error_code"]) for told in answer["errors"]] == [
        (0, "DATABASE_UNAVAILABLE")
    ]
    assert answer["degraded"] is True
    assert seconds <= DEADLINE_SECONDS + SLACK_SECONDS


def assert_recovers(client: httpx2.Client, *lead_ids: str, within: float) -> None:
    began = time.monotonic()
    while (response := client.post(SCORE, json=list(lead_ids))).status_code != 200:
        assert response.status_code == 503
        assert time.monotonic() - began < within
    assert not response.json()["errors"]


def assert_operations_answer_at_once(client: httpx2.Client) -> None:
    health, seconds = timed(client, HEALTH)
    assert (health.status_code, health.json()["database"]["status"]) == (200, "unavailable")
    assert seconds < 0.25 + SLACK_SECONDS
    for path in ("/livez", "/readyz", HEALTH, "/metrics", "/ai/advanced-ml/models"):
        response, seconds = timed(client, path)
        assert response.status_code == 200
        assert seconds < SLACK_SECONDS


def assert_says_that_it_is_degraded(client: httpx2.Client, *lead_ids: str) -> None:
    """Remembered answers say so as soon as nobody can hear whether they still hold."""
    began = time.monotonic()
    while client.post(SCORE, json=list(lead_ids)).json().get("degraded") is not True:
        assert time.monotonic() - began < 0.25 + SLACK_SECONDS
    old = client.post(LEGACY, json=list(lead_ids)).json()
    assert old["degraded"] is True
    assert old["degraded_age_seconds"] > 0
    health = client.get(HEALTH).json()
    assert (health["status"], health["prediction_cache"]) == ("healthy", {"freshness": "suspended"})


def test_a_stopped_database_costs_new_leads_a_503_and_nothing_else(
    server: Server, client: httpx2.Client
) -> None:
    before = client.post(SCORE, json=["lead_1", "lead_2"]).json()
    server.stop()
    try:
        cached, _ = timed(client, SCORE, "lead_2", "lead_1", "lead_1")
        assert cached.json()["cache_hits"] == 3
        assert cached.json()["predictions"][1::-1] == before["predictions"]
        assert_says_that_it_is_degraded(client, "lead_2", "lead_1")
        assert_unavailable(client, "lead_3")
        assert_answered_in_part(client, "lead_1", unread="lead_3")
        assert_operations_answer_at_once(client)
    finally:
        server.start()
    assert_recovers(client, "lead_1", "lead_3", within=3)
    assert "degraded" not in client.post(SCORE, json=["lead_1", "lead_2"]).json()


def test_a_frozen_database_is_given_up_at_the_deadline_and_used_again_at_once(
    server: Server, client: httpx2.Client
) -> None:
    client.post(SCORE, json=["lead_1"])
    with frozen(server.data):
        assert_unavailable(client, "lead_3")
        assert_answered_in_part(client, "lead_1", unread="lead_4")
        assert timed(client, SCORE, "lead_1")[0].json()["cache_hit"] is True
        assert_says_that_it_is_degraded(client, "lead_1")
        assert_operations_answer_at_once(client)
    assert_recovers(client, "lead_3", within=DEADLINE_SECONDS)


def test_a_service_that_starts_without_its_database_serves_once_it_is_there(
    server: Server, tmp_path: Path
) -> None:
    publish_lead_model(tmp_path / "models")
    server.stop()
    try:
        settings = build_settings(tmp_path, server.url)
        stack = ExitStack()
        base = stack.enter_context(serve(settings))
        client = stack.enter_context(httpx2.Client(base_url=base))
        assert_unavailable(client, "lead_1")
        assert client.get("/readyz").status_code == 200
    finally:
        server.start()
    with stack:
        assert_recovers(client, "lead_1", within=3)


def test_the_legacy_circuit_opens_on_failures_of_the_service_and_one_probe_closes_it(
    server: Server, client: httpx2.Client
) -> None:
    server.stop()
    try:
        for _ in range(2 * FAILURES):
            assert client.post(LEGACY, json=[]).status_code == 422
        for _ in range(FAILURES):
            assert client.get(HEALTH).json()["breaker"] == {"state": "closed"}
            assert client.post(LEGACY, json=["lead_1"]).json()["error_code"] == "DATABASE_UNAVAILABLE"
        refused, seconds = timed(client, LEGACY, "lead_1")
        assert (refused.status_code, refused.json()["error_code"]) == (503, "CIRCUIT_OPEN")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["deprecation"]
        assert seconds < SLACK_SECONDS
        assert client.get(HEALTH).json()["breaker"] == {"state": "open"}
        assert "leadscore_breaker_state 2.0" in client.get("/metrics").text
        assert_unavailable(client, "lead_1")
    finally:
        server.start()
    assert_recovers(client, "lead_1", within=3)
    began = time.monotonic()
    while "leadscore_breaker_state 1.0" not in client.get("/metrics").text:
        assert time.monotonic() - began < 3
    began = time.monotonic()
    while (response := client.post(LEGACY, json=["lead_1"])).status_code != 200:
        assert response.json()["error_code"] == "CIRCUIT_OPEN"
        assert time.monotonic() - began < 3
    assert client.get(HEALTH).json()["breaker"] == {"state": "closed"}


def test_a_lead_that_is_not_remembered_is_left_out_of_the_old_answer_and_opens_no_circuit(
    server: Server, client: httpx2.Client
) -> None:
    client.post(LEGACY, json=["lead_1"])
    server.stop()
    try:
        for _ in range(FAILURES):
            answer = client.post(LEGACY, json=["lead_3", "lead_1"]).json()
            assert [answered["lead_id"] for answered in answer["predictions"]] == ["lead_1"]
            assert (answer["total_processed"], answer["degraded"]) == (2, True)
        assert client.get(HEALTH).json()["breaker"] == {"state": "closed"}
    finally:
        server.start()


def test_a_read_that_loses_its_connection_is_answered_and_the_circuit_hears_nothing_of_it(
    server: Server, tmp_path: Path
) -> None:
    publish_lead_model(tmp_path / "models")
    settings = build_settings(
        tmp_path,
        server.url,
        database_deadline_seconds=20.0,
        ai_request_deadline_seconds=30.0,
        ai_breaker_failures=1,
    )
    kill = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name = 'lead-scoring' AND wait_event_type = 'Lock'"
    )
    with (
        serve(settings) as base,
        httpx2.Client(base_url=base, timeout=30) as client,
        psycopg.connect(server.url, autocommit=True) as killer,
        ThreadPoolExecutor(1) as caller,
    ):
        assert client.post(LEGACY, json=["lead_1"]).status_code == 200
        with psycopg.connect(server.url) as holder:
            holder.execute("LOCK TABLE people IN ACCESS EXCLUSIVE MODE")
            asked = caller.submit(client.post, LEGACY, json=["lead_2"])
            began = time.monotonic()
            while killer.execute(kill).fetchone() == (0,):
                assert time.monotonic() - began < 10
        answer = asked.result()
        assert (answer.status_code, answer.json()["successful_predictions"]) == (200, 1)
        assert client.get(HEALTH).json()["breaker"] == {"state": "closed"}
        assert "stamina_retries_total{" in client.get("/metrics").text
