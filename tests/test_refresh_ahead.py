"""Scoring ahead of being asked: when it is due, how it yields, and that nobody sees it but the cache."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import psycopg
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.ai.domain import start_of_day
from app.ai.drift_window import DriftWindow
from app.ai.predictor import Predictor, ScoringPolicy
from app.ai.refresh_ahead import CHUNK_IDS, PAUSE_FACTOR, RefreshAhead
from app.db.demo_crm import load_demo
from app.db.engine import Database
from app.db.leads import PostgresLeadSource
from app.errors import DatabaseUnavailableError, ModelNotReadyError, PredictionFailedError
from tests.fakes import FakeClock, FakeLeadSource, FakeModels
from tests.in_process import build_settings, serve
from tests.lead_models import AS_OF, build_lead_bundle, build_lead_rows, publish_lead_model
from tests.test_db_engine import eventually
from tests.test_prediction_cache import build_cache
from tests.test_warm_path import SCORE, warm_up

TTL = 300.0
LEADS = 2 * CHUNK_IDS + 1
POLICY = ScoringPolicy(0.6, "max_probability")


class World:
    """A refresher over fakes; every read of a lead takes 10 ms, and pauses pass at once and are noted."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        rows = build_lead_rows(LEADS, seed=5)
        self.source = FakeLeadSource({f"lead_{number}": row for number, row in enumerate(rows)})
        self.recent: list[str] = list(self.source.leads)
        self.models = FakeModels(build_lead_bundle())
        self.clock = FakeClock()
        self.now = FakeClock(AS_OF + 3600)
        self.cache = build_cache(1000, self.clock)
        self.pauses: list[float] = []
        self.poison: dict[str, Exception] = {}
        self.recent_error: Exception | None = None
        self.predictor = Predictor(
            self.models, self, self.cache, DriftWindow(1), executor=executor,
            policy=POLICY, clock=self.clock,
        )  # fmt: skip
        self.refresh = RefreshAhead(
            self.predictor, self.models, self.cache, self, leads=LEADS, ttl_seconds=TTL,
            now=self.now, monotonic=self.clock, sleep=self._pause,
        )  # fmt: skip

    async def fetch(self, lead_ids, columns, use_part):  # type: ignore[no-untyped-def]
        self.clock.now += 0.01
        for lead_id in self.poison.keys() & set(lead_ids):
            raise self.poison[lead_id]
        await self.source.fetch(lead_ids, columns, use_part)

    async def fetch_recent(self, leads: int) -> Sequence[str]:
        if self.recent_error is not None:
            raise self.recent_error
        return self.recent[:leads]

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    async def hits(self) -> int:
        """How many of the leads a request would find in the cache."""
        bundle = await self.models.active()
        return int(self.cache.find(bundle.ref, start_of_day(self.now()), self.recent)[0].sum())


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture
def world(executor: ThreadPoolExecutor) -> World:
    return World(executor)


async def test_the_newest_leads_are_in_the_cache_before_anybody_asks(world: World) -> None:
    await world.refresh.look()
    assert await world.hits() == LEADS
    await world.refresh.look()
    assert len(world.source.asked) == 3


async def test_a_new_model_a_new_day_and_an_emptied_cache_are_each_worth_another_round(world: World) -> None:
    await world.refresh.look()
    world.models.bundle = build_lead_bundle("20260202_120000", seed=2)
    assert await world.hits() == 0
    await world.refresh.look()
    assert await world.hits() == LEADS
    world.now.now += 86_400
    assert await world.hits() == 0
    await world.refresh.look()
    assert await world.hits() == LEADS
    world.cache.forget_all()
    assert await world.hits() == 0
    await world.refresh.look()
    assert await world.hits() == LEADS


