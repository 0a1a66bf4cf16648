"""No answered request is without its row in `ai_events`, exactly once, whatever dies and when.

Two services over one database answer a load of many kinds of requests, and both are killed (SIGKILL to all
their processes) at random moments: while the database is there, while it is down, and while it comes back.
The clients keep a list of the request IDs that were answered; in the end it is put beside the table.

python -m bench.prove_kill [--long] [--seed N]
"""

import asyncio
import itertools
import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import structlog
from uuid_utils import uuid7

from app.ai.domain import StoredEvent
from app.ai.ml_telemetry import MlTelemetry
from app.ai.telemetry_log import TelemetryLog
from app.db.ai_events import PostgresEventSink
from app.db.embedded import open_embedded
from app.db.engine import Database
from app.db.migrations import upgrade
from bench.figures import Figure
from bench.proof import PlantedBug, ProofRun, run_proof
from tests.service import Load, Service, add_leads, count_events, publish_crm_model

LEADS = 50
ANSWERS_A_SECOND = 500
"""Of one service, on a busy machine: the long run kills late enough to have its answers in the end."""
ANY_NUMBER = sys.maxsize
LONGEST_SHIPPING = 20
DRAIN_SECONDS = 30.0
START_SECONDS = 1.0
"""What the database takes to come back, more or less: kills lie before and after that."""
_LATE_ROWS = "SELECT count(*) FROM ai_events WHERE request_id LIKE 'late-%'"
PHASES = ("up", "down", "coming back")


