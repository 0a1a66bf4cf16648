"""kill -9 in the middle of the work: every answered request has its row in ai_events, exactly once."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from app.db.embedded import open_embedded
from app.db.migrations import upgrade
from tests.service import Load, Service, add_leads, count_events, publish_crm_model


def wait_for_events(url: str, answered: dict[str, int], seconds: float = 30) -> dict[str, int]:
    """Returns the rows of each request ID, once those of all answered requests are there or time is up."""
    deadline = time.monotonic() + seconds
    while True:
        rows = count_events(url)
        if answered.keys() <= rows.keys() or time.monotonic() > deadline:
            return rows
        time.sleep(0.1)


def assert_every_answer_has_its_row_once(url: str, load: Load) -> None:
    rows = wait_for_events(url, load.answered)
    lost = load.answered.keys() - rows.keys()
    twice = {request_id for request_id, count in rows.items() if count > 1}
    assert (lost, twice) == (set(), set())


async def run_and_kill(load: Load, service: Service, requests: int) -> None:
    """Kills the service when half of the requests are answered, with the other half under way or to come."""
    goal = len(load.answered) + requests // 2
    running = asyncio.create_task(load.run(service.port, requests))
    while len(load.answered) < goal and not running.done():  # noqa: ASYNC110 - the condition is a count
        await asyncio.sleep(0.001)
    await asyncio.to_thread(service.kill)
    await running


async def test_a_service_killed_in_the_middle_of_ten_thousand_requests_loses_none(
    database_url: str, tmp_path: Path
) -> None:
    load = Load("kill", add_leads(database_url, 100))
    with Service(tmp_path, database_url, publish_crm_model(tmp_path / "models")) as service:
        await run_and_kill(load, service, 10_000)
        killed_at = len(load.answered)
        service.start()
        await load.run(service.port, 10_000 - killed_at)
        assert_every_answer_has_its_row_once(database_url, load)
        assert service.stop() == 0
    assert 5_000 <= killed_at < 10_000
    assert len(load.answered) >= 10_000
    assert set(Counter(load.answered.values())) == {200, 422}


async def test_the_same_with_two_workers_and_the_database_stopped_in_between(
    make_server_dir: Callable[[], Path], tmp_path: Path
) -> None:
    server = make_server_dir()
    with open_embedded(server) as url:
        upgrade(url)
        load = Load("outage", add_leads(url, 20))
        models = publish_crm_model(tmp_path / "models")
        service = Service(tmp_path, url, models, WORKERS="2", ML_PREDICTION_CACHE_TTL_SECONDS="3")
        service.start()
        await load.run(service.port, 500)
    try:
        await run_and_kill(load, service, 1_000)
        service.start()
        await load.run(service.port, 500)
        assert 503 in load.answered.values()
        with open_embedded(server) as url:
            await load.run(service.port, 500)
            assert_every_answer_has_its_row_once(url, load)
            assert service.stop() == 0
    finally:
        service.kill()
