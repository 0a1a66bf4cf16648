"""How the service ends, and how its workers are replaced: by signals, as ops send them."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from tests.service import Service, publish_crm_model

PATIENCE_SECONDS = 180.0


@pytest.fixture
def service(database_url: str, tmp_path: Path) -> Service:
    return Service(tmp_path, database_url, publish_crm_model(tmp_path / "models"), DRAIN_SECONDS="2")


def wait_until(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_SECONDS
        time.sleep(0.02)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_fails_readiness_first_and_closes_the_listener_last(
    database_url: str, tmp_path: Path, workers: str
) -> None:
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, DRAIN_SECONDS="3", WORKERS=workers) as service:
        url = f"http://127.0.0.1:{service.port}"
        assert "connection" not in httpx2.get(f"{url}/readyz").headers
        service.send(signal.SIGTERM)
        wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 503)
        refused = httpx2.get(f"{url}/readyz")
        assert refused.json()["error_code"] == "DRAINING"
        answered = httpx2.get(f"{url}/livez")
        assert (answered.status_code, answered.headers["connection"]) == (200, "close")
        service.send(signal.SIGTERM)
        assert service.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_end_it_in_order_without_a_drain(service: Service, number: signal.Signals) -> None:
    with service:
        service.send(number)
        assert service.wait() == 0


def test_sighup_replaces_the_workers_one_by_one(database_url: str, tmp_path: Path) -> None:
    models = publish_crm_model(tmp_path / "models")
    with Service(tmp_path, database_url, models, WORKERS="2") as service:
        url = f"http://127.0.0.1:{service.port}/livez"
        before = service.worker_pids()
        assert len(before) == 2
        service.send(signal.SIGHUP)

        def answers_and_is_replaced() -> bool:
            assert httpx2.get(url).status_code == 200
            return len(service.worker_pids()) == 2 and not before & service.worker_pids()

        wait_until(answers_and_is_replaced)
        assert service.stop() == 0