async def test_no_answer_expires_however_long_nobody_asks(world: World) -> None:
    for _ in range(1000):
        await world.refresh.look()
        assert await world.hits() == LEADS
        world.clock.now += 1
    assert len(world.source.asked) == 3 * (1 + 1000 // 225)


async def test_requests_get_their_turn_between_a_few_leads_and_the_next_and_three_quarters_of_the_time(
    world: World,
) -> None:
    await world.refresh.look()
    assert [len(asked) for asked in world.source.asked] == [CHUNK_IDS, CHUNK_IDS, 1]
    assert world.pauses == pytest.approx([PAUSE_FACTOR * 0.01] * 3)


async def test_while_nobody_listens_for_changes_nothing_is_scored_ahead(world: World) -> None:
    world.cache.trust_until(0)
    await world.refresh.look()
    assert not world.source.asked


@pytest.mark.parametrize("error", [PredictionFailedError(), ZeroDivisionError()])
async def test_leads_that_cannot_be_scored_are_told_of_once_and_hold_up_no_others(
    world: World, error: Exception
) -> None:
    world.poison[world.recent[CHUNK_IDS + 10]] = error
    with capture_logs() as lines:
        for _ in range(5):
            await world.refresh.look()
    assert await world.hits() == LEADS - CHUNK_IDS
    assert [len(asked) for asked in world.source.asked] == [CHUNK_IDS, 1]
    assert [(line["event"], line["exc_info"]) for line in lines] == [("refresh_ahead_incomplete", True)]
    # What every lead fails on must not fill the log either.
    assert world.pauses == pytest.approx([PAUSE_FACTOR * 0.01, 1, PAUSE_FACTOR * 0.01])
    world.poison.clear()
    world.clock.now += TTL
    await world.refresh.look()
    assert await world.hits() == LEADS


async def test_a_lead_whose_columns_cannot_be_read_holds_up_no_others(
    empty_database_url: str, executor: ThreadPoolExecutor
) -> None:
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(
            "CREATE TABLE crm AS SELECT gen_random_uuid() AS lead_id, 'website' AS source, n AS gpa,"
            " timestamptz '2026-05-01' - n * interval '1 minute' AS created_at, 2 AS touchpoint_count,"
            " 5.0 AS minutes_on_site, true AS newsletter_opt_in, 5000 AS tuition_fee"
            " FROM generate_series(1, %s) n",
            [LEADS],
        )
        connection.execute(
            "CREATE VIEW leads AS SELECT lead_id, source, gpa + 0 / (gpa - 7) AS gpa, created_at,"
            " touchpoint_count, minutes_on_site, newsletter_opt_in, tuition_fee FROM crm"
        )
    database = Database(empty_database_url, pool_size=2, deadline_seconds=10)
    source = PostgresLeadSource(database, "leads")
    models, cache = FakeModels(build_lead_bundle()), build_cache(1000)
    predictor = Predictor(models, source, cache, DriftWindow(1), executor=executor, policy=POLICY)
    refresh = RefreshAhead(
        predictor, models, cache, source, leads=LEADS, ttl_seconds=TTL, now=lambda: AS_OF,
        sleep=lambda _: asyncio.sleep(0),
    )  # fmt: skip
    try:
        await refresh.look()
        recent = await source.fetch_recent(LEADS)
    finally:
        await database.close()
    hit, _ = cache.find(models.bundle.ref, start_of_day(AS_OF), recent)
    # The seventh is in the first few, which are left out together.
    assert hit.tolist() == [at >= CHUNK_IDS for at in range(LEADS)]


@pytest.mark.parametrize("failure", ["database", "model", "defect"])
async def test_whatever_fails_is_tried_again(world: World, failure: str) -> None:
    world.source.error = DatabaseUnavailableError() if failure == "database" else None
    world.models.error = ModelNotReadyError() if failure == "model" else None
    world.recent_error = ZeroDivisionError() if failure == "defect" else None
    task = asyncio.create_task(world.refresh.run())
    assert await eventually(lambda: len(world.pauses) > 0, seconds=20)
    world.source.error = world.models.error = world.recent_error = None
    assert await eventually(lambda: len(world.cache) == LEADS, seconds=20)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def scored_ahead() -> float:
    return REGISTRY.get_sample_value("leadscore_leads_ahead_total") or 0


def test_a_service_that_has_just_started_answers_the_newest_leads_from_memory(
    database_url: str, tmp_path: Path
) -> None:
    load_demo(database_url, people=60, seed=4, until=datetime.now(UTC))
    with psycopg.connect(database_url) as connection:
        newest = connection.execute(
            "SELECT id::text, external_ref FROM people ORDER BY created_at DESC LIMIT 20"
        ).fetchall()
    publish_lead_model(tmp_path / "models")
    settings = build_settings(tmp_path, database_url, ml_prewarm_leads=20)
    before = scored_ahead()
    with serve(settings) as base, httpx2.Client(base_url=base) as client:
        deadline = time.monotonic() + 10
        while scored_ahead() < before + 40:
            assert time.monotonic() < deadline
            client.get("/livez")
        answer = warm_up(client, *(lead_id for row in newest for lead_id in row))
        assert answer["cache_hits"] == 40
        health = client.get("/ai/advanced-ml/health").json()
        assert health["drift"]["rows"] == 0
        assert client.post(SCORE, json=["nobody"]).json()["cache_hits"] == 0
    with psycopg.connect(database_url) as connection:
        (actions,) = (
            connection.execute("SELECT count(*) FROM ai_events WHERE request_id IS NULL").fetchone() or ()
        )
    assert actions == 1  # the model that was loaded