class Server:
    """The database, which can be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running = ExitStack()
        self.url = ""

    def start(self) -> None:
        """Starts it."""
        self.url = self._running.enter_context(open_embedded(self._directory))

    def stop(self) -> None:
        """Stops it."""
        self._running.close()


@dataclass(frozen=True)
class Amount:
    """Kills and answered requests, at least, and events that wait for a database that was away for long."""

    kills: int
    answers: int
    backlog: int


SERVICE, HASTY_SERVICE = ("-m", "app.cli", "serve"), ("-m", "bench.planted", "hasty-telemetry")
SHORT, LONG, PLANTED = Amount(30, 1_000, 20_000), Amount(1_000, 1_000_000, 120_000), Amount(2, 1, 100)


@dataclass
class Lane:
    """One service and the clients that ask it."""

    service: Service
    load: Load
    kills: int = 0

    async def load_and_kill(self, seconds: float) -> None:
        """Kills the service when it was under load for so long."""
        running = asyncio.create_task(self.load.run(self.service.port, ANY_NUMBER))
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.service.kill)
        await running
        self.kills += 1


def measure(run: ProofRun) -> list[Figure]:
    """Kills 30 times, or 1,000 times and until a million requests were answered; then ships a backlog."""
    return asyncio.run(_measure(run, LONG if run.long else SHORT, SERVICE))


async def _measure(run: ProofRun, amount: Amount, command: Sequence[str]) -> list[Figure]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    rng = random.Random(run.seed)  # noqa: S311 - repeatable
    with TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        server = Server(directory / "server")
        server.start()
        stack.callback(server.stop)
        upgrade(server.url)
        lead_ids, models = add_leads(server.url, LEADS), publish_crm_model(directory / "models")
        lanes = []
        for number in range(2):
            own = directory / f"lane-{number}"
            own.mkdir()
            lanes.append(Lane(Service(own, server.url, models, command=command), Load(own.name, lead_ids)))
            stack.callback(lanes[-1].service.kill)
        await _kill_often(lanes, server, rng, amount)
        figures = await _compare(lanes, server.url, amount)
        seconds = await _drain(directory / "backlog", server.url, amount.backlog)
        what = f"{amount.backlog:,} events that waited are in the table"
        return [*figures, Figure(what, seconds, DRAIN_SECONDS, unit="s")]


async def _kill_often(lanes: Sequence[Lane], server: Server, rng: random.Random, amount: Amount) -> None:
    longest = 2 * max(0.25, amount.answers / amount.kills / ANSWERS_A_SECOND)
    for phase in itertools.cycle(PHASES):
        if phase == "down":
            await asyncio.to_thread(server.stop)
        await asyncio.gather(*(asyncio.to_thread(lane.service.start) for lane in lanes))
        returning = asyncio.create_task(asyncio.to_thread(server.start)) if phase == "coming back" else None
        moments = [
            rng.uniform(0.02, longest if returning is None else longest + START_SECONDS) for _ in lanes
        ]
        await asyncio.gather(
            *(lane.load_and_kill(moment) for lane, moment in zip(lanes, moments, strict=True))
        )
        if returning is not None:
            await returning
        # The database is there after an "up" and a "coming back" only, and the comparison needs it.
        kills, answers = _count(lanes)
        if phase != "down" and kills >= amount.kills and answers >= amount.answers:
            return


def _count(lanes: Sequence[Lane]) -> tuple[int, int]:
    return sum(lane.kills for lane in lanes), sum(len(lane.load.answered) for lane in lanes)


async def _compare(lanes: Sequence[Lane], url: str, amount: Amount) -> list[Figure]:
    """Lets the services ship what they find, and looks for every answered request."""
    await asyncio.gather(*(asyncio.to_thread(_ship_everything, lane.service) for lane in lanes))
    answered = {name for lane in lanes for name in lane.load.answered}
    rows = await asyncio.to_thread(count_events, url)
    return [
        Figure("kills, under load", _count(lanes)[0], amount.kills, at_least=True, unit=""),
        Figure("answered requests", len(answered), amount.answers, at_least=True, unit=""),
        Figure("answered requests without a row", len(answered - rows.keys()), 0, unit=""),
        Figure("requests with more than one row", sum(count > 1 for count in rows.values()), 0, unit=""),
    ]


def _ship_everything(service: Service) -> None:
    """Starts the service and asks it to end, until its log is empty: then all events are shipped."""
    for _ in range(LONGEST_SHIPPING):
        service.start()
        assert service.stop() == 0, "the service did not end in good order"
        if not list((service.var_dir / "telemetry").glob("events-*")):
            return
    raise AssertionError("the log is never empty")


async def _drain(directory: Path, url: str, events: int) -> float:
    """Returns the seconds until so many events, left while the database was away, are in the table."""
    await asyncio.to_thread(_leave_backlog, directory, events)
    database = Database(url, pool_size=1, deadline_seconds=5)
    telemetry = MlTelemetry(TelemetryLog(directory), PostgresEventSink(database))
    began = time.monotonic()
    await telemetry.open()
    while await asyncio.to_thread(_count_late_rows, url) < events:  # noqa: ASYNC110 - another process has them
        await asyncio.sleep(0.1)
    seconds = time.monotonic() - began
    await telemetry.close()
    await database.close()
    return seconds


def _count_late_rows(url: str) -> int:
    with psycopg.connect(url) as connection:
        (rows,) = connection.execute(_LATE_ROWS).fetchone() or (0,)
        return int(rows)


def _leave_backlog(directory: Path, events: int) -> None:
    log, meta = TelemetryLog(directory), json.dumps({"of": "x" * 600})
    for first in range(0, events, 100):
        log.write(
            [
                StoredEvent(
                    str(uuid7()), "ml.prediction.success", meta, f"late-{number}", "2026-01-01T00:00:00Z"
                )
                for number in range(first, first + 100)
            ]
        )
    log.close()


def measure_hasty(run: ProofRun) -> list[Figure]:
    """A few kills of a service that answers too early."""
    return asyncio.run(_measure(run, PLANTED, HASTY_SERVICE))


if __name__ == "__main__":
    run_proof(
        "No answered request is without its row in ai_events, exactly once, whatever dies.",
        measure,
        {
            "a request is answered before its event is durable": PlantedBug(
                measure_hasty, "answered requests without a row"
            )
        },
    )
