"""How workers are replaced, and how they end: without their supervisor, frozen, while they start."""

import multiprocessing
import os
import signal
from pathlib import Path

import httpx2
import uvicorn

from app.serve import Worker
from tests.service import Load, Service, add_leads, count_events, publish_crm_model, wait_until


def test_sighup_replaces_the_workers_one_by_one(database_url: str, tmp_path: Path) -> None:
    with Service(tmp_path, database_url, tmp_path, WORKERS="2") as service:
        url = f"http://127.0.0.1:{service.port}/livez"
        before = service.worker_pids()
        assert len(before) == 2
        service.send(signal.SIGHUP)

        def answers_and_is_replaced() -> bool:
            assert httpx2.get(url).status_code == 200
            return len(service.worker_pids()) == 2 and not before & service.worker_pids()

        wait_until(answers_and_is_replaced)
        assert service.stop() == 0


def has_ended(pid: int) -> bool:
    """A process that nobody has collected yet has ended, too."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_workers_whose_supervisor_is_killed_end_in_order_and_leave_the_port(
    database_url: str, tmp_path: Path
) -> None:
    leads = add_leads(database_url, 10)
    models = publish_crm_model(tmp_path / "models")
    load = Load("orphans", leads)
    with Service(tmp_path, database_url, models, WORKERS="2") as service:
        await load.run(service.port, 200)
        workers, port = service.worker_pids(), service.port
        service.send(signal.SIGKILL)
        wait_until(lambda: all(has_ended(worker) for worker in workers))
        assert service.wait() == -signal.SIGKILL
    with Service(tmp_path, database_url, models, PORT=str(port)) as again:
        await load.run(again.port, 100)
        assert again.stop() == 0
    assert load.answered.keys() <= count_events(database_url).keys()
    assert set(count_events(database_url).values()) == {1}


def test_a_frozen_worker_holds_up_neither_the_others_nor_the_end(database_url: str, tmp_path: Path) -> None:
    with Service(tmp_path, database_url, tmp_path, WORKERS="2") as service:
        first, second = sorted(service.worker_pids())
        os.kill(first, signal.SIGSTOP)
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: bool(service.worker_pids() - {first, second}))
        assert first in service.worker_pids()
        assert service.stop() == 0
        assert has_ended(first)


def test_the_end_does_not_wait_for_a_start(database_url: str, tmp_path: Path) -> None:
    service = Service(tmp_path, database_url, tmp_path, WORKERS="2")
    service.launch()
    try:
        wait_until(lambda: bool(service.worker_pids()))
        first = min(service.worker_pids())
        os.kill(first, signal.SIGSTOP)
        assert service.stop() == 0
        assert has_ended(first)
    finally:
        service.kill()


def test_a_worker_is_alive_until_it_has_been_silent_for_too_long() -> None:
    worker = Worker(uvicorn.Config("app"), [])
    worker.process = multiprocessing.get_context("fork").Process(target=signal.pause)  # type: ignore[assignment]
    assert not worker.is_alive(60)
    worker.start()
    try:
        assert worker.is_alive(0)  # it has only been asked
        assert worker.is_alive(60)
        assert not worker.is_alive(0)
        worker.pong()
        assert worker.is_alive(0)
    finally:
        worker.kill()
        worker.join()
    assert worker.exitcode == -signal.SIGKILL
